"""The page about any mix of result files, and its figures as files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cats_llm.outputs import write_folder
from cats_llm.report import tables, training
from cats_llm.report.bench import Bench, facts, sparsity
from cats_llm.report.collection import Collection, drawings
from cats_llm.report.costs import findings
from cats_llm.report.extra import require_extra
from cats_llm.report.html import picture, render
from cats_llm.report.wording import number, short_name, target

if TYPE_CHECKING:
    from pathlib import Path


_CAUTION = (
    "One kind of data says little about another: studies that build on CATS find that summaries and chat survive "
    "sparsity and that mathematics breaks first."
)


def render_page(collection: Collection) -> str:
    """The report as one HTML document: no scripts, no external resources, the same text for equal input.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    require_extra()
    return render(
        "results.html",
        title=title(collection),
        findings=headline(collection),
        tables=[tables.result_table(result) for result in collection.results],
        benches=[tables.bench_table(bench) for bench in collection.benches],
        training_columns=training.COLUMNS,
        trainings=training.rows(collection.trainings),
        pictures=[picture(d.name, d.title, d.captions, d.draw) for d in drawings(collection)],
        commands=_commands(collection),
        facts=_facts(collection),
        change_of=tables.change_of,
        probability=tables.probability,
        caution=_CAUTION,
    )


def write_figures(collection: Collection, folder: Path, force: bool = False) -> list[str]:
    """Write each figure as .svg and .png into a new folder, and return the files' names.

    Raises:
        CatsError: the folder exists and ``force`` is False, or it cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    require_extra()
    from cats_llm.report.drawing import style

    names = []
    with write_folder(folder, force) as temporary:
        for drawing in drawings(collection):
            for ending in ("svg", "png"):
                names.append(f"{drawing.name}.{ending}")
                metadata = {"Date": None} if ending == "svg" else None
                with style():
                    drawing.draw(wide=True).savefig(temporary / names[-1], dpi=150, metadata=metadata)
    return names


def title(collection: Collection) -> str:
    """What the report is about."""
    labels = [result.label for result in collection.results] or [profile.label for profile in collection.profiles]
    labels = labels or [short_name(run.model) for run in collection.trainings]
    named = list(dict.fromkeys(labels))
    if not named:
        return "CATS: speed"
    shown = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
    return f"CATS on {shown}"


def headline(collection: Collection) -> list[str]:
    """The main sentences: quality first, then speed; about thresholds only where there is nothing else."""
    said = findings(collection.results)
    said += [training.finding(collection.trainings)] if collection.trainings else []
    said += [sentence for bench in collection.benches for sentence in _speed(bench)]
    if not said:
        said = [
            f"The thresholds of {profile.label} for gate sparsities of "
            f"{', '.join(target(k) for k, _ in profile.variants.values() if k is not None)}; what they cost is not in "
            "these files (cats eval measures it)."
            for profile in collection.profiles
        ]
    return said


def _commands(collection: Collection) -> list[str]:
    found = [command for result in collection.results for command in result.commands]
    return list(dict.fromkeys([*found, *(run.command for run in collection.trainings if run.command)]))


def _speed(bench: Bench) -> list[str]:
    """The speed-up at the sparsity nearest to a half, one token at a time, on the fewest threads that were tried."""
    found = []
    for row in bench.rows:
        threads, tokens, spread = facts(bench.kind, row)
        k = sparsity(row)
        if k:
            found.append(((tokens, threads or 0, abs(k - 0.5)), k, row, spread))
    if not found:
        return []
    (tokens, threads, _), k, row, spread = min(found, key=lambda item: item[0])
    parts = []
    for key, rival in (
        ("speedup_over_torch", "PyTorch"),
        ("speedup_over_stock", "stock transformers"),
        ("speedup_over_own_dense", "our own kernels without sparsity"),
    ):
        if row.get(key):
            parts.append(f"{row[key]['median']:.2f} times as fast as {rival}")
    step = "one token" if tokens == 1 else "one step"
    model = ", ".join(filter(None, (bench.model, row.get("mode"))))
    what = f"one MLP of {row.get('shape')}" if bench.kind == "mlp" else f"{step} ({model})"
    what += f" with {tokens} tokens at a time" if tokens > 1 else ""
    where = f"{threads} thread{'s' * (threads > 1)} of {bench.place}" if threads else bench.place
    return [
        f"At {target(k)} gate sparsity {what} takes "
        f"{number(spread['median'], 3)} ms on {where}"
        + (f", {' and '.join(parts)}" if parts else "")
        + f" (its bytes allow {row['byte_bound']:.2f} times)."
    ]


def _facts(collection: Collection) -> list[tuple[str, dict[str, str]]]:
    groups = []
    for result in collection.results:
        what = {"model": result.model, "dtype": result.dtype, "device": result.device, "made": result.created}
        groups.append((f"Evaluation of {result.label}", {k: v for k, v in what.items() if v} | result.versions))
        data = {task.name: _data(task.data, task.documents) for task in result.tasks}
        groups.append((f"Data for {result.label}", data))
    heldout = {f"{run.name}, {run.group}": run.heldout for run in collection.trainings}
    groups += [("Held-out text of fine-tuning", heldout)] if heldout else []
    groups += [(f"Calibration of {profile.label}", profile.facts) for profile in collection.profiles]
    for bench in collection.benches:
        machine = {k: str(v) for k, v in bench.machine.items() if isinstance(v, (str, int, float))}
        if isinstance(gpus := bench.machine.get("gpus"), list) and gpus:
            machine["gpus"] = ", ".join(map(str, gpus))
        groups.append((f"Machine of {bench.name}", machine))
    groups.append(("Files", dict.fromkeys(collection.files, "read")))
    return groups


def _data(source: str, documents: int | None) -> str:
    return f"{source}, {documents} documents" if documents else source
