"""What `cats demo` puts into its page, made of numbers that a test can choose."""

from dataclasses import replace

import numpy as np

from cats_llm.report import Continuation, LayerDistribution, Report, Variant


def distribution(layer=0, scale=0.1, zeros=0, groups=400, seed=0):
    values = np.sort(np.abs(np.random.default_rng(seed + layer).standard_t(3, 5000)) * scale)
    edges = np.concatenate([[0.0], values[:: len(values) // groups][1:]])
    counts = np.histogram(values, np.concatenate([edges, [np.inf]]))[0]
    counts[0] += zeros
    return LayerDistribution(layer, edges.tolist(), counts.tolist(), float(values[-1]))


def variant(k, layers=4, **changes):
    made = Variant(
        name=f"cats-{100 * k:.0f}",
        target_sparsity=k,
        thresholds={layer: 0.05 + 0.1 * k + 0.01 * layer for layer in range(layers)},
        calibration_sparsity=dict.fromkeys(range(layers), k),
        measured_sparsity={layer: k - 0.003 * layer for layer in range(layers)},
        gate_sparsity=k - 0.00437,
        ffn_sparsity=2 * (k - 0.00437) / 3,
        model_sparsity=0.45 * (k - 0.00437),
        perplexity=17.533 * (1 + k**4),
        kl=0.31 * k**3,
        top1_agreement=1 - k**2 / 3,
    )
    return replace(made, **changes)


def dense(**changes):
    return replace(Variant("dense", None, {}, {}, {}, 0.0, 0.0, 0.0, 17.533, None, None), **changes)


def report(layers=4, **changes):
    made = Report(
        title="A report",
        model={"model": "demo", "parameters": "8.13 million"},
        calibration={"tokens": "32768"},
        evaluation={"tokens": "8192", "empty": ""},
        distributions=[distribution(layer) for layer in range(layers)],
        variants=[dense(), *(variant(k, layers) for k in (0.5, 0.7, 0.9))],
        continuations=[Continuation("Once upon a time", {"dense": "there was", "cats-50": "there were"})],
        command="cats demo --out x",
        versions={"cats-llm": "0.1.0"},
        created="2026-01-01",
    )
    return replace(made, **changes)
