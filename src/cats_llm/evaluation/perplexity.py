"""Perplexity on a text, in windows; beside it the distance to the dense model."""

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cats_llm import distributed
from cats_llm.errors import CatsError
from cats_llm.evaluation.batch import BatchSize
from cats_llm.evaluation.paired import standard_error
from cats_llm.evaluation.scoring import exp, score_sequences
from cats_llm.evaluation.sparsity import SparsityCounter
from cats_llm.evaluation.task import Measurement, Metric, Subject, Task
from cats_llm.model.architecture import check_predicts_tokens
from cats_llm.model.tokens import check_tokens
from cats_llm.text import TextSize, TextSource, load_sequences


@dataclass
class PerplexityTask(Task):
    """Perplexity of a text in windows of ``length`` tokens, one beginning every ``stride`` text tokens.

    The first window predicts all of its tokens but the first; each later one predicts those that are new in it, with
    the rest as context, so that no token is predicted twice. Without a stride windows do not overlap, and each
    predicts all of its tokens but the first.

    Perplexity a token is exp(nll / predicted tokens). A word's and a byte's are the same nll a token, times the tokens
    a word or byte of the text that was read.

    Attributes:
        source: the text; a path alone is read with the usual columns.
        name: in result files.
        length: tokens a window.
        stride: see above.
        samples: at most so many windows.
        seed: draw windows in this random order; only without stride.
        distance: measure KL and top-1 agreement to the dense model too, which doubles the work.
    """

    source: TextSource | str
    name: str = "perplexity"
    length: int = 1024
    stride: int | None = None
    samples: int | None = None
    seed: int | None = None
    distance: bool = True
    kind = "perplexity"

    def prepare(self, model: Any, tokenizer: Any) -> None:
        """Cut the text into windows."""
        check_predicts_tokens(model, "perplexity")
        if self.stride is not None and (self.seed is not None or not 0 < self.stride <= self.length):
            raise CatsError(
                f"a stride of {self.stride} was asked for; it must be from 1 to the {self.length} tokens of a window, "
                "and windows that overlap cannot be shuffled."
            )
        self.size = TextSize()
        sequences = load_sequences(
            self.source,
            tokenizer,
            self.length,
            samples=self.samples,
            seed=self.seed,
            stride=self.stride,
            size=self.size,
        )
        self.windows = torch.stack(list(sequences))
        check_tokens(model, self.windows, tokenizer)
        self.first = torch.full((len(self.windows),), 1)
        if self.stride is not None:
            self.first[1:] = max(1, self.length - self.stride)

    def describe(self) -> dict[str, Any]:
        """The settings, and tokens a word and a byte of the text that was read; documents are windows."""
        return {
            "name": self.name,
            "kind": self.kind,
            "data": TextSource.of(self.source).path,
            "documents": len(self.windows),
            "seq_length": self.length,
            "stride": self.stride,
            "tokens": int((self.length - self.first).sum()),
            "tokens_per_word": self.size.tokens / self.size.words if self.size.words else None,
            "tokens_per_byte": self.size.tokens / self.size.bytes if self.size.bytes else None,
        }

    def content(self) -> dict[str, Any]:
        """A digest of the windows' tokens, and which of them are predicted."""
        return {
            "kind": self.kind,
            "windows": hashlib.sha256(self.windows.numpy().tobytes()).hexdigest(),
            "shape": list(self.windows.shape),
            "first": self.first[1:2].tolist(),
            "size": vars(self.size),
            "distance": self.distance,
        }

    def run(self, subject: Subject, batch: BatchSize) -> Measurement:
        """Score every window; under data parallelism each process its share."""
        started = time.perf_counter()
        counter = SparsityCounter(subject.model)
        rank, world = distributed.rank(), distributed.world_size()
        mine = torch.arange(rank, len(self.windows), world)
        reference = subject.reference if self.distance else None
        parts: list[tuple[Tensor, ...]] = []
        done = 0
        while done < len(mine):

            def step(size: int, done: int = done) -> tuple[Tensor, ...]:
                rows = mine[done : done + size]
                scores = score_sequences(
                    subject.model, self.windows[rows], self.first[rows], reference, subject.dense, counter
                )
                nothing = torch.zeros_like(scores.nll)
                return (
                    rows,
                    scores.tokens,
                    scores.nll,
                    *(t if t is not None else nothing for t in (scores.kl, scores.agree)),
                )

            parts.append(batch.run(step))
            done += len(parts[-1][0])
        columns = [torch.cat(column) for column in zip(*parts, strict=True)] if parts else [torch.zeros(0)] * 5
        gathered = [torch.cat(column) for column in zip(*distributed.gather(columns), strict=True)]
        order = gathered[0].argsort()
        tokens, nll, kl, agree = (column[order] for column in gathered[1:])
        return counter.measurement(self._metrics(tokens, nll, kl, agree, reference is not None), started)

    def _metrics(self, tokens: Tensor, nll: Tensor, kl: Tensor, agree: Tensor, compared: bool) -> list[Metric]:
        per = {"perplexity": 1.0}
        if self.size.words:
            per["word_perplexity"] = self.size.tokens / self.size.words
        if self.size.bytes:
            per["byte_perplexity"] = self.size.tokens / self.size.bytes
        weights = tokens.tolist()
        metrics = [
            _metric(name, "perplexity", (nll / tokens * factor).tolist(), weights, False)
            for name, factor in per.items()
        ]
        if compared:
            metrics.append(_metric("kl", "mean", (kl / tokens).tolist(), weights, False))
            metrics.append(_metric("top1_agreement", "mean", (agree / tokens).tolist(), weights, True))
        return metrics


def _metric(name: str, kind: str, scores: list[float], weights: list[float], higher: bool) -> Metric:
    mean = sum(s * w for s, w in zip(scores, weights, strict=True)) / sum(weights)
    value = exp(mean) if kind == "perplexity" else mean
    error = standard_error(scores, weights)
    if error is not None and kind == "perplexity":
        error *= value  # d exp(m) = exp(m) dm
    finite = value < float("inf")
    return Metric(
        name, value if finite else None, error if finite else None, higher, len(scores), kind, scores, weights
    )
