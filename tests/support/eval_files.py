"""Result files as `cats eval` writes them, made of numbers that a test can choose."""

import json
import math
from pathlib import Path

PAPER8 = ("openbookqa", "arc_easy", "winogrande", "hellaswag", "arc_challenge", "piqa", "boolq", "sciq")
BENCHES = sorted((Path(__file__).parents[2] / "benchmarks" / "cpu").glob("*.json"))


def row(variant, task, metric, value, dense=None, stderr=0.01, half=0.012, gate=0.0, layers=4, **changes):
    """One row; ``half`` is half of the interval of the difference to ``dense``."""
    difference = None
    if dense is not None:
        change = value - dense
        difference = {"value": change, "stderr": half / 1.96, "low": change - half, "high": change + half}
        difference |= {"p": 0.5 if abs(change) < half else 0.0004, "test": "McNemar, exact"}
    made = {
        "variant": variant,
        "task": task,
        "metric": metric,
        "higher_is_better": "perplexity" not in metric and metric != "kl",
        "value": value,
        "stderr": stderr,
        "n": 500,
        "difference": difference,
        "sparsity": {"gate": gate, "ffn": 2 * gate / 3, "model": 0.54 * gate},
        "layer_sparsity": {str(i): min(1.0, gate + 0.004 * i) for i in range(layers)} if gate else {},
        "tokens": 10_000,
        "parts": {},
    }
    return made | changes


def variant(k, layers=4, method="cats", **changes):
    made = {
        "name": "dense" if k is None and method == "cats" else method if k is None else f"{method} k={k:g}",
        "method": "dense" if k is None and method == "cats" else method,
        "sparsity": k,
        "coverage": {"dense_prefill": False, "dense_first_tokens": 0, "last_fraction": None},
        "thresholds": None if k is None else {str(i): 0.05 + 0.2 * k + 0.01 * i for i in range(layers)},
        "layer_sparsity": {} if k is None else {str(i): k for i in range(layers)},
        "calibration": None,
    }
    return made | changes


def eval_file(model="org/Some-Model-7B", tasks=PAPER8, sparsities=(0.5, 0.7, 0.9), relu=True, shift=0.0, layers=4):
    """Accuracy on tasks and perplexity on a text; every number follows from the arguments."""
    variants = [variant(None), *(variant(k, layers) for k in sparsities)]
    if relu:
        variants.append(variant(None, method="relu", thresholds=None))
    listed = [{"name": name, "kind": "lm_eval", "data": f"hub/{name}", "documents": 500} for name in tasks]
    listed.append({"name": "heldout", "kind": "perplexity", "data": "heldout.txt", "documents": 64})
    results = []
    for v in variants:
        k = v["sparsity"] or 0.0
        gate = {"dense": 0.0, "relu": 0.62}.get(v["name"], k - 0.004 + shift)
        lost = 0.3 if v["name"] == "relu" else 0.02 * k**2 + 0.12 * k**8
        sparse = v["name"] != "dense"
        for i, name in enumerate(tasks):
            base = 0.75 - 0.03 * i
            results.append(row(v["name"], name, "acc", base - lost, base if sparse else None, gate=gate, layers=layers))
        worse = 16.0 * math.exp(3 * lost)
        place = {"gate": gate, "layers": layers, "stderr": 0.2}
        results.append(row(v["name"], "heldout", "perplexity", worse, 16.0 if sparse else None, half=0.3, **place))
        if sparse:
            results.append(row(v["name"], "heldout", "kl", 3 * lost, **(place | {"stderr": 0.003})))
            results.append(row(v["name"], "heldout", "top1_agreement", 1 - lost, **(place | {"stderr": 0.003})))
    return {
        "format": "cats-eval",
        "version": 1,
        "model": model,
        "dtype": "bfloat16",
        "device": "cpu",
        "versions": {"cats-llm": "0.1.0", "lm_eval": "0.4.13"},
        "created": "2026-01-01T00:00:00+00:00",
        "command": f"cats eval {model} --tasks paper8",
        "variants": variants,
        "tasks": listed,
        "results": results,
    }


def write(path, values):
    path.write_text(json.dumps(values), encoding="utf-8")
    return path
