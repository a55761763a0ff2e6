"""Calibration text drawn from a source, and shared out to several processes."""

import os
import subprocess
import sys

import pytest
import torch

from cats_llm import Profile, bundled, distributed
from cats_llm.calibration.sampling import Sampling
from cats_llm.errors import CatsError
from cats_llm.loading import load_model, load_tokenizer

TEXT = str(bundled.calibration_text())


@pytest.fixture(scope="module")
def model():
    return load_model(str(bundled.model_path()), "float32", "cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(bundled.model_path()))


def test_processes_get_different_batches_and_together_all(model, tokenizer, monkeypatch):
    sampling = Sampling(samples=9, seq_length=16, batch_size=2)
    whole = list(sampling.batches(TEXT, tokenizer, model))
    assert [len(batch) for batch in whole] == [2, 2, 2, 2, 1]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    totals = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        share = list(sampling.batches(TEXT, tokenizer, model, lambda xs, _, total: totals.append(total) or xs))
        assert len(share) == totals[-1]
        assert all(torch.equal(a, b) for a, b in zip(share, whole[rank::2], strict=True))


def test_sequences_longer_than_the_model_reads_are_refused(model, tokenizer):
    with pytest.raises(CatsError, match="--seq-length 99999 is more than"):
        Sampling(seq_length=99999).batches(TEXT, tokenizer, model)


@pytest.mark.slow
def test_two_processes_calibrate_what_one_does(tmp_path):
    """To the bit, and only one of them writes and prints."""
    line = ["calibrate", str(bundled.model_path()), "--data", TEXT, "--samples", "5", "--seq-length", "32"]
    line += ["--batch-size", "2", "--dtype", "float32", "--device", "cpu"]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    printed = {}
    for name, start in (("one", []), ("two", launch)):
        start = [sys.executable, "-m", *start, "cats_llm.cli.main", *line, "-o", str(tmp_path / name)]
        done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        printed[name] = done.stdout.replace(str(tmp_path / name), "")
    one, two = Profile.load(tmp_path / "one"), Profile.load(tmp_path / "two")
    assert printed["one"] == printed["two"]
    assert one.layers.keys() == two.layers.keys()
    for layer, distribution in one.layers.items():
        assert torch.equal(distribution.counts, two.layers[layer].counts)
        assert torch.equal(distribution.edges, two.layers[layer].edges)
        assert (distribution.maximum, distribution.zeros) == (two.layers[layer].maximum, two.layers[layer].zeros)
    assert one.record | {"date": None} == two.record | {"date": None}
    assert one.record["sequences"] == 5
