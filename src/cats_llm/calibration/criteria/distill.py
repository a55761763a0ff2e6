"""Learn the compensation by gradients: a vector a layer, so that the sparse model predicts what the dense one does.

Only these vectors move (d numbers a layer), so the text that calibrates is enough; a decode step reads no more than
with any compensation, and weights stay as they are. The dense model is the teacher; no token of the text is a label.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cats_llm.calibration.batches import CalibrationText, run_decoder
from cats_llm.calibration.criteria.divergence import counted_tokens, divergence, logits_of
from cats_llm.distributed import sum_over_processes
from cats_llm.errors import CatsError
from cats_llm.model.sparse_mlp import SparseMLP
from cats_llm.model.sparsify import as_dense, sparse_mlps
from cats_llm.model.structure import GatedMLP, frozen


@dataclass(frozen=True)
class Distillation:
    """How the compensation is learned.

    Attributes:
        steps: of Adam, in all; a batch each.
        rate: the learning rate, in units of the MLP's root mean square output.
        rounds: after each the thresholds are set again, since what the layers receive has changed.
        seed: of the order of batches.
    """

    steps: int = 200
    rate: float = 0.02
    rounds: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rounds < 1 or not self.rate > 0:
            raise CatsError("distillation takes at least one step and round, and a rate above 0.")


def distill(
    model: nn.Module,
    mlps: Sequence[GatedMLP],
    text: CalibrationText,
    settings: Distillation,
    part: int = 0,
) -> dict[int, Tensor]:
    """The compensation of every layer, float32 (d,), beginning from what the model has.

    Args:
        model: sparse; its own compensation is left as it is.
        mlps: its MLPs.
        text: calibration text; under torch.distributed gradients of the processes' shares are summed.
        settings: see `Distillation`.
        part: which of the rounds this is.
    """
    by_layer = sparse_mlps(model)
    modules = {mlp.layer: by_layer[mlp.layer] for mlp in mlps}
    inputs = text.inputs
    sizes = _output_sizes(model, modules, inputs[0] if inputs else {})
    steps = max(1, settings.steps // settings.rounds)
    with frozen(model), _added(modules, sizes) as moves:
        optimizer = torch.optim.Adam(moves.values(), lr=settings.rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        order = _order(len(inputs), settings.seed + part)
        for _ in range(steps):
            tokens = torch.zeros((), dtype=torch.float64)
            if inputs:
                batch = inputs[next(order)]
                with torch.no_grad(), as_dense(model):
                    expected = logits_of(model, batch)
                with torch.enable_grad():
                    divergence(logits_of(model, batch), expected, batch).backward()
                tokens += int(counted_tokens(batch).sum())
            gradients = [m.grad if m.grad is not None else torch.zeros_like(m) for m in moves.values()]
            sum_over_processes([tokens, *gradients])
            for move, gradient in zip(moves.values(), gradients, strict=True):
                move.grad = gradient / tokens.to(gradient)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        learned = {}
        for layer, module in modules.items():
            before = module.compensation
            step_taken = moves[layer].detach() * sizes[layer]
            learned[layer] = step_taken if before is None else before.to(step_taken.device) + step_taken
    return learned


def _rate(step: int, steps: int) -> float:
    """Up in the first tenth, then down to 0 along a cosine."""
    return min(1.0, (step + 1) / max(1, steps // 10)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _order(number: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(number, generator=generator).tolist()


@torch.no_grad()
def _output_sizes(model: nn.Module, modules: Mapping[int, SparseMLP], batch: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The root mean square of every MLP's output on a batch, float32 (): the scale on which it is corrected."""
    sums = torch.zeros(2, len(modules), dtype=torch.float64)

    def note(row: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, y: Tensor) -> None:
            sums[0, row] += y.double().square().sum().cpu()
            sums[1, row] += y.numel()

        return hook

    with ExitStack() as stack:
        for row, module in enumerate(modules.values()):
            stack.callback(module.register_forward_hook(note(row)).remove)
        if batch:
            run_decoder(model, batch)
    sum_over_processes([sums])
    sizes = (sums[0] / sums[1]).sqrt().clamp(min=1e-12).float()
    return {
        layer: size.to(module.threshold.device) for (layer, module), size in zip(modules.items(), sizes, strict=True)
    }


@contextmanager
def _added(modules: Mapping[int, SparseMLP], sizes: Mapping[int, Tensor]) -> Iterator[dict[int, Tensor]]:
    """Vectors that are learned, added to the output of sparse tokens in units of ``sizes``; 0 at first."""
    moves = {}
    with ExitStack() as stack:
        for layer, module in modules.items():
            device = module.threshold.device
            d = module.down_linear.weight.shape[0]
            moves[layer] = torch.zeros(d, dtype=torch.float32, device=device, requires_grad=True)

            def hook(module: Any, _inputs: Any, y: Tensor, layer: int = layer) -> Tensor | None:
                added = module.of_sparse_tokens((moves[layer] * sizes[layer]).to(y.device, y.dtype), y)
                return None if added is None else y + added

            stack.callback(module.register_forward_hook(hook).remove)
        yield moves
