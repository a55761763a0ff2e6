"""`cats densify`: the dense model's folder from a CATS checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from cats_llm.checkpoint.write import write_dense_checkpoint
from cats_llm.cli.output import Results, quiet_libraries, show, show_left_out
from cats_llm.loading import checkpoint_folder
from cats_llm.number_format import size


def command(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CKPT", help="A CATS checkpoint: a folder, or a name on the hub.", show_default=False),
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
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a model on the hub.", show_default=False)
    ] = None,
) -> None:
    """Write the dense model of a CATS checkpoint, for programs that know nothing of CATS.

    The files are the same to the byte, config.json loses its quantization_config, and cats.safetensors stays away. A
    model whose activation is ReLU (cats finetune --method relu) stays one.

    Example: **cats densify mistral-cats50 mistral-again --link**
    """
    results.check(out)
    quiet_libraries()
    written = write_dense_checkpoint(checkpoint_folder(checkpoint, revision), out, results.force, link)
    results.write({"out": str(out), **vars(written)})
    show_left_out(written.left_out)
    how = "linked" if written.linked else "not linked, since the disk refuses: copied" if link else "copied"
    total = size(sum(written.weights.values()))
    show(f"{out}: the dense model, its weights ({total}) {how}")
