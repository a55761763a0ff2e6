"""`cats densify`: the dense model's folder from a CATS checkpoint, or from a GGUF file."""

from pathlib import Path
from typing import Annotated

import typer

from cats_llm.checkpoint.write import write_dense_checkpoint
from cats_llm.cli.output import Results, quiet_libraries, show, show_left_out
from cats_llm.conversion import convert_gguf
from cats_llm.dtypes import DTYPE_NAMES
from cats_llm.errors import UsageError
from cats_llm.loading import checkpoint_folder, gguf_file, parse_dtype
from cats_llm.number_format import size


def command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            help="A CATS checkpoint (a folder, or a name on the hub), or a GGUF file.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    results: Results,
    link: Annotated[
        bool,
        typer.Option(
            "--link",
            help="Link the weight files instead of copying them: no time and no space, but a program that writes into "
            "a file in place changes both models.",
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Of a GGUF file's weights: {', '.join(DTYPE_NAMES)}. Default: its own, bfloat16 if quantised.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a model on the hub.", show_default=False)
    ] = None,
) -> None:
    """Write the dense model of a CATS checkpoint or of a GGUF file, for programs that know neither.

    Of a CATS checkpoint the files are the same to the byte, config.json loses its quantization_config, and
    cats.safetensors stays away. A model whose activation is ReLU (cats finetune --method relu) stays one. Of a GGUF
    file the weights are dequantised, and the tokenizer and its chat template are written beside them.

    Example: **cats densify mistral-cats50 mistral-again --link**, **cats densify model.Q4_K_M.gguf model**
    """
    results.check(out)
    quiet_libraries()
    if gguf_file(checkpoint) is not None:
        if link:
            raise UsageError(
                "--link is for CATS checkpoints; the weights of a GGUF file are dequantised into new files."
            )
        written = convert_gguf(checkpoint, out, parse_dtype(dtype or "auto"), results.force)
        results.write({"out": str(out), **vars(written)})
        show(f"{out}: the dense model, its weights ({size(sum(written.weights.values()))}) dequantised")
        return
    if dtype is not None:
        raise UsageError("--dtype is for GGUF files; the weights of a CATS checkpoint stay as they are.")
    written = write_dense_checkpoint(checkpoint_folder(checkpoint, revision), out, results.force, link)
    results.write({"out": str(out), **vars(written)})
    show_left_out(written.left_out)
    how = "linked" if written.linked else "not linked, since the disk refuses: copied" if link else "copied"
    total = size(sum(written.weights.values()))
    show(f"{out}: the dense model, its weights ({total}) {how}")
