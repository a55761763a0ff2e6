"""The page about any mix of result files, and its figures as files."""

import re
from importlib.resources import files
from pathlib import Path

from cats_llm.number_format import known, number, percent, target
from cats_llm.outputs import write_folder
from cats_llm.report import bench, bench_figures, tables, training
from cats_llm.report.deltas import findings
from cats_llm.report.inputs import SPARSITIES, ReportInputs
from cats_llm.report.labels import clean, short_name
from cats_llm.report.optional_dependency import require_extra
from cats_llm.report.page_figure import PageFigure
from cats_llm.report.results import EvalResult, EvalTask

# where a line must not break
_UNIT = re.compile(r"(?<=\d) (?=%|×|points?\b)|(?<=×) (?=\d)")


def render_page(inputs: ReportInputs) -> str:
    """The report as one HTML document: no scripts, no external resources, the same text for equal input.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    require_extra()
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    from cats_llm.report.svg import inline_svg

    environment = Environment(
        loader=FunctionLoader(lambda name: files(__package__).joinpath("templates", name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # whatever was escaped already is ours
        finalize=lambda value: clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters.update(number=number, percent=percent)
    pictures = [
        {
            "title": figure.title,
            "captions": figure.captions,
            "wide": Markup(inline_svg(figure.draw(wide=True), f"{figure.name}-wide", figure.title)),
            "narrow": Markup(inline_svg(figure.draw(wide=False), f"{figure.name}-narrow", figure.title)),
        }
        for figure in page_figures(inputs)
    ]
    text_tables = {"Fine-tuning": [tables.training_table(inputs.trainings)] if inputs.trainings else []}
    text_tables["Speed"] = [tables.bench_table(bench) for bench in inputs.benches]
    return environment.get_template("page.html").render(
        title=title(inputs),
        findings=[_UNIT.sub("\N{NO-BREAK SPACE}", sentence) for sentence in headline(inputs)],
        results=[tables.result_table(result) for result in inputs.results],
        text_tables=text_tables,
        pictures=pictures,
        continuations=[(result.label, *_continuations(result)) for result in inputs.results if result.continuations],
        commands=_commands(inputs),
        facts=_facts(inputs),
        known=known,
    )


def page_figures(inputs: ReportInputs) -> list[PageFigure]:
    """The figures for which there is data, in the order of the page."""
    # here, since they need matplotlib
    from cats_llm.report import quality_figures, threshold_figures

    return [
        *quality_figures.figures(inputs.results),
        *training.figures(inputs.trainings),
        *threshold_figures.figures(inputs.profiles, inputs.results),
        *bench_figures.figures(inputs.benches),
    ]


def write_figures(inputs: ReportInputs, folder: Path, force: bool = False) -> None:
    """Write each figure as .svg and .png into a new folder.

    Raises:
        CatsError: the folder exists and ``force`` is False, or it cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    require_extra()
    from cats_llm.report.style import style

    with write_folder(folder, force) as temporary, style():
        for figure in page_figures(inputs):
            for ending, metadata in (("svg", {"Date": None}), ("png", None)):
                path = temporary / f"{figure.name}.{ending}"
                figure.draw(wide=True).savefig(path, dpi=150, metadata=metadata)


def title(inputs: ReportInputs) -> str:
    """What the report is about."""
    labels = [result.label for result in inputs.results] or [profile.label for profile in inputs.profiles]
    names = list(dict.fromkeys(labels or [short_name(run.model) for run in inputs.trainings]))
    if not names:
        return "CATS: speed"
    return f"CATS on {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def headline(inputs: ReportInputs) -> list[str]:
    """The main sentences: quality first, then speed; about thresholds only where there is nothing else."""
    sentences = findings(inputs.results)
    sentences += [training.finding(inputs.trainings)] if inputs.trainings else []
    sentences += [sentence for table in inputs.benches for sentence in bench.finding(table)]
    return sentences or [
        f"The thresholds of {profile.label} for gate sparsities of {', '.join(map(target, SPARSITIES))}; what they "
        "cost is not in these files (cats eval measures it)."
        for profile in inputs.profiles
    ]


def _continuations(result: EvalResult) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The variants that wrote some, and the prompts with what they wrote."""
    wrote = {name for texts in result.continuations.values() for name in texts}
    return [variant.name for variant in result.variants if variant.name in wrote], result.continuations


def _commands(inputs: ReportInputs) -> list[str]:
    commands = [command for result in inputs.results for command in result.commands]
    return list(dict.fromkeys([*commands, *(run.command for run in inputs.trainings if run.command)]))


def _facts(inputs: ReportInputs) -> list[tuple[str, dict[str, str]]]:
    """Groups of facts: title, and label to value."""
    groups = []
    for result in inputs.results:
        groups.append((f"Evaluation of {result.label}", result.facts | result.versions))
        groups.append((f"Data for {result.label}", {task.name: _data(task) for task in result.tasks}))
    groups += [(f"Calibration of {profile.label}", profile.facts) for profile in inputs.profiles]
    groups.append(("Held-out text of fine-tuning", {f"{r.name}, {r.group}": r.heldout for r in inputs.trainings}))
    for table in inputs.benches:
        machine = {name: str(v) for name, v in table.machine.items() if isinstance(v, (str, int, float))}
        if isinstance(gpus := table.machine.get("gpus"), list) and gpus:
            machine["gpus"] = ", ".join(map(str, gpus))
        groups.append((f"Machine of {table.name}", machine))
    groups.append(("Files", dict.fromkeys(inputs.files, "read")))
    return [(name, facts) for name, facts in groups if facts]


def _data(task: EvalTask) -> str:
    unit = "windows" if task.kind == "perplexity" else "documents"
    documents = f"{task.documents} {unit}" if task.documents else ""
    tokens = f"{task.tokens:,} tokens predicted" if task.tokens else ""
    return ", ".join(filter(None, (task.data, documents, tokens)))
