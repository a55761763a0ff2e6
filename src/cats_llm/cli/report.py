"""`cats report`: result files of other commands as one page, figures and tables."""

from pathlib import Path
from typing import Annotated

import typer

from cats_llm.cli.output import Results, show
from cats_llm.cli.signature import Change
from cats_llm.outputs import write_file
from cats_llm.report import markdown, read_files, render_page, require_extra, write_figures
from cats_llm.report.page import headline

_STDOUT = Path("-")


def command(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT",
            help="Files of cats eval, cats calibrate, cats bench, cats finetune (finetune.json) and benchmarks/*.py.",
            show_default=False,
        ),
    ],
    outputs: Annotated[Results, Change(without=("json",))],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write each figure as .svg and .png into this folder.", show_default=False),
    ] = None,
    markdown_file: Annotated[
        Path | None,
        typer.Option(
            "--markdown",
            metavar="FILE",
            help="Write the tables as Markdown; - prints them, and nothing else, on stdout.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what sparsity costs and gains: one page with figures and tables from any mix of result files.

    Takes results of `cats eval` and `cats bench` (`--json`), logs of `cats finetune` (OUT/finetune.json), files of
    benchmarks/gpu.py and benchmarks/finetune.py, and calibration profiles. Results of one model are joined; several
    models stand side by side, as before and after fine-tuning.

    Example: **cats report mistral.json mistral.safetensors decode.json -o mistral.html --figures figures**
    """
    outputs.check(output, figures, None if markdown_file == _STDOUT else markdown_file)
    require_extra()
    inputs = read_files(results)
    document, tables = render_page(inputs), markdown(inputs)
    with write_file(output, outputs.force) as temporary:
        temporary.write_text(document, encoding="utf-8", errors="backslashreplace")
    if figures is not None:
        write_figures(inputs, figures, outputs.force)
    if markdown_file == _STDOUT:
        print(tables, end="")
        return
    if markdown_file is not None:
        with write_file(markdown_file, outputs.force) as temporary:
            temporary.write_text(tables, encoding="utf-8", errors="backslashreplace")
    for sentence in headline(inputs):
        show(sentence)
    written = [str(path) for path in (output, figures, markdown_file) if path is not None]
    show(f"Written: {', '.join(written)}")
