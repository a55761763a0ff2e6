"""`cats tune`: measure which launch configs of the GPU kernels are best for a model on this GPU."""

import itertools

from cats_llm.benchmark.config import TuneConfig
from cats_llm.cli.output import quiet_libraries, show, table, track
from cats_llm.errors import CatsError
from cats_llm.kernels import gpu


def command(config: TuneConfig) -> None:
    """Find the fastest launch configs of the GPU kernels for a model's MLPs, and keep them for later runs on this GPU.

    The defaults were measured on an H200; other GPUs may gain. What is found is kept in the user's cache folder, by
    GPU, shape, dtype, batch and sparsity (CATS_GPU_TUNING names another file, or "off").

    Example: **cats tune --shape mistral-7b --sparsity 0.5**
    """
    if not gpu.BACKEND.available():
        raise CatsError("there is no NVIDIA GPU with Triton here, so there is nothing to tune.")
    from cats_llm.benchmark import autotune
    from cats_llm.kernels.gpu import tuning

    quiet_libraries()
    shown = table("hidden x intermediate", "batch", "sparsity", "us by default", "us tuned", "x")
    cases = list(itertools.product(config.sizes(), config.batches, config.sparsities))
    for (d, f), tokens, k in track(cases, "tuning", len(cases)):
        _, us, default = autotune.tune(d, f, config.torch_dtype, tokens, k)
        shown.add_row(f"{d} x {f}", str(tokens), f"{k}", f"{default:.1f}", f"{us:.1f}", f"{default / us:.2f}")
    show(shown)
    show(f"kept in {tuning.path() or 'this process only (CATS_GPU_TUNING is off)'}")
