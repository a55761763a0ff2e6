"""Perplexity, distance to the dense model's next-token distribution, and the sparsity achieved, in one pass."""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cats_llm.errors import CatsError
from cats_llm.kernels.definition import gate_activation, keep_mask
from cats_llm.model.accounting import Sparsity, sparsity_of
from cats_llm.model.structure import GatedMLP, find_gated_mlps, observe_gates
from cats_llm.model.surgery import dense_function, sparse_mlps

# rows of logits held in float32 at a time
_ROWS = 512


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        tokens: predicted tokens, all but the first of every sequence.
        perplexity: exp of the mean negative log-likelihood a token.
        kl: mean over tokens of KL(reference || model) in nats; None without a reference.
        top1_agreement: share of tokens where both find the same token most likely; None without a reference.
        layer_sparsity: gate sparsity measured on these tokens, by layer; empty for a dense model.
        sparsity: the mean of it in the three units of the literature.
    """

    tokens: int
    perplexity: float
    kl: float | None
    top1_agreement: float | None
    layer_sparsity: dict[int, float]
    sparsity: Sparsity

    def to_dict(self) -> dict[str, Any]:
        """For JSON; not a number becomes None."""
        values = asdict(self)
        values["perplexity"] = self.perplexity if math.isfinite(self.perplexity) else None
        return values


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Tensor], reference: nn.Module | None = None) -> Evaluation:
    """Evaluate a model on token sequences. Every token is computed sparsely, as in prefill.

    Args:
        model: dense or CATS, in eval mode.
        batches: input_ids (B, T), each sequence predicted from its own beginning.
        reference: the model to compare with. Passing ``model`` itself compares it with its own dense function.

    Raises:
        CatsError: there are no tokens to predict, or the vocabularies differ.
    """
    counter = _SparsityCounter(model)
    tokens, nll, kl, agree = 0, 0.0, 0.0, 0
    for ids in batches:
        with counter:
            logits = _logits(model, ids)
        expected = None
        if reference is not None:
            with dense_function(model) if reference is model else nullcontext():
                expected = _logits(reference, ids)
            if expected.shape != logits.shape:
                raise CatsError(
                    f"the models have different vocabularies ({logits.shape[-1]} and {expected.shape[-1]} tokens), so "
                    "their predictions cannot be compared."
                )
        targets = ids[:, 1:].reshape(-1).to(logits.device)
        for rows in torch.arange(len(targets), device=logits.device).split(_ROWS):
            log_p = F.log_softmax(logits[rows].float(), dim=-1)
            nll += F.nll_loss(log_p, targets[rows], reduction="sum").item()
            if expected is not None:
                log_q = F.log_softmax(expected[rows.to(expected.device)].float(), dim=-1).to(log_p.device)
                kl += F.kl_div(log_p, log_q, log_target=True, reduction="sum").item()
                agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        tokens += len(targets)
    if tokens == 0:
        raise CatsError("there is nothing to evaluate: no sequence has two tokens.")
    layer_sparsity = counter.result()
    compared = reference is not None
    try:
        perplexity = math.exp(nll / tokens)
    except OverflowError:
        perplexity = math.inf
    return Evaluation(
        tokens,
        perplexity,
        kl / tokens if compared else None,
        agree / tokens if compared else None,
        layer_sparsity,
        sparsity_of(model, layer_sparsity),
    )


def _logits(model: Any, ids: Tensor) -> Tensor:
    """Logits that predict the tokens after the first, (B * (T - 1), vocabulary)."""
    device = model.get_input_embeddings().weight.device
    logits: Tensor = model(input_ids=ids.to("cpu" if device.type == "meta" else device), use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)


class _SparsityCounter:
    """Counts neurons below the threshold while it is entered. Observed projections run the plain path."""

    def __init__(self, model: nn.Module) -> None:
        self.sparse = sparse_mlps(model)
        self.mlps = [mlp for mlp in find_gated_mlps(model) if mlp.layer in self.sparse] if self.sparse else []
        self.skipped: dict[int, Tensor] = {}
        self.seen = dict.fromkeys(self.sparse, 0)

    def __call__(self, mlp: GatedMLP, gate: Tensor) -> None:
        threshold = self.sparse[mlp.layer].threshold.to(gate.device)
        skipped = (~keep_mask(gate_activation(gate, mlp.activation), threshold)).sum()
        self.skipped[mlp.layer] = self.skipped.get(mlp.layer, 0) + skipped
        self.seen[mlp.layer] += gate.numel()

    def __enter__(self) -> None:
        self.observing = observe_gates(self.mlps, self)
        self.observing.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.observing.__exit__(*error)

    def result(self) -> dict[int, float]:
        return {layer: int(skipped) / self.seen[layer] for layer, skipped in self.skipped.items()}
