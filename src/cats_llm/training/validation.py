"""Perplexity and sparsity on held-out examples while a model trains."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from cats_llm import distributed
from cats_llm.evaluation.scoring import exp
from cats_llm.evaluation.sparsity import SparsityCounter
from cats_llm.model.predictions import log_probabilities
from cats_llm.model.structure import eval_mode
from cats_llm.model.weight_traffic import sparsity_of
from cats_llm.training.data import IGNORED, Example, collate


@torch.no_grad()
def evaluate(
    model: Any,
    examples: Sequence[Example],
    batch_size: int,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    wrapped: Any = None,
    teacher: Any = None,
) -> dict[str, Any]:
    """Loss and perplexity a predicted token, and the sparsity on all tokens; each process computes its share.

    Args:
        model: dense or CATS.
        examples: the same in every process.
        batch_size: examples computed at a time.
        context: what to compute in, such as autocast.
        wrapped: what to call in place of ``model``, where a wrapper gathers its weights.
        teacher: a dense model to compare predictions with.

    Returns:
        loss (nats), perplexity, tokens (predicted); with a teacher also kl, KL(teacher || model) in nats; for
        instructions also accuracy, the share whose answer greedy decoding gives token by token; for a sparse model also
        sparsity (gate, ffn, model) and layer_sparsity. The same in every process. A model that diverged has a loss and
        perplexity of None.
    """
    counter = SparsityCounter(model)
    rank, world = distributed.rank(), distributed.world_size()
    device = next(p.device for p in model.parameters())
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    loss, divergence, tokens, right = 0.0, 0.0, 0, 0
    # where weights are sharded, every process must call the model equally often
    for round_ in range(math.ceil(len(batches) / world)):
        index = round_ * world + rank
        mine = index < len(batches)
        batch = {name: value.to(device) for name, value in collate(batches[index if mine else 0]).items()}
        labels = batch.pop("labels")[:, 1:]
        with eval_mode(model), context(), counter if mine else nullcontext():
            logits = (wrapped or model)(**batch, use_cache=False).logits[:, :-1]
        if mine:
            wanted = labels != IGNORED
            compared = [logits]
            if teacher is not None:
                with context():
                    compared.append(teacher(**batch, use_cache=False).logits[:, :-1])
            for where, (log_p, *others) in log_probabilities(wanted, *compared):
                loss += float(F.nll_loss(log_p, labels[where], reduction="sum"))
                for log_q in others:
                    divergence += float(F.kl_div(log_p, log_q, log_target=True, reduction="sum"))
                tokens += len(log_p)
            right += int(((logits.argmax(-1) == labels) | ~wanted).all(1).sum())
    parts = distributed.gather((loss, divergence, tokens, right))
    losses, divergences, all_tokens, rights = zip(*parts, strict=True)
    tokens = sum(all_tokens)
    mean = sum(losses) / tokens
    counts = distributed.add_counts(distributed.gather(counter.counts()))
    measurement: dict[str, Any] = {
        "loss": mean if math.isfinite(mean) else None,
        "perplexity": exp(mean) if math.isfinite(exp(mean)) else None,
        "tokens": tokens,
    }
    if teacher is not None:
        measurement["kl"] = sum(divergences) / tokens if math.isfinite(sum(divergences)) else None
    if any(bool((example["labels"] == IGNORED).any()) for example in examples):
        measurement["accuracy"] = sum(rights) / len(examples)
    if counts:
        layers = {layer: skipped / seen for layer, (skipped, seen) in counts.items()}
        measurement["sparsity"] = vars(sparsity_of(model, layers))
        measurement["layer_sparsity"] = layers
    return measurement
