"""A plan for every kind of call, made once, so that a call costs three launches and two allocations."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cats_llm.kernels.gpu import kernels
from cats_llm.kernels.gpu.config import Config, GemvConfig, Tile, power_of_two

# where vector accesses may begin
_ALIGNMENT = 16


class Launch:
    """One kernel with its constants.

    Compiled at the first call. From then on Triton's own dispatch, which looks at every argument, is left out; the
    caller sees to it that calls agree in dtypes and in which pointers are aligned.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], options: dict[str, Any], **constants: Any) -> None:
        self.kernel, self.grid, self.options, self.constants = kernel, grid, options, constants
        self._compiled: Any = None
        self._launch: Any = None
        self._values: tuple[Any, ...] = ()

    @classmethod
    def of_tile(cls, kernel: Any, grid: tuple[int, int, int], tile: Tile, pdl: bool, **constants: Any) -> "Launch":
        """A kernel that works by tiles."""
        options = {"num_warps": tile.warps} | ({"launch_pdl": True} if pdl else {})
        sizes = {"BLOCK_R": tile.rows, "BLOCK_K": tile.columns, "STAGES": tile.stages, "PDL": pdl}
        return cls(kernel, grid, options, **constants, **sizes)

    def __call__(self, *pointers: Tensor | None) -> None:
        """Launch on the current stream."""
        if self._compiled is not None:
            self._launch(*pointers, *self._values)
            return
        compiled = self.kernel[self.grid](*pointers, **self.constants, **self.options)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._values = tuple(self.constants[name] for name in self.kernel.arg_names[len(pointers) :])
            self._compiled = compiled
            self._launch = compiled[self.grid]

    def on_grid(self, grid: tuple[int, int, int]) -> "Launch":
        """The same launch over another grid, without compiling again."""
        other = Launch(self.kernel, grid, self.options, **self.constants)
        if self._compiled is not None:
            other._values, other._compiled, other._launch = self._values, self._compiled, self._compiled[grid]
        return other


class _Workspace:
    """Places for what the kernels hand on, in one allocation."""

    def __init__(self) -> None:
        self.bytes = 0

    def place(self, elements: int, itemsize: int) -> int:
        at = self.bytes
        self.bytes += -(-elements * itemsize // _ALIGNMENT) * _ALIGNMENT
        return at


def row_stride(w: Tensor) -> int:
    """Elements between rows."""
    return w.stride(0) if w.shape[0] > 1 else w.shape[1]


class MlpPlan:
    """The launches of a sparse MLP for tensors of the same shapes, strides, dtype and alignment.

    Args:
        config: the tiles.
        x: of 1 to 16 tokens; it and the others as `run` takes them.
        activation: a key of `definition.ACTIVATIONS`.
        processors: multiprocessors of the GPU.
        pdl: overlap launches (programmatic dependent launch; compute capability 9).
    """

    def __init__(
        self,
        config: Config,
        x: Tensor,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        threshold: Tensor,
        biases: Sequence[Tensor | None],
        activation: str,
        processors: int,
        pdl: bool,
    ) -> None:
        d, f, dtype = x.shape[-1], len(w_gate), x.dtype
        tokens = x.numel() // d
        strides = [row_stride(w) for w in (w_gate, w_up, w_down.t())]
        has_bias = [bias is not None for bias in biases]
        workspace = _Workspace()
        blocks = -(-f // config.gate.rows)
        handed = {
            "ACTIVATIONS_AT": workspace.place(tokens * f, dtype.itemsize),
            "ACTIVE_AT": workspace.place(blocks * config.gate.rows, 4),
            "COUNTS_AT": workspace.place(blocks, 4),
        }
        shape = {"D": d, "F": f, "TOKENS": tokens, "PAD": 1 if tokens == 1 else 16}
        self.gate = Launch.of_tile(
            kernels.gate, (blocks, 1, 1), config.gate, pdl, **shape, **handed, STRIDE=strides[0], HAS_BIAS=has_bias[0],
            PER_NEURON=threshold.numel() > 1, ACTIVATION=activation,
        )  # fmt: skip
        tile = config.up_down if isinstance(config, GemvConfig) else config.up
        programs = max(1, min(tile.programs * processors, f))
        spans = 1 << (power_of_two(blocks).bit_length() // 2)
        handed |= {"ORDER_AT": workspace.place(f, 4), "TOTAL_AT": workspace.place(1, 4)}
        shares = {
            "GATE_BLOCK": config.gate.rows,
            "GATE_BLOCKS": blocks,
            "SPANS": spans,
            "SPAN": power_of_two(blocks) // spans,
            "PROGRAMS": programs,
            "SHARE_PAD": power_of_two(-(-f // programs)),
        }
        self.up_down: Launch | None = None
        if isinstance(config, GemvConfig):
            parts = programs
            partials_at = workspace.place(parts * d, 4)
            self.up_down = Launch.of_tile(
                kernels.up_down, (programs, 1, 1), tile, pdl, D=d, D_PAD=power_of_two(d), F=f, UP_STRIDE=strides[1],
                DOWN_STRIDE=strides[2], HAS_BIAS=has_bias[1], PARTIALS_AT=partials_at, **handed, **shares,
            )  # fmt: skip
        else:
            columns = -(-d // config.down.columns)
            parts = max(1, min(config.down.programs * processors // columns, f))
            products_at = workspace.place(tokens * f, dtype.itemsize)
            partials_at = workspace.place(parts * tokens * d, 4)
            self.up = Launch.of_tile(
                kernels.up, (programs, 1, 1), tile, pdl, **shape, **handed, **shares, STRIDE=strides[1],
                HAS_BIAS=has_bias[1], PRODUCTS_AT=products_at,
            )  # fmt: skip
            self.down = Launch.of_tile(
                kernels.down, (columns, parts, 1), config.down, pdl, **shape, STRIDE=strides[2],
                ORDER_AT=handed["ORDER_AT"], TOTAL_AT=handed["TOTAL_AT"], PRODUCTS_AT=products_at,
                PARTIALS_AT=partials_at, SPLITS=parts,
            )  # fmt: skip
        outputs = tokens * d
        tile = Tile(rows=16, columns=16, warps=2, stages=1) if outputs <= 8192 else Tile(16, 64, 4, 1)
        self.reduce_partials = Launch.of_tile(
            kernels.reduce_partials, (-(-outputs // tile.columns), 1, 1), tile, pdl, D=d, TOKENS=tokens,
            HAS_BIAS=has_bias[2], PARTIALS_AT=partials_at, PARTS=parts,
        )  # fmt: skip
        self.bytes = workspace.bytes

    def run(
        self,
        x: Tensor,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        threshold: Tensor,
        biases: Sequence[Tensor | None],
    ) -> Tensor:
        """``x`` and the vectors must be contiguous."""
        y = torch.empty_like(x)
        workspace = torch.empty(self.bytes, dtype=torch.uint8, device=x.device)
        self.gate(x, w_gate, biases[0], threshold, workspace)
        if self.up_down is not None:
            self.up_down(x, w_up, w_down, biases[1], workspace)
        else:
            self.up(x, w_up, biases[1], workspace)
            self.down(w_down, workspace, y)
        self.reduce_partials(biases[2], y, workspace)
        return y


class LinearPlan:
    """The launch of a linear layer for tensors of given shapes, stride, dtype and alignment."""

    def __init__(self, tile: Tile, tokens: int, d: int, f: int, stride: int, bias: bool, pdl: bool) -> None:
        self.outputs = f
        self.launch = Launch.of_tile(
            kernels.linear, (-(-f // tile.rows), 1, 1), tile, pdl, D=d, F=f, STRIDE=stride, TOKENS=tokens,
            PAD=1 if tokens == 1 else 16, HAS_BIAS=bias,
        )  # fmt: skip

    def run(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """``x`` and the bias must be contiguous."""
        y = x.new_empty(*x.shape[:-1], self.outputs)
        self.launch(x, w, bias, y)
        return y


class ActAndMulPlan:
    """The launch of `kernels.act_and_mul` for (n, f) matrices of given strides, dtype and alignment, and any n."""

    def __init__(self, f: int, strides: Sequence[int], per_neuron: bool, activation: str) -> None:
        block = min(2048, power_of_two(f))
        self.blocks = -(-f // block)
        self.launch = Launch(
            kernels.act_and_mul, (1, self.blocks, 1), {"num_warps": max(1, block // 256)}, F=f, GATE_STRIDE=strides[0],
            UP_STRIDE=strides[1], PER_NEURON=per_neuron, ACTIVATION=activation, BLOCK_K=block,
        )  # fmt: skip
        self._rows = 1

    def run(self, gate: Tensor, up: Tensor, threshold: Tensor) -> Tensor:
        """``gate`` and ``up`` must have adjacent columns."""
        h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        if len(gate) != self._rows:
            self._rows = len(gate)
            self.launch = self.launch.on_grid((self._rows, self.blocks, 1))
        self.launch(gate, up, threshold, h)
        return h
