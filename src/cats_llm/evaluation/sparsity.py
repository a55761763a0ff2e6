"""Counts the neurons, or inputs of linear layers, that a sparse model skips, on whatever runs through it."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cats_llm import distributed
from cats_llm.calibration.batches import CalibrationData, read_batches, run_decoder
from cats_llm.evaluation.baselines.input_mask import hooked_inputs
from cats_llm.evaluation.task import Measurement, Metric
from cats_llm.kernels.backend import MAX_DECODE_TOKENS
from cats_llm.kernels.definition import gate_activation, keep_mask
from cats_llm.model.sparse_mlp import SparseMLP
from cats_llm.model.structure import GatedMLP, decoder_of, find_gated_mlps

Key = TypeVar("Key", int, str)


@torch.no_grad()
def measure_sparsity(model: nn.Module, data: CalibrationData) -> dict[int, float]:
    """The gate sparsity of each layer that a text runs through, whatever head the model has; a dense model has none.

    Args:
        data: see `read_batches`.

    Raises:
        CatsError: the model cannot read it.
    """
    counter = SparsityCounter(model)
    for inputs in read_batches(model, data):
        with counter:
            run_decoder(model, inputs)
    return counter.result()


class SparsityCounter:
    """Counts, while it is entered, tokens and what every sparse MLP or linear layer skips for them.

    Padding that an attention_mask tells of is not counted; `crop` tells of other padding. What is counted between
    entering and leaving counts only if it ended well.
    """

    def __init__(self, model: nn.Module) -> None:
        sparse = any(isinstance(module, SparseMLP) for module in model.modules())
        self.mlps = [mlp for mlp in find_gated_mlps(model) if isinstance(mlp.module, SparseMLP)] if sparse else []
        self.linears = hooked_inputs(model)
        self.decoder = decoder_of(model)
        # by layer, or path of a linear layer
        self._total: dict[int | str, Tensor] = {}
        self._entered: dict[int | str, Tensor] = {}
        # of the call that runs: neurons or inputs that each token skips, (B, T), and which tokens are real
        self._rows: dict[int | str, Tensor] = {}
        self._real: Tensor | None = None

    def __enter__(self) -> "SparsityCounter":
        self._entered, self._rows, self._real = {}, {}, None
        self._hooks = [mlp.module.register_forward_pre_hook(self._hook(mlp)) for mlp in self.mlps]
        self._hooks.append(self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
        for name, (_, sparse_input) in self.linears.items():
            sparse_input.observer = self._observer(name)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for _, sparse_input in self.linears.values():
            sparse_input.observer = None
        self._settle()
        if kind is None:  # what ran out of memory half-way will come again
            _add(self._total, self._entered)

    @property
    def batch(self) -> int:
        """How many sequences were computed together in the last call."""
        return len(self._real) if self._real is not None else 0

    def crop(self, lengths: list[int]) -> None:
        """Tell that the sequences of the last call are only so long; what follows in them is padding."""
        if self._real is not None:
            position = torch.arange(self._real.shape[1], device=self._real.device)
            self._real = self._real & (position < torch.tensor(lengths, device=position.device)[:, None])

    def counts(self) -> dict[int, tuple[int, int]]:
        """By layer, neurons skipped and neurons seen (tokens times neurons); empty for a dense model."""
        return self._pairs({mlp.layer: mlp.intermediate_size for mlp in self.mlps})

    def inputs(self) -> dict[str, tuple[int, int]]:
        """By path of the linear layer, inputs skipped and inputs seen; empty where no method skips inputs."""
        return self._pairs({name: linear.in_features for name, (linear, _) in self.linears.items()})

    def _pairs(self, sizes: dict[Key, int]) -> dict[Key, tuple[int, int]]:
        pairs = {key: self._total[key].tolist() for key in sizes if key in self._total}
        return {key: (skipped, tokens * sizes[key]) for key, (skipped, tokens) in pairs.items()}

    def tokens(self) -> int:
        """How many tokens the decoder computed."""
        return int(self._total[_DECODER][1]) if _DECODER in self._total else 0

    def result(self) -> dict[int, float]:
        """The gate sparsity of each layer, a share of its neurons over all tokens counted."""
        return {layer: skipped / seen for layer, (skipped, seen) in self.counts().items() if seen}

    def measurement(self, metrics: list[Metric], started: float) -> Measurement:
        """The metrics with what was counted meanwhile, over all processes.

        Args:
            metrics: the same in every process.
            started: of `time.perf_counter`.
        """
        return Measurement(
            metrics,
            distributed.add_counts(distributed.gather(self.counts())),
            sum(distributed.gather(self.tokens())),
            time.perf_counter() - started,
            distributed.add_counts(distributed.gather(self.inputs())),
        )

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._settle()
        ids, embeds, mask = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        tokens = next(t for t in (ids, embeds, *args) if t is not None)
        batch, length = tokens.shape[:2]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._real = mask[:, -length:].bool()
        else:
            self._real = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)

    def _hook(self, mlp: GatedMLP) -> Callable[[nn.Module, Any], None]:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not module.sparse:
                return
            x = inputs[0]
            if x.numel() // x.shape[-1] <= MAX_DECODE_TOKENS:
                # a hook on the projection would take the call away from the kernels; so the gate is computed twice
                self._count(mlp, mlp.gate_of(mlp.gate_linear(x)))
                return

            def after(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                handle.remove()
                self._count(mlp, mlp.gate_of(output))

            handle = mlp.gate_linear.register_forward_hook(after)

        return before

    def _observer(self, name: str) -> Callable[[Tensor], None]:
        def observe(rows: Tensor) -> None:
            self._rows[name] = rows

        return observe

    @torch.no_grad()
    def _count(self, mlp: GatedMLP, gate: Tensor) -> None:
        module: Any = mlp.module
        threshold = module.of_sparse_tokens(module.threshold, gate)
        if threshold is None:
            rows = torch.zeros(gate.shape[:-1], dtype=torch.int64, device=gate.device)
        else:
            rows = (~keep_mask(gate_activation(gate, module.activation), threshold.to(gate.device))).sum(-1)
        self._rows[mlp.layer] = rows

    def _settle(self) -> None:
        """Add up the call that ran."""
        if self._real is None:
            return
        real = self._real
        counts: dict[int | str, Tensor] = {_DECODER: torch.stack((torch.zeros_like(real.sum()), real.sum()))}
        for layer, rows in self._rows.items():
            mask = real.to(rows.device)
            counts[layer] = torch.stack((rows.reshape(mask.shape)[mask].sum(), mask.sum()))
        _add(self._entered, counts)
        self._rows, self._real = {}, None


# where the tokens of the decoder are kept among the layers
_DECODER = -1


def _add(total: dict[int | str, Tensor], part: dict[int | str, Tensor]) -> None:
    for key, pair in part.items():
        total[key] = total[key] + pair if key in total else pair
