"""The table and the figure of benchmarks/quality.py.

    PYTHONPATH=src python benchmarks/quality_table.py results/quality.json --table quality.md --figure quality.svg

Several files are joined, as of two runs with other tasks. Perplexity is shown as its increase over the dense model's,
with the paired 95 % interval and KL(dense || variant) in nats; the figure draws log-perplexity minus the dense model's.
`--brief FILE` writes a result without what each layer and each part of a task did, which is most of it.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from cats_llm.number_format import MISSING, percent, signed
from cats_llm.outputs import write_json

Row = dict[str, Any]


class Results:
    """The rows of result files by variant, task and metric."""

    def __init__(self, files: list[Path]) -> None:
        self.variants: dict[str, Row] = {}
        self.tasks: dict[str, Row] = {}
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.against: dict[tuple[str, str, str], Row] = {}
        for file in files:
            result = json.loads(file.read_text(encoding="utf-8"))
            self.variants |= {variant["name"]: variant for variant in result["variants"]}
            self.tasks |= {task["name"]: task for task in result["tasks"]}
            self.rows |= {(row["variant"], row["task"], row["metric"]): row for row in result["results"]}
            found = result.get("against_cats", [])
            self.against |= {(row["variant"], row["task"], row["metric"]): row for row in found}

    @property
    def texts(self) -> list[str]:
        """Their names."""
        return [name for name, task in self.tasks.items() if task["kind"] == "perplexity"]

    @property
    def scored(self) -> list[str]:
        """The tasks with accuracies, means first."""
        names = [name for name in self.tasks if ("dense", name, "acc") in self.rows]
        return sorted(names, key=lambda name: self.tasks[name]["kind"] != "mean")

    def skipped(self, variant: str) -> float:
        """The share of the bytes of all linear weights that a token does not read, on the first text or task."""
        if self.variants[variant].get("rounded"):
            return 0.5
        first = next(row for (name, *_), row in self.rows.items() if name == variant)
        share: float = first["sparsity"]["model"]
        return share

    def gate(self, variant: str) -> float | None:
        """The share of neurons skipped, on the same; None where inputs are skipped, or nothing."""
        first = next(row for (name, *_), row in self.rows.items() if name == variant)
        gate: float | None = first["sparsity"]["gate"]
        return gate or None

    def order(self) -> list[str]:
        """Variants by the bytes they skip, to a percent, within which the closest to dense come first."""
        text = self.texts[0] if self.texts else None

        def key(name: str) -> tuple[bool, bool, int, float]:
            variant, row = self.variants[name], self.rows.get((name, str(text), "perplexity"))
            asked = variant["equal_bytes"] or (variant["sparsity"] if variant["unit"] == "neurons" else None)
            place = round(100 * (asked or self.skipped(name)))
            value = row["value"] if row and row["value"] is not None else math.inf
            return name != "dense", not asked, place, value

        return sorted(self.variants, key=key)


def brief(file: Path) -> dict[str, Any]:
    """A result without its details by layer, linear layer and part of a task; `cats report` reads it as before."""
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    commands = result["command"] if isinstance(result["command"], list) else [result["command"]]
    # no path of the machine
    result["command"] = re.sub(r"/(?:[^\s/=,]+/)+", "", " && ".join(commands))
    details = ("thresholds", "layer_sparsity", "linear_thresholds", "linear_sparsity", "parts")
    result["variants"] = [{**v, **{key: type(v[key])() for key in details if v.get(key)}} for v in result["variants"]]
    result["results"] = [
        {**row, **{key: {} for key in details if key in row}}
        for row in result["results"]
        if row["metric"] not in ("word_perplexity", "byte_perplexity")
    ]
    doubled = ("word_perplexity", "byte_perplexity", "kl", "top1_agreement")
    result["against_cats"] = [row for row in result.get("against_cats", []) if row["metric"] not in doubled]
    return result


def increase(row: Row) -> str:
    """Of perplexity, with the interval."""
    value, difference = row["value"], row["difference"]
    if value is None:
        return "not finite"
    if difference is None:
        return f"{value:.2f}"
    dense = value - difference["value"]
    if value > 10 * dense:
        return f"x {value / dense:.3g}"
    low, high = (100 * difference[end] / dense for end in ("low", "high"))
    shown = 100 * difference["value"] / dense
    digits = 2 if abs(shown) < 3 else 1
    return f"{shown:+.{digits}f} % ({low:.{digits}f} to {high:.{digits}f})"


def accuracy(row: Row, against: Row | None) -> str:
    """In percent, with the difference to dense in points, and p to dense and to plain CATS."""
    text, difference = percent(row["value"], 1), row["difference"]
    if difference is None:
        return text
    text += f" ({signed(100 * difference['value'], 1)}, {probability(difference['p'])}"
    return text + (f"; CATS {probability(against['difference']['p'])}" if against else "") + ")"


def probability(p: float) -> str:
    """Of a test, as short as it may be."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def table(results: Results) -> str:
    """Markdown."""
    heads = [*(f"{text}" for text in results.texts), *results.scored]
    lines = [
        "| | gate sparsity | bytes skipped | " + " | ".join(heads) + " |",
        "|---|" + "---|" * (len(heads) + 2),
    ]
    for name in results.order():
        cells = [f"`{name}`", share(results.gate(name)), share(results.skipped(name) or None)]
        for task in results.texts:
            row = results.rows.get((name, task, "perplexity"))
            distance = results.rows.get((name, task, "kl"))
            kl = f"; {distance['value']:.3f}" if distance and distance["value"] is not None else ""
            cells.append(increase(row) + kl if row else MISSING)
        for task in results.scored:
            row = results.rows.get((name, task, "acc"))
            mean = results.tasks[task]["kind"] == "mean" or len(results.scored) == 1
            against = results.against.get((name, task, "acc")) if mean else None
            cells.append(accuracy(row, against) if row else MISSING)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def share(value: float | None) -> str:
    """A share in percent."""
    return MISSING if value is None else percent(value, 1)


def figure(results: Results, methods: list[str]) -> Any:
    """The increase of log-perplexity over the bytes skipped: a line a method, a panel a text, a log scale."""
    from cats_llm.report import style

    lines: dict[str, list[str]] = {}
    for name, variant in results.variants.items():
        method = "dense int8" if variant.get("rounded") else variant["method"]
        sources = {v.get("source") for v in results.variants.values() if v["method"] == variant["method"]}
        title = f"{method}, {variant['source']}" if len(sources) > 1 else method
        if name != "dense" and not variant.get("draw") and (not methods or method in methods):
            lines.setdefault(title, []).append(name)
    looks = style.looks(list(lines))
    skipped = [results.skipped(name) for names in lines.values() for name in names]
    most = 10 * math.floor(10 * max(skipped, default=0) + 1)  # the next ten above
    with style.style():
        drawn, panels = style.panels(len(results.texts), 3, True, height=3.2)
        for axes, text in zip(panels, results.texts, strict=True):
            dense, heights = results.rows["dense", text, "perplexity"]["value"], []
            for title, names in lines.items():
                rows = [(results.skipped(name), results.rows.get((name, text, "perplexity"))) for name in names]
                # what is no worse than dense has no place on a logarithmic axis
                points = sorted(
                    (100 * x, math.log(r["value"] / dense)) for x, r in rows if r and (r["value"] or 0) > dense
                )
                axes.plot([x for x, _ in points], [y for _, y in points], **looks[title].marked, clip_on=False)
                heights += [y for _, y in points]
            axes.set_title(text)
            axes.set_xlim(0, most)
            axes.set_xticks(range(0, most + 1, 10))
            style.value_axis(axes, heights, from_zero=False)
        drawn.supxlabel("bytes of the decoder layers' linear weights that a token does not read, %", fontsize=9)
        drawn.supylabel("increase of log-perplexity, nats a token", fontsize=9)
        style.legend(drawn, {title: look.marked for title, look in looks.items()})
    return drawn


def main(words: list[str] | None = None) -> None:
    """Read, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="quality.json")
    parser.add_argument("--table", type=Path, help="Markdown; default: on stdout")
    parser.add_argument("--figure", type=Path, help=".svg or .png")
    parser.add_argument("--methods", default="", help="only these in the figure, separated by commas")
    parser.add_argument("--brief", type=Path, help=".json")
    args = parser.parse_args(words)
    results = Results(args.results)
    if args.table:
        args.table.write_text(table(results), encoding="utf-8")
    else:
        print(table(results), end="")
    if args.brief:
        write_json(args.brief, brief(args.results[0]), force=True)
    if args.figure:
        from cats_llm.report.style import style

        drawn = figure(results, [name for name in args.methods.split(",") if name])
        with style(**{"svg.fonttype": "none", "svg.hashsalt": "quality"}):  # equal results are equal files
            drawn.savefig(args.figure, metadata={"Date": None} if args.figure.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
