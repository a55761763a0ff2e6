"""`cats report`: result files of other commands as one page, figures and tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cats_llm.calibration.profile import Profile
from cats_llm.cli import options
from cats_llm.cli.output import show
from cats_llm.errors import CatsError
from cats_llm.outputs import check_output, write_file
from cats_llm.report import page
from cats_llm.report.bench import is_bench, read_bench
from cats_llm.report.collection import Collection, ProfileData
from cats_llm.report.data import LayerDistribution
from cats_llm.report.extra import require_extra
from cats_llm.report.results import is_eval, read_eval
from cats_llm.report.tables import markdown
from cats_llm.report.training import is_training, read_training
from cats_llm.report.wording import short_name

# what profiles show where nothing was evaluated: the paper's
SPARSITIES = (0.5, 0.7, 0.9)
_STDOUT = Path("-")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(name="report")(command)


def command(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT",
            help="Files of cats eval, cats calibrate, cats bench, cats finetune (finetune.json) and benchmarks/*.py.",
            show_default=False,
        ),
    ],
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
    force: options.Force = False,
) -> None:
    """Show what sparsity costs and gains: one page with figures and tables from any mix of result files.

    Takes results of `cats eval` and `cats bench` (`--json`), logs of `cats finetune` (OUT/finetune.json), files of
    benchmarks/gpu.py and benchmarks/finetune.py, and calibration profiles. Results of one model are joined; several
    models stand side by side, as before and after fine-tuning.

    Example: **cats report mistral.json mistral.safetensors decode.json -o mistral.html --figures figures**
    """
    for path in (output, figures, markdown_file):
        if path is not None and path != _STDOUT:
            check_output(path, force)
    try:
        require_extra()
    except ImportError as error:
        raise CatsError(str(error)) from error
    collection = read(results)
    document = page.render_page(collection)
    tables = markdown(collection)
    with write_file(output, force) as temporary:
        temporary.write_text(document, encoding="utf-8", errors="backslashreplace")
    if figures is not None:
        page.write_figures(collection, figures, force)
    if markdown_file == _STDOUT:
        print(tables, end="")
        return
    if markdown_file is not None:
        with write_file(markdown_file, force) as temporary:
            temporary.write_text(tables, encoding="utf-8", errors="backslashreplace")
    for sentence in page.headline(collection):
        show(_plain(sentence))
    written = [str(path) for path in (output, figures, markdown_file) if path is not None]
    show(f"Written: {', '.join(written)}")


def read(paths: Sequence[Path]) -> Collection:
    """Result files of any kind, by their content.

    Raises:
        CatsError: a file is missing, damaged, or of no kind that is known.
    """
    results, profiles, benches, trainings = [], [], [], []
    for path in dict.fromkeys(paths):
        if path.suffix == ".safetensors":
            profiles.append(profile_data(Profile.load(path)))
            continue
        values = _json(path)
        if is_eval(values):
            results.append((path, read_eval(values, path)))
        elif is_bench(values):
            benches += read_bench(values, path)
        elif is_training(values):
            trainings += read_training(values, path)
        else:
            raise CatsError(
                f"{path} is JSON, but no result of cats eval, cats bench or cats finetune, which is what cats report "
                "reads beside calibration profiles (.safetensors)."
            )
    return Collection.of(results, profiles, benches, [path.name for path in dict.fromkeys(paths)], trainings)


def profile_data(profile: Profile) -> ProfileData:
    """A profile as plain data, with thresholds at the paper's sparsities."""
    record = profile.record
    facts = {str(k): str(v) for k, v in record.items() if isinstance(v, (str, int, float))}
    configs = {f"cats k={k:g}": profile.config(k) for k in SPARSITIES}
    distributions = [
        LayerDistribution(layer, found.edges.tolist(), found.counts.tolist(), found.maximum)
        for layer, found in profile.layers.items()
    ]
    name = short_name(str(record.get("model") or "a model"))
    variants = {label: (config.sparsity, config.thresholds) for label, config in configs.items()}
    return ProfileData(name, facts, distributions, variants)


def _json(path: Path) -> Any:
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise CatsError(f"{path} {what}; give result files of cats eval, cats bench or cats calibrate.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CatsError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CatsError(
            f"{path} is not JSON, or it is damaged; give result files (.json) of cats eval or cats bench, or "
            "calibration profiles (.safetensors)."
        ) from error


def _plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")
