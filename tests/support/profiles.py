"""Calibration profiles made of numbers that a test can choose."""

import numpy as np
import torch

from cats_llm import Profile
from cats_llm.calibration.distribution import MagnitudeDistribution


def of_groups(edges, counts, maximum, zeros=0):
    """A distribution with these groups; the first one begins at 0."""
    return MagnitudeDistribution(torch.tensor(edges), torch.tensor(counts), float(maximum), zeros)


def distribution(layer=0, scale=0.1, zeros=0, groups=400, seed=0):
    values = np.sort(np.abs(np.random.default_rng(seed + layer).standard_t(3, 5000)) * scale).astype(np.float32)
    edges = np.concatenate([[0.0], values[:: len(values) // groups][1:]]).astype(np.float32)
    counts = np.histogram(values, np.concatenate([edges, [np.inf]]))[0]
    if zeros:  # in a group of their own
        edges = np.insert(edges, 1, values[0] / 2)
        counts = np.insert(counts, 0, zeros)
    return of_groups(edges.tolist(), counts.tolist(), values[-1], zeros)


def profile(layers=4, model="org/Some-Model-7B", distributions=None):
    """A profile of a model that `eval_files.eval_file` evaluates."""
    record = {"model": model, "tokens": 10, "data": "text", "versions": {}}
    made = distributions or [distribution(layer) for layer in range(layers)]
    return Profile(dict(enumerate(made)), record)
