"""Run variants of one model on tasks, and gather everything into one result."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from torch import nn

from cats_llm import distributed
from cats_llm.dtypes import dtype_name
from cats_llm.errors import CatsError
from cats_llm.evaluation.batch import BatchSize
from cats_llm.evaluation.cache import Cache, digest_code, digest_json, digest_model, digest_tokenizer
from cats_llm.evaluation.methods import METHODS, method
from cats_llm.evaluation.paired import combined, paired_difference
from cats_llm.evaluation.task import Measurement, Metric, Subject, Task
from cats_llm.evaluation.variants import Variant
from cats_llm.formats import EVALUATION, EVALUATION_VERSION
from cats_llm.model.sparsify import restoring
from cats_llm.model.weight_traffic import input_sparsity_of, sparsity_of
from cats_llm.versions import versions


@dataclass(frozen=True)
class Progress:
    """Told after each task on each variant.

    Attributes:
        done, total: how many of these there are.
        variant, task: the one that is done.
        cached: it was not computed but read.
        seconds: what it took to compute, now or then.
        left: seconds until the end, estimated; None while nothing was computed yet.
        measurement: its result.
    """

    done: int
    total: int
    variant: str
    task: str
    cached: bool
    seconds: float
    left: float | None
    measurement: Measurement


def run_evaluation(
    model: Any,
    tokenizer: Any,
    variants: Sequence[Variant],
    tasks: Sequence[Task],
    *,
    name: str | None = None,
    batch_size: int = 8,
    cache: Cache | None = None,
    means: Mapping[str, Sequence[str]] | None = None,
    progress: Callable[[Progress], None] | None = None,
    notify: Callable[[str], None] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Evaluate every variant on every task, with paired differences to the dense variant.

    The model is changed in place and is at the end what it was before. Under torch.distributed all processes call this
    with the same arguments, share the work, and get the same result.

    Args:
        model: the base model, dense or CATS, in eval mode.
        tokenizer: its tokenizer.
        variants: from `make_variants`, or made by hand; names must differ. Differences are to the one named "dense".
        tasks: what to measure; names must differ.
        name: of the model, for the record.
        batch_size: sequences computed at a time; halved when memory runs out.
        cache: where measurements are kept and looked up.
        means: names of rows to add, and the tasks whose "acc" they average.
        progress, notify: called after each measurement, and with messages for the user.
        command: what made this result, for the record.

    Returns:
        The content of a result file (docs/evaluation.md).

    Raises:
        CatsError: names that are not unique, or from the tasks and methods.
    """
    for kind, names in (("variants", [v.name for v in variants]), ("tasks", [t.name for t in tasks])):
        if not names or len(set(names)) < len(names):
            raise CatsError(
                f"the names of the {kind} must differ, and there must be one: {', '.join(names) or 'none'}."
            )
    for task in tasks:
        task.prepare(model, tokenizer)
    batch = BatchSize(batch_size, notify)
    measurements: dict[tuple[str, str], Measurement] = {}
    keys = _Keys(model, tokenizer) if cache is not None else None
    clock = _Clock([task.name for _ in variants for task in tasks])
    with restoring(model):
        for variant in variants:
            for task in tasks:
                key = keys.of(variant, task) if keys is not None else None
                known = distributed.broadcast(cache.load(key)) if cache is not None and key is not None else None
                measured = known or _measure(model, tokenizer, variant, task, batch)
                if known is None and cache is not None and key is not None and distributed.rank() == 0:
                    cache.save(key, measured)
                measurements[variant.name, task.name] = measured
                step = clock.tick(variant.name, known is not None, measured)
                if progress is not None:
                    progress(step)
    results = [row for variant in variants for row in _rows(model, variant, tasks, measurements, means or {})]
    return {
        "format": EVALUATION,
        "version": EVALUATION_VERSION,
        "model": name or getattr(model.config, "_name_or_path", None) or type(model).__name__,
        "dtype": dtype_name(model.dtype),
        "device": str(model.device),
        "versions": versions() | {key: value for task in tasks for key, value in task.versions().items()},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "variants": [variant.to_dict() for variant in variants],
        "tasks": [task.describe() for task in tasks] + [_describe_mean(*item) for item in (means or {}).items()],
        "results": results,
    }


def _measure(model: Any, tokenizer: Any, variant: Variant, task: Task, batch: BatchSize) -> Measurement:
    chosen = method(variant.method)
    if variant.model is not None:
        # a model of its own beside the base model, which is the reference
        with METHODS["dense"].applied(model, None), chosen.applied(variant.model, variant.config):
            return task.run(Subject(variant.model, tokenizer, model, chosen.dense), batch)
    with chosen.applied(model, variant.config):
        reference = None if variant.method == "dense" else model
        return task.run(Subject(model, tokenizer, reference, chosen.dense), batch)


class _Keys:
    """Keys of the cache: a model, tokenizer, method, task and this code, by digests of their content."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.base = digest_model(model)
        self.models: dict[int, str] = {}
        self.common = {
            "tokenizer": digest_tokenizer(tokenizer),
            "device": model.device.type,
            "code": digest_code(),
            "versions": versions(),
        }

    def of(self, variant: Variant, task: Task) -> dict[str, Any]:
        content = task.content() | task.versions()
        return self.common | {
            "model": self.base,
            "other": self._other(variant.model) if variant.model is not None else None,
            "method": variant.method,
            "settings": digest_json(variant.settings()),
            "content": digest_json(content),
        }

    def _other(self, model: nn.Module) -> str:
        if id(model) not in self.models:
            self.models[id(model)] = digest_model(model)
        return self.models[id(model)]


class _Clock:
    """Estimates the time left from what the same tasks took before.

    Args:
        steps: the task of every measurement, in their order.
    """

    def __init__(self, steps: Sequence[str]) -> None:
        self.steps = steps
        self.done = 0
        self.taken: dict[str, float] = {}

    def tick(self, variant: str, cached: bool, measured: Measurement) -> Progress:
        task = self.steps[self.done]
        self.done += 1
        if not cached:
            self.taken[task] = measured.seconds
        left = None
        if self.taken:
            usual = sum(self.taken.values()) / len(self.taken)
            left = sum(self.taken.get(name, usual) for name in self.steps[self.done :])
        return Progress(self.done, len(self.steps), variant, task, cached, measured.seconds, left, measured)


def _rows(
    model: Any,
    variant: Variant,
    tasks: Sequence[Task],
    measurements: Mapping[tuple[str, str], Measurement],
    means: Mapping[str, Sequence[str]],
) -> Iterator[dict[str, Any]]:
    """The results of a variant: its tasks, and means over them."""
    measured = {task.name: measurements[variant.name, task.name] for task in tasks}
    dense = {task.name: measurements["dense", task.name] for task in tasks if ("dense", task.name) in measurements}
    base = variant.model if variant.model is not None else model
    for task, measurement in measured.items():
        others = {metric.name: metric for metric in dense[task].metrics} if task in dense else {}
        for metric in measurement.metrics:
            other = others.get(metric.name) if variant.name != "dense" else None
            yield _row(base, variant.name, task, metric, other, measurement)
    for mean, members in means.items():
        average = _mean(measured, members)
        if average is not None:
            parts = [measured[member] for member in members]
            tokens = [part.tokens for part in parts]
            total = Measurement(
                [average],
                distributed.add_counts(part.counts for part in parts),
                None if None in tokens else sum(t or 0 for t in tokens),
                sum(part.seconds for part in parts),
                distributed.add_counts(part.inputs for part in parts),
            )
            other = _mean(dense, members) if variant.name != "dense" else None
            yield _row(base, variant.name, mean, average, other, total)


def _row(
    model: Any,
    variant: str,
    task: str,
    metric: Metric,
    dense: Metric | None,
    measured: Measurement,
) -> dict[str, Any]:
    difference = paired_difference(metric, dense) if dense is not None else None
    layers = {layer: skipped / seen for layer, (skipped, seen) in sorted(measured.counts.items()) if seen}
    linears = {name: skipped / seen for name, (skipped, seen) in measured.inputs.items() if seen}
    sparsity = input_sparsity_of(model, linears) if linears else sparsity_of(model, layers)
    return {
        "variant": variant,
        "task": task,
        "metric": metric.name,
        "higher_is_better": metric.higher_is_better,
        "value": metric.value,
        "stderr": metric.stderr,
        "n": metric.n,
        "difference": asdict(difference) if difference is not None else None,
        "sparsity": asdict(sparsity),
        "layer_sparsity": {str(layer): share for layer, share in layers.items()},
        "linear_sparsity": linears,
        "tokens": measured.tokens,
        "parts": metric.parts,
    }


def _mean(measured: Mapping[str, Measurement], members: Sequence[str]) -> Metric | None:
    if any(member not in measured for member in members):
        return None
    metrics = [next((m for m in measured[member].metrics if m.name == "acc"), None) for member in members]
    return None if None in metrics else combined("acc", [m for m in metrics if m is not None])


def _describe_mean(name: str, members: Sequence[str]) -> dict[str, Any]:
    return {"name": name, "kind": "mean", "data": "the mean of " + ", ".join(members), "members": list(members)}
