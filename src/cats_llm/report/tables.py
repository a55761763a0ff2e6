"""The tables of a report of result files, for the page and as Markdown to paste."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

from cats_llm.report import bench as benches
from cats_llm.report import training
from cats_llm.report.costs import DISTANCES, Cost, Measure, costs, main_measures, table_costs
from cats_llm.report.results import DENSE, EvalResult, EvalRow
from cats_llm.report.wording import MISSING, clean, number, percent, signed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cats_llm.report.bench import Bench
    from cats_llm.report.collection import Collection


class Line(NamedTuple):
    """A variant in the short table: what was skipped on the first measure's data, and a cost a measure."""

    name: str
    row: EvalRow
    costs: list[Cost | None]


class ResultTable(NamedTuple):
    """A model's tables: the short one with the main measures, and all measures with all variants."""

    label: str
    measures: list[Measure]
    lines: list[Line]
    all: list[tuple[Measure, list[Cost]]]


class BenchTable(NamedTuple):
    """A benchmark's table, as text."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def result_table(result: EvalResult) -> ResultTable:
    """The tables of a model."""
    main = main_measures(result)
    found = [{cost.variant.name: cost for cost in costs(result, measure)} for measure in main]
    lines = []
    for variant in result.variants:
        of = [by_name.get(variant.name) for by_name in found]
        first = next((cost for cost in of if cost is not None), None)
        if first is not None:
            lines.append(Line(variant.title, first.row, of))
    return ResultTable(result.label, main, lines, list(table_costs(result)))


def change_of(cost: Cost) -> str:
    """The change to dense; for what is no share, in percent of the dense value too."""
    value, base = cost.row.value, cost.dense.value if cost.dense is not None else None
    if cost.variant.name == DENSE or cost.measure.metric in DISTANCES or value is None or base is None:
        return MISSING
    text = cost.measure.change(value - base)
    return text if cost.measure.share or base <= 0 else f"{text} ({signed(100 * (value / base - 1), 1)} %)"


def probability(cost: Cost) -> str:
    """The p of the paired test."""
    p = cost.row.difference.p if cost.row.difference is not None else None
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def bench_table(bench: Bench) -> BenchTable:
    """One line a contestant and setting; without columns that say nothing."""
    settings = [name for name in ("shape", "dtype", "model") if benches.several(name, bench.rows)] + ["mode"]
    unit, factor = benches.time_unit(bench.kind, bench.rows)
    columns = ["contestant", *settings, "threads", "tokens at a time", "tokens generated"]
    columns += [f"{unit} (quartiles)", "tokens/s", "GB/s"]
    columns += ["times its rival", "times our k = 0", "what the bytes allow"]
    rows = []
    for row in bench.rows:
        threads, tokens, spread = benches.facts(bench.kind, row)
        rival = row.get("speedup_over_torch") or row.get("speedup_over_stock")
        rows.append(
            [
                row["contestant"],
                *(str(row.get(name, MISSING)) for name in settings),
                MISSING if threads is None else str(threads),
                str(tokens),
                str(row.get("tokens", MISSING)) if bench.kind == "decode" else MISSING,
                _quartiles(spread, factor),
                number(row.get("tokens_per_second"), 3),
                number(row.get("gb_per_s"), 3),
                _median(rival),
                _median(row.get("speedup_over_own_dense")),
                f"{row['byte_bound']:.2f}",
            ]
        )
    kept = [i for i in range(len(columns)) if any(row[i] != MISSING for row in rows)]
    rival_name = "PyTorch" if bench.kind == "mlp" else "stock transformers"
    named = [column.replace("its rival", rival_name) for column in columns]
    return BenchTable(
        f"{bench.subject}, on {bench.place}", [named[i] for i in kept], [[row[i] for i in kept] for row in rows]
    )


def _quartiles(spread: Mapping[str, float], factor: float) -> str:
    low, median, high = (
        f"{value:.2f}" if value >= 1 else number(value, 3)
        for value in (factor * spread[part] for part in ("low", "median", "high"))
    )
    return f"{median} ({low} to {high})"


def _median(spread: object) -> str:
    value = spread.get("median") if isinstance(spread, dict) else None
    return f"{value:.2f}" if isinstance(value, (int, float)) and math.isfinite(value) else MISSING


def markdown(collection: Collection) -> str:
    """All tables, to paste into a README, an issue or a paper's draft."""
    parts = []
    for result in collection.results:
        parts.append(f"**{_cell(result.label)}** ({_cell(', '.join(filter(None, (result.dtype, result.device))))})\n")
        parts.append(
            _table(
                ["measure", "model", "value", "change to dense", "95 % interval", "p", "gate", "FFN", "model sparsity"],
                (
                    [
                        cost.measure.label,
                        cost.variant.title,
                        cost.measure.value(cost.row.value),
                        change_of(cost),
                        cost.interval(),
                        probability(cost),
                        *(percent(share) for share in (cost.row.gate, cost.row.ffn, cost.row.model)),
                    ]
                    for _, found in table_costs(result)
                    for cost in found
                ),
                numbers_from=2,
            )
        )
    if collection.trainings:
        parts.append("**Fine-tuning**\n")
        parts.append(_table(training.COLUMNS, training.rows(collection.trainings), numbers_from=1))
    for bench in collection.benches:
        table = bench_table(bench)
        parts.append(f"**{_cell(table.title)}**\n")
        parts.append(_table(table.columns, table.rows, numbers_from=1))
    return "\n".join(parts)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int) -> str:
    rule = ["---" if i < numbers_from else "---:" for i in range(len(columns))]
    lines = [columns, rule, *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    """Text that stays in its cell and is not taken for markup."""
    text = " ".join(clean(text).replace("\N{NO-BREAK SPACE}", " ").split())
    # a _ within a word and a < before a number are themselves
    return re.sub(r"([|\\`*\[]|<(?=[a-zA-Z/!?])|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9]))", r"\\\1", text) or MISSING
