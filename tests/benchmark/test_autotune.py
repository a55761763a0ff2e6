"""Tuning of the GPU kernels, without a GPU."""

import torch

from cats_llm.benchmark import autotune
from cats_llm.kernels.gpu import dispatch, tuning


def test_tuning_keeps_the_fastest_of_what_runs_and_the_best_tiles_together(tmp_path, monkeypatch):
    """The clock is invented: 16-row gates and 1-row up_down are fast, one config cannot run."""
    times = {}

    def clock(call):
        call()
        config = ran[-1]
        if len(times) == 3:
            times[config] = None
            raise RuntimeError("out of shared memory")
        times[config] = (
            10.0 - 3 * (config.gate.columns == 32) - 2 * (config.up_down.rows == 1) - config.up_down.programs / 10
        )
        return times[config] * layers

    ran = []
    plain, layers = dispatch.gated_mlp, 32

    def spy(*args, config):
        ran.append(config)
        return plain(*args, config=config) if len(ran) < 3 else None

    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "tuning.json"))
    monkeypatch.setattr(tuning, "_entries", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    monkeypatch.setattr(dispatch, "gated_mlp", spy)
    monkeypatch.setattr(autotune, "median_us", clock)
    monkeypatch.setattr(autotune, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(autotune, "device_facts", lambda device: (2, 99 << 10, False))
    config, us, default = autotune.tune(32, 48, torch.float32, 1, 0.5)
    found = {c: t for c, t in times.items() if t is not None}
    assert us == min(found.values())
    assert times[config] == us
    assert default == next(iter(times.values()))
    assert config.gate == min(found, key=found.get).gate
    entries = tuning._read()
    assert list(entries) == ["GPU X 32x48 float32 1 tokens k=0.5"]
    assert tuning._config(next(iter(entries.values()))) == config
