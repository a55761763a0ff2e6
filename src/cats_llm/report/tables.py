"""The tables of a report, for the page and as Markdown to paste."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from cats_llm.number_format import MISSING, change, number, percent
from cats_llm.report.bench import Bench, differ, facts, time_unit
from cats_llm.report.deltas import deltas, main_measures, measures
from cats_llm.report.inputs import ReportInputs
from cats_llm.report.labels import clean
from cats_llm.report.results import EvalResult
from cats_llm.report.training import TrainingRun

_TRAINING = (
    "setting",
    "learning rate",
    "steps",
    "perplexity before",
    "after",
    "change",
    "gate sparsity before",
    "after",
)
_NUMBERS = ("measure", "model", "value", "change to dense", "95 % interval", "p", "gate", "FFN", "model sparsity")


class TextTable(NamedTuple):
    """A table whose cells are text; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]]


def result_table(result: EvalResult) -> dict[str, Any]:
    """The tables of a model, as the page shows them.

    Returns:
        ``main``: the measures of the short table; ``lines``: its lines, a variant's deltas with None where a measure is
        missing, but one at least is there; ``all``: all measures with the deltas of all variants.
    """
    main = main_measures(result)
    by_variant = [{delta.variant.name: delta for delta in deltas(result, measure)} for measure in main]
    lines = [[by_name.get(variant.name) for by_name in by_variant] for variant in result.variants]
    every = [(measure, deltas(result, measure)) for measure in measures(result)]
    return {"label": result.label, "main": main, "lines": [line for line in lines if any(line)], "all": every}


def training_table(runs: Sequence[TrainingRun]) -> TextTable:
    """One line a run of fine-tuning."""
    several = len({run.group for run in runs}) > 1
    rows = [
        [
            run.name + (f", {run.group}" if several else ""),
            f"{run.learning_rate:g}",
            str(run.points[-1].step),
            number(run.points[0].perplexity, 5),
            number(run.points[-1].perplexity, 5),
            change(run.points[-1].perplexity, run.points[0].perplexity),
            percent(run.points[0].gate, 1),
            percent(run.points[-1].gate, 1),
        ]
        for run in runs
    ]
    return TextTable("Fine-tuning", _TRAINING, rows)


def bench_table(bench: Bench) -> TextTable:
    """One line a contestant and setting; without columns that say nothing."""
    settings = [name for name in ("shape", "dtype", "model") if differ(name, bench.rows)] + ["mode"]
    unit, factor = time_unit(bench.kind, bench.rows)
    baseline, ratio = (
        ("PyTorch", "speedup_over_torch") if bench.kind == "mlp" else ("stock transformers", "speedup_over_stock")
    )
    lines = []
    for row in bench.rows:
        threads, tokens, milliseconds = facts(bench.kind, row)
        low, median, high = (_time(factor * milliseconds[part]) for part in ("low", "median", "high"))
        lines.append(
            {
                "contestant": row["contestant"],
                **{name: str(row.get(name, MISSING)) for name in settings},
                "threads": MISSING if threads is None else str(threads),
                "tokens at a time": str(tokens),
                "tokens generated": str(row.get("tokens", MISSING)) if bench.kind == "decode" else MISSING,
                f"{unit} (quartiles)": f"{median} ({low} to {high})",
                "tokens/s": number(row.get("tokens_per_second"), 3),
                "GB/s": number(row.get("gb_per_s"), 3),
                f"times {baseline}": _median(row.get(ratio)),
                "times our k = 0": _median(row.get("speedup_over_own_dense")),
                "what the bytes allow": f"{row['byte_bound']:.2f}",
            }
        )
    columns = [column for column in lines[0] if any(line[column] != MISSING for line in lines)]
    rows = [[line[column] for column in columns] for line in lines]
    return TextTable(f"{bench.subject}, on {bench.place}", columns, rows)


def _time(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else number(value, 3)


def _median(ratio: object) -> str:
    value = ratio.get("median") if isinstance(ratio, dict) else None
    return f"{value:.2f}" if isinstance(value, (int, float)) and math.isfinite(value) else MISSING


def markdown(inputs: ReportInputs) -> str:
    """All tables, to paste into a README, an issue or a paper's draft."""
    parts = []
    for result in inputs.results:
        setting = ", ".join(result.facts[name] for name in ("dtype", "device") if name in result.facts)
        parts.append(f"**{_cell(result.label)}** ({_cell(setting)})\n")
        rows = [
            [
                measure.label,
                delta.variant.title,
                measure.value(delta.row.value),
                delta.change(),
                delta.interval(),
                delta.probability(),
                *(percent(share, 1) for share in vars(delta.row.sparsity).values()),
            ]
            for measure in measures(result)
            for delta in deltas(result, measure)
        ]
        parts.append(_table(_NUMBERS, rows, numbers_from=2))
    tables = [training_table(inputs.trainings)] if inputs.trainings else []
    for table in [*tables, *map(bench_table, inputs.benches)]:
        parts += [f"**{_cell(table.title)}**\n", _table(table.columns, table.rows, numbers_from=1)]
    return "\n".join(parts)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int) -> str:
    rule = ["---" if i < numbers_from else "---:" for i in range(len(columns))]
    lines = [columns, rule, *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    """Text that stays in its cell and is not taken for markup."""
    text = " ".join(clean(text).split())
    # a _ within a word and a < before a number are themselves
    return re.sub(r"([|\\`*\[]|<(?=[a-zA-Z/!?])|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9]))", r"\\\1", text) or MISSING
