"""What a task is to the harness, and what running it on one variant gives."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from cats_llm.errors import CatsError
from cats_llm.evaluation.batch import BatchSize
from cats_llm.options import Panel, option


@dataclass(frozen=True)
class Metric:
    """One number of a task on a variant, with what it was averaged over.

    Attributes:
        name: "acc", "perplexity", "kl" ...
        value: None if it is not finite.
        stderr: its standard error; None if unknown.
        higher_is_better: what a user wants.
        n: documents (windows, for perplexity) it was averaged over.
        kind: how ``value`` follows from the scores: "mean", sum(weights * scores) / sum(weights); "perplexity", the
            exponential of it; or "opaque".
        scores: one a document, in the order of the task; empty if opaque. Paired tests compare them.
        weights: one a document.
        strata: numbers of documents that belong together (the tasks of a group), in their order; empty if all do.
        parts: the value of each task of a group.
    """

    name: str
    value: float | None
    stderr: float | None
    higher_is_better: bool
    n: int
    kind: str = "opaque"
    scores: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    strata: list[int] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """A task on a variant: its metrics, and what ran through the model meanwhile.

    Attributes:
        metrics: what the task measures.
        counts: by layer, neurons skipped and neurons seen; empty for a dense model.
        tokens: tokens that the model computed, padding not counted; None if nobody counted.
        seconds: wall-clock time.
        inputs: by path of a linear layer, inputs skipped and inputs seen; empty where no method skips inputs.
    """

    metrics: list[Metric]
    counts: dict[int, tuple[int, int]]
    tokens: int | None
    seconds: float
    inputs: dict[str, tuple[int, int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them: layer numbers as text, pairs as lists."""
        return asdict(self) | {"counts": {str(layer): list(count) for layer, count in self.counts.items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Measurement":
        """The inverse of `to_dict`.

        Raises:
            CatsError: a field is missing or of another kind.
        """
        try:
            metrics = [Metric(**metric) for metric in values["metrics"]]
            counts = {int(layer): (int(a), int(b)) for layer, (a, b) in values["counts"].items()}
            inputs = {name: (int(a), int(b)) for name, (a, b) in values["inputs"].items()}
            return cls(metrics, counts, values["tokens"], float(values["seconds"]), inputs)
        except (KeyError, TypeError, ValueError) as error:
            raise CatsError("a cached measurement is damaged.") from error


@dataclass(frozen=True)
class Subject:
    """A model as a task sees it.

    Attributes:
        model: in eval mode, computing the variant.
        tokenizer: its tokenizer.
        reference: the dense model to compare with; None while the dense variant itself runs. May be ``model``.
        dense: a context in which ``model`` is its own reference.
    """

    model: Any
    tokenizer: Any
    reference: nn.Module | None
    dense: Callable[[nn.Module], AbstractContextManager[None]]


@dataclass(frozen=True)
class TaskOptions:
    """How tasks of lm-eval are run."""

    panel = Panel.MEASURING

    limit: int | None = option(None, help="At most so many documents a task.", minimum=1)
    num_fewshot: int | None = option(None, help="Examples in the prompts. Default: each task's own.", minimum=0)
    apply_chat_template: bool = option(False, help="Put the tasks' prompts into the chat template.")


class Task(ABC):
    """One thing to measure. ``name`` is unique in a run; ``kind`` is "perplexity" or "lm_eval"."""

    name: str
    kind: str

    @abstractmethod
    def prepare(self, model: Any, tokenizer: Any) -> None:
        """Read the data, before any long work.

        Raises:
            CatsError: there is none, or it does not fit the model.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """As it stands in a result file: at least name, kind, data and documents."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """What its results depend on beside the model: settings, and digests of the data."""

    def versions(self) -> dict[str, str]:
        """Of libraries that its results depend on, beside those of the package itself."""
        return {}

    @abstractmethod
    def run(self, subject: Subject, batch: BatchSize) -> Measurement:
        """Measure. Under data parallelism every process calls it and gets the same answer."""
