"""Problems with known answers for the kernels.

Inputs are small multiples of powers of two, so every dot product is exact in float32 in any order: which neurons
are active is then no matter of rounding, and outputs can be held to a few units in the last place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cats_llm.kernels import cpu
from cats_llm.kernels.definition import ACTIVATIONS
from cats_llm.kernels.operators import gated_mlp

ISAS = cpu.available_isas()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Use another instruction set for a while."""
    before = cpu.isa()
    cpu.set_isa(name)
    try:
        yield
    finally:
        cpu.set_isa(before)


class Expected(NamedTuple):
    """The answer in float64, and the magnitude that rounding errors are relative to."""

    y: Tensor
    scale: Tensor


@dataclass
class Case:
    x: Tensor
    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor
    threshold: Tensor
    activation: str = "silu"
    b_gate: Tensor | None = None
    b_up: Tensor | None = None
    b_down: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def run(self) -> Tensor:
        return gated_mlp(**self.arguments())

    def activations(self) -> Tensor:
        """act(gate) before the threshold, (..., f), in float64 from the gate rounded to the weights' dtype."""
        gate = affine(self.x, self.w_gate, self.b_gate).to(self.x.dtype)
        return ACTIVATIONS[self.activation](gate.double())

    def expected(self) -> Expected:
        a = self.activations()
        a = torch.where(a.abs() < self.threshold.double(), 0.0, a)
        h = a * affine(self.x, self.w_up, self.b_up)
        h = torch.where(a == 0, 0.0, h)  # a neuron that is skipped cannot show its infinities
        down = self.w_down.double().t()
        bias = torch.zeros(()) if self.b_down is None else self.b_down
        return Expected(h @ down + bias, h.abs() @ down.abs() + bias.abs())

    def check(self) -> Tensor:
        y, (expected, scale) = self.run(), self.expected()
        assert y.shape == self.x.shape
        assert y.dtype == self.x.dtype
        rounding = torch.finfo(y.dtype).eps / 2 * expected.abs() + 2e-6 * scale + torch.finfo(y.dtype).tiny
        wrong = (y.double() - expected).abs() > rounding
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} wrong"
        return y


def affine(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    y = x.double() @ w.double().t()
    return y if b is None else y + b.double()


def grid(*shape: int, dtype: torch.dtype, denominator: int = 8) -> Tensor:
    """Random multiples of 1/denominator in [-3, 3] / denominator."""
    return (torch.randint(-3, 4, shape) / denominator).to(dtype)


def matrix(rows: int, columns: int, dtype: torch.dtype, padding: int = 0, offset: int = 0) -> Tensor:
    """A random matrix with `padding` elements between rows, `offset` elements into its memory, NaN around."""
    stride = columns + padding
    memory = torch.full((offset + rows * stride,), float("nan"), dtype=dtype)
    w = memory.as_strided((rows, columns), (stride, 1), offset)
    return w.copy_(grid(rows, columns, dtype=dtype))


def gap(a: Tensor, quantile: float, clear: float = 1e-4) -> Tensor:
    """A float32 threshold near the quantile of |a| that no activation is near, relative to itself."""
    values = torch.cat([torch.zeros(1).double(), a.abs().flatten().sort().values, a.abs().max().view(1) + 1])
    middles = (values[1:] + values[:-1]) / 2
    wide = (values[1:] - values[:-1]) > clear * values[1:]
    order = (torch.linspace(0, 1, len(middles)) - quantile).abs()
    return middles[torch.where(wide, order, 9.0).argmin()].float()


def make(
    n: int,
    d: int,
    f: int,
    dtype: torch.dtype,
    activation: str = "silu",
    quantile: float = 0.5,
    per_neuron: bool = False,
    bias: bool = False,
    padding: int = 0,
    offset: int = 0,
    clear: float = 1e-4,
) -> Case:
    case = Case(
        grid(n, d, dtype=dtype, denominator=2),
        matrix(f, d, dtype, padding, offset),
        matrix(f, d, dtype, padding, offset),
        matrix(f, d, dtype, padding, offset).t(),
        torch.tensor(0.0),
        activation,
    )
    if bias:
        case.b_gate, case.b_up, case.b_down = (grid(size, dtype=dtype) for size in (f, f, d))
    if n:
        a = case.activations()
        case.threshold = (
            torch.stack([gap(a[:, j], quantile, clear) for j in range(f)]) if per_neuron else gap(a, quantile, clear)
        )
    return case
