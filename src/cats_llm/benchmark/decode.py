"""What the benchmarks of whole tokens share, on every device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cats_llm.benchmark.timing import Quartiles, speed
from cats_llm.calibration.calibrate import calibrate
from cats_llm.calibration.profile import Profile
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.kernels.definition import gate_activation, keep_mask
from cats_llm.model.sparse_mlp import SparseMLP
from cats_llm.model.sparsify import set_thresholds
from cats_llm.model.structure import GatedMLP, find_gated_mlps, observe_gates
from cats_llm.model.weight_traffic import bytes_per_token


def prompt_and_profile(model: Any, batch: int, length: int, profile: Profile | None) -> tuple[Tensor, Profile]:
    """Prompts of random tokens, (batch, length), and without a profile one of other random tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompt = torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)
    if profile is None:
        profile = calibrate(model, [torch.randint(vocabulary, (1, 64), generator=generator) for _ in range(4)])
    return prompt, profile


def generate(model: Any, prompt: Tensor, tokens: int, **options: Any) -> None:
    """Greedily exactly so many new tokens, with more options of `generate`."""
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)


def read_shares(model: Any, config: CatsConfig, prompt: Tensor, tokens: int) -> dict[int, float]:
    """The share of neurons that a decode step reads, by layer: those that some sequence of the batch keeps."""
    set_thresholds(model, config.thresholds, config.vectors)
    shares: dict[int, list[float]] = {}

    def observe(mlp: GatedMLP, gate: Tensor) -> None:
        if gate.shape[:-1].numel() == len(prompt):  # a decode step, not the prefill
            sparse = mlp.module
            assert isinstance(sparse, SparseMLP)
            kept = keep_mask(gate_activation(gate, mlp.activation), sparse.threshold).reshape(len(prompt), -1)
            shares.setdefault(mlp.layer, []).append(kept.any(0).float().mean().item())

    with observe_gates(find_gated_mlps(model), observe):
        generate(model, prompt, tokens)
    return {layer: sum(values) / len(values) for layer, values in shares.items()}


def decode_row(
    model: Any,
    seconds: Mapping[str, list[float]],
    name: str,
    batch: int,
    config: CatsConfig | None,
    shares: Mapping[int, float],
    references: Mapping[str, str],
) -> dict[str, Any]:
    """What every device's rows hold of a candidate.

    Args:
        model: of the candidates, for its weights' bytes.
        seconds: a token, of all candidates.
        name: the candidate.
        batch: sequences at a time.
        config: the candidate's; None for stock transformers.
        shares: by `read_shares`; none for stock transformers.
        references: as `speed` takes them.
    """
    vectors = None if config is None else config.vectors
    moved = bytes_per_token(model, {layer: 1 - share for layer, share in shares.items()}, vectors)
    return {
        "contestant": name,
        "batch": batch,
        "rounds": len(seconds[name]),
        "sparsity_decoded": 1 - sum(shares.values()) / len(shares) if shares else None,
        "tokens_per_second": batch / Quartiles.of(seconds[name]).median,
        **speed(seconds, name, moved.sparse, moved.dense, references, "ms_per_step"),
    }
