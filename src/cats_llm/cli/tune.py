"""`cats tune`: measure how the GPU kernels are best cut for a model on this GPU."""

from typing import Annotated, Any

import torch
import typer

from cats_llm.benchmark.shapes import SHAPES, parse_shape
from cats_llm.cli import options
from cats_llm.cli.output import quiet_libraries, show, table, track
from cats_llm.errors import CatsError
from cats_llm.kernels import gpu
from cats_llm.loading import load_skeleton
from cats_llm.model.structure import find_gated_mlps


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A folder or name; or pass --shape.", show_default=False)
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="NAME|D,F", help=f"{', '.join(SHAPES)}, or hidden and intermediate size."),
    ] = None,
    dtype: options.Dtype = "bfloat16",
    sparsity: Annotated[str, typer.Option(help="Gate sparsities, separated by commas.")] = "0,0.5,0.7,0.9",
    batch: Annotated[str, typer.Option(help="Tokens at a time, separated by commas; 1 to 16.")] = "1",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Find the fastest cut of the GPU kernels for a model's MLPs, and keep it for later runs on this GPU.

    The defaults were measured on an H200; other GPUs may gain. What is found is kept in the user's cache folder, by
    GPU, shape, dtype, batch and sparsity (CATS_GPU_TUNING names another file, or "off").

    Example: **cats tune --shape mistral-7b --sparsity 0.5**
    """
    if (model is None) == (shape is None):
        raise typer.BadParameter("pass either MODEL or --shape.")
    ks = [options.parse_sparsity(part) for part in sparsity.split(",")]
    batches = options.whole_numbers(batch, "--batch")
    if max(batches) > 16:
        raise typer.BadParameter("--batch goes up to 16; more tokens than that use dense products.")
    if not gpu.BACKEND.available():
        raise CatsError("there is no NVIDIA GPU with Triton here, so there is nothing to tune.")
    from cats_llm.kernels.gpu import autotune, tuning

    quiet_libraries()
    if shape is not None:
        sizes = [(parse_shape(shape).hidden_size, parse_shape(shape).intermediate_size)]
    else:
        skeleton = load_skeleton(str(model), revision, trust_remote_code)
        sizes = list(dict.fromkeys((mlp.hidden_size, mlp.intermediate_size) for mlp in find_gated_mlps(skeleton)))
    torch_dtype: Any = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    shown = table("hidden x intermediate", "batch", "sparsity", "us by default", "us tuned", "x")
    cases = [(d, f, tokens, k) for d, f in sizes for tokens in batches for k in ks]
    for d, f, tokens, k in track(cases, "tuning", len(cases)):
        _, us, default = autotune.tune(d, f, torch_dtype, tokens, k)
        shown.add_row(f"{d} x {f}", str(tokens), f"{k}", f"{default:.1f}", f"{us:.1f}", f"{default / us:.2f}")
    show(shown)
    show(f"kept in {tuning.path() or 'this process only (CATS_GPU_TUNING is off)'}")
