"""All runs of a folder in one file, with paired tests between them; as a table, and as a figure."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_runs import SEARCH, Run

from cats_llm import formats
from cats_llm.errors import CatsError
from cats_llm.evaluation.paired import paired_difference
from cats_llm.evaluation.scoring import exp
from cats_llm.evaluation.task import Metric
from cats_llm.outputs import write_file, write_json
from cats_llm.report.training import curves, read_training

# steps of a run that the merged file keeps
_STEPS = 40
_ORDER = ("dense", "cats", "relu")


def summarise(out: Path) -> None:
    """Write OUT/finetune.json, OUT/finetune.md and, if it can be drawn, OUT/finetune.svg.

    Raises:
        CatsError: there is no run.
    """
    logs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((out / "runs").glob("*.json"))]
    logs.sort(key=_place)
    finished = [log for log in logs if log["group"] != SEARCH]
    if not logs:
        raise CatsError(f"{out / 'runs'} holds no run; begin with --group {SEARCH}.")
    base = _base(out, logs)
    results = {
        "format": formats.FINETUNING_RUNS,
        "version": formats.FINETUNING_VERSION,
        "model": base["model"],
        "dtype": base["dtype"],
        "data": base["data"],
        "machine": base["machine"],
        "dense": {name: base["texts"].get(name, {}).get("perplexity") for log in finished[:1] for name in log["after"]},
        "search": [
            {
                "name": log["name"],
                **{key: log["run"][key] for key in ("parameters", "loss", "criterion", "learning_rate", "seed")},
                "steps": log["settings"]["steps"],
                "validation_perplexity": log["validation"]["perplexity"],
            }
            for log in logs
            if log["group"] == SEARCH
        ],
        "runs": [_shown(log, log["name"] + _differences(log, finished)) for log in finished],
        "comparisons": [comparison for log in finished for comparison in _comparisons(log, finished, base)],
    }
    write_json(out / "finetune.json", results, force=True)
    if not finished:
        return
    with write_file(out / "finetune.md", force=True) as file:
        file.write_text(table(results), encoding="utf-8")
    try:
        from cats_llm.report.style import style
    except ImportError:
        return
    drawn = {(log["group"], log["name"]): log for log in reversed(results["runs"])}  # of several seeds the first
    with style(), write_file(out / "finetune.svg", force=True) as file:
        shown = [log for log in results["runs"] if drawn[log["group"], log["name"]] is log]
        curves(read_training(results | {"runs": shown}, out / "finetune.json")).savefig(file, metadata={"Date": None})


def _base(out: Path, logs: list[dict[str, Any]]) -> dict[str, Any]:
    """The dense model before any step; without its file, as of runs that were copied here, only what runs know."""
    file = out / "base.json"
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return known
    one = logs[0]
    return {key: one[key] for key in ("model", "data", "machine")} | {"dtype": None, "texts": {}}


def _place(log: dict[str, Any]) -> tuple[Any, ...]:
    """Where a run stands in the table."""
    run = Run(**log["run"])
    method = (_ORDER.index(run.method), run.sparsity or 0)
    how = (run.criterion, run.parameters, run.loss, run.minutes or 0, run.steps or 0, run.learning_rate, run.seed)
    return (run.group, *method, *how)


def _differences(log: dict[str, Any], logs: list[dict[str, Any]]) -> str:
    """What sets a run apart from others of its group, beside method, learning rate and seed."""
    parts = []
    for key, unit in (
        ("criterion", ""), ("parameters", ""), ("loss", ""), ("schedule", ""), ("steps", " steps"), ("minutes", " min"),
    ):  # fmt: skip
        values = {other["run"][key] for other in logs if other["group"] == log["group"]}
        value = log["run"][key]
        if len(values) > 1 and value is not None:
            parts.append(f"{value:g}{unit}" if isinstance(value, float | int) else str(value))
    return "".join(f", {part}" for part in parts)


def _shown(log: dict[str, Any], name: str) -> dict[str, Any]:
    """A run without what only paired tests need."""
    every = math.ceil(len(log["steps"]) / _STEPS)
    kept = {key: value for key, value in log.items() if key not in ("machine", "before", "after", "validation")}
    perplexities = {
        when: {text: value["perplexity"] for text, value in log[when].items()} for when in ("before", "after")
    }
    gpus = log["machine"]["gpus"]
    return (
        kept
        | perplexities
        | {
            "name": name,
            "validation": log["validation"]["perplexity"],
            "steps": log["steps"][every - 1 :: every],
            "machine": gpus[0] if gpus and log["device"] != "cpu" else log["machine"]["cpu"],
        }
    )


def _comparisons(log: dict[str, Any], logs: list[dict[str, Any]], base: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A run's perplexity on each text beside others', paired by sequence."""
    others: list[tuple[str, dict[str, Any]]] = [("dense before", base["texts"])] if base["texts"] else []
    for what, change in (
        ("relu", {"method": "relu", "sparsity": None, "criterion": "cats"}),
        ("dense", {"method": "dense", "sparsity": None, "criterion": "cats"}),
        ("cross-entropy", {"loss": "cross-entropy"}),
        ("lora", {"parameters": "lora"}),
        ("criterion cats", {"criterion": "cats"}),
    ):
        wanted = log["run"] | change
        if wanted == log["run"]:
            continue
        same = [o for o in logs if {**o["run"], "learning_rate": 0} == {**wanted, "learning_rate": 0}]
        others += [(what, other["after"]) for other in same[:1]]
    for what, texts in others:
        for text, value in log["after"].items():
            difference = paired_difference(_metric(value), _metric(texts[text]))
            yield {
                "group": log["group"],
                "name": log["name"] + _differences(log, logs),
                "run": Run(**log["run"]).name,
                "to": what,
                "text": text,
                **({key: _rounded(v) for key, v in vars(difference).items()} if difference else {}),
            }


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def _metric(value: dict[str, Any]) -> Metric:
    nll = value["nll"]
    if any(v is None for v in nll):
        return Metric("perplexity", None, None, False, len(nll), "perplexity", [], [])
    return Metric("perplexity", exp(sum(nll) / len(nll)), None, False, len(nll), "perplexity", nll, [1.0] * len(nll))


def table(results: dict[str, Any]) -> str:
    """The ends of all runs, in Markdown; means over seeds."""
    texts = list(results["dense"])
    logs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for log in results["runs"]:
        logs.setdefault((log["group"], log["name"]), []).append(log)
    heads = [text + (f": dense {_number(dense)}" if dense else "") for text, dense in results["dense"].items()]
    lines = [
        "| group | setting | learning rate | steps | training, min | gate sparsity after | "
        + " | ".join(heads)
        + f" | its difference to ReLU on {texts[0]}, 95 % interval | steps to where ReLU ends |",
        "|---|---|" + "--:|" * (6 + len(texts)),
    ]
    tests = {c["run"]: c for c in results["comparisons"] if c["to"] == "relu" and c["text"] == texts[0]}
    for (group, name), runs in logs.items():
        first = runs[0]
        last = first["evaluations"][-1]
        cells = [group, name + (f" ({len(runs)} seeds)" if len(runs) > 1 else "")]
        cells += [f"{first['settings']['learning_rate']:g}", _mean([r["settings"]["steps"] for r in runs], "{:.0f}")]
        cells += [_mean([r["training_seconds"] / 60 for r in runs], "{:.1f}")]
        cells += [f"{100 * last['sparsity']['gate']:.1f} %" if "sparsity" in last else "–"]
        cells += [_from_to(runs, text, results["dense"][text]) for text in texts]
        test = tests.get(Run(**first["run"]).name, {})
        cells.append(f"{test['value']:+.3f} ({test['low']:+.3f} to {test['high']:+.3f})" if "value" in test else "–")
        cells.append(_steps_to_relu(first, results["runs"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(values: list[float], form: str) -> str:
    """The mean, and the range where there are several."""
    mean = form.format(sum(values) / len(values))
    low, high = form.format(min(values)), form.format(max(values))
    return mean if low == high else f"{mean} ({low} to {high})"


def _from_to(runs: list[dict[str, Any]], text: str, dense: float | None) -> str:
    ends = [run["after"][text] for run in runs]
    if any(end is None for end in ends):
        return "not finite"
    over = f" ({100 * (sum(ends) / len(ends) / dense - 1):+.1f} %)" if dense else ""
    return f"{_number(runs[0]['before'][text])} → {_mean(ends, '{:.3f}')}{over}"


def _steps_to_relu(log: dict[str, Any], logs: list[dict[str, Any]]) -> str:
    """The first measurement at which a run is as good as the last one of the ReLU model trained likewise."""
    wanted = log["run"] | {"method": "relu", "sparsity": None, "criterion": "cats", "learning_rate": 0}
    relu = next((other for other in logs if {**other["run"], "learning_rate": 0} == wanted), None)
    end = relu["evaluations"][-1]["perplexity"] if relu else None
    if end is None:
        return "–"
    known = [e for e in log["evaluations"] if e["perplexity"] is not None]
    return next((str(e["step"]) for e in known if e["perplexity"] <= end), "never")


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.3f}"
