"""The operators on a GPU: arguments checked once for every kind of call, then the plan for it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor
from triton.runtime.errors import OutOfResources  # type: ignore[import-untyped]

from cats_llm.kernels.backend import FLOAT_DTYPES, MAX_DECODE_TOKENS
from cats_llm.kernels.definition import ACTIVATIONS
from cats_llm.kernels.gpu import plans, tuning
from cats_llm.kernels.gpu.config import Config, Tile, default, linear_tile, smaller

_MAX_NEURONS = 1 << 20  # positions are multiplied by numbers of programs in 32 bits

_mlp_plans: dict[tuple[Any, ...], plans.MlpPlan] = {}
_linear_plans: dict[tuple[Any, ...], plans.LinearPlan] = {}
_act_and_mul_plans: dict[tuple[Any, ...], plans.ActAndMulPlan] = {}


def forget_plans() -> None:
    """Make plans anew, after tuning."""
    _mlp_plans.clear()


def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    threshold: Tensor,
    activation: str = "silu",
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    sparsity: float = 0.0,
    config: Config | None = None,
) -> Tensor:
    """See `operators.gated_mlp`. ``config`` overrides tuning and defaults."""
    d = x.shape[-1] if x.dim() else 0
    tokens = x.numel() // d if d else 0
    if tokens > MAX_DECODE_TOKENS:
        parts = x.reshape(-1, d).split(MAX_DECODE_TOKENS)
        weights = (w_gate, w_up, w_down, threshold, activation, b_gate, b_up, b_down, sparsity, config)
        return torch.cat([gated_mlp(part, *weights) for part in parts]).view(x.shape)
    x, threshold = x.contiguous(), threshold.contiguous()
    biases = tuple(b if b is None else b.contiguous() for b in (b_gate, b_up, b_down))
    tensors = (x, w_gate, w_up, w_down, threshold, *biases)
    key = (
        tokens, x.device, tuning.bucket(sparsity), config, activation,
        *((t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16) if t is not None else None for t in tensors[1:]),
        x.shape[-1:], x.dtype, x.data_ptr() % 16,
    )  # fmt: skip
    plan = _mlp_plans.get(key)
    if plan is not None:
        with _on(x):
            return plan.run(x, w_gate, w_up, w_down, threshold, biases)
    _check_mlp(x, w_gate, w_up, w_down, threshold, activation, biases)
    if tokens == 0:
        return torch.empty_like(x)
    processors, shared_memory, pdl = device_facts(x.device)
    chosen = config or tuning.lookup(x.device, tokens, d, len(w_gate), x.dtype, sparsity)
    chosen = chosen or default(tokens, d, x.dtype.itemsize, sparsity**tokens, shared_memory)
    while True:
        plan = plans.MlpPlan(chosen, x, w_gate, w_up, w_down, threshold, biases, activation, processors, pdl)
        try:
            with _on(x):
                y = plan.run(x, w_gate, w_up, w_down, threshold, biases)
        except OutOfResources:
            less = smaller(chosen)
            if less is None or config is not None:
                raise
            chosen = less
        else:
            _mlp_plans[key] = plan
            return y


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `operators.linear`."""
    d = x.shape[-1] if x.dim() else 0
    tokens = x.numel() // d if d else 0
    if tokens > MAX_DECODE_TOKENS:
        parts = x.reshape(-1, d).split(MAX_DECODE_TOKENS)
        return torch.cat([linear(part, w, bias) for part in parts]).view(*x.shape[:-1], w.shape[0])
    x = x.contiguous()
    bias = bias if bias is None else bias.contiguous()
    key = (
        tokens, x.device, x.dtype, d, w.shape, w.stride(), w.dtype, w.device,
        x.data_ptr() % 16, w.data_ptr() % 16,
        None if bias is None else (bias.shape, bias.dtype, bias.device, bias.data_ptr() % 16),
    )  # fmt: skip
    plan = _linear_plans.get(key)
    if plan is None:
        _check_matrix("w", w, (w.shape[0] if w.dim() else 0, d), x)
        _check_vector("bias", bias, w.shape[0], x)
        if tokens == 0:
            return x.new_empty(*x.shape[:-1], w.shape[0])
        tile = linear_tile(d) if tokens == 1 else Tile(32, 64, 2, 4)
        pdl = device_facts(x.device)[2]
        plan = plans.LinearPlan(tile, tokens, d, w.shape[0], plans.row_stride(w), bias is not None, pdl)
        _linear_plans[key] = plan
    with _on(x):
        return plan.run(x, w, bias)


def act_and_mul(gate: Tensor, up: Tensor, threshold: Tensor, activation: str) -> Tensor:
    """See `operators.act_and_mul`."""
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device or gate.dtype not in FLOAT_DTYPES:
        raise ValueError("cats_llm: gate and up must agree in shape, device and dtype (float32, bfloat16 or float16)")
    f = gate.shape[-1]
    _check_threshold(threshold, f, gate)
    _check_activation(activation)
    if gate.numel() == 0:
        return torch.empty_like(gate, memory_format=torch.contiguous_format)
    a, b = (t if t.stride(1) == 1 or f == 1 else t.contiguous() for t in (gate.reshape(-1, f), up.reshape(-1, f)))
    threshold = threshold.contiguous()
    key = (
        f, a.stride(0), b.stride(0), gate.dtype, gate.device, threshold.numel(), activation,
        a.data_ptr() % 16, b.data_ptr() % 16, threshold.data_ptr() % 16,
    )  # fmt: skip
    plan = _act_and_mul_plans.get(key)
    if plan is None:
        plan = plans.ActAndMulPlan(f, (a.stride(0), b.stride(0)), threshold.numel() > 1, activation)
        _act_and_mul_plans[key] = plan
    with _on(gate):
        return plan.run(a, b, threshold).view(gate.shape)


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def device_facts(device: torch.device) -> tuple[int, int, bool]:
    """Multiprocessors, bytes of shared memory for a program, and whether launches may overlap."""
    if device.type != "cuda":  # Triton's interpreter
        return 2, 48 << 10, False
    facts: Any = torch.cuda.get_device_properties(device)
    return facts.multi_processor_count, facts.shared_memory_per_block_optin, facts.major >= 9


def _check_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    threshold: Tensor,
    activation: str,
    biases: tuple[Tensor | None, ...],
) -> None:
    if x.dim() < 1 or x.shape[-1] == 0 or x.dtype not in FLOAT_DTYPES:
        raise ValueError("cats_llm: x must be (..., d) in float32, bfloat16 or float16")
    d, f = x.shape[-1], w_gate.shape[0] if w_gate.dim() else 0
    if not 0 < f <= _MAX_NEURONS:
        raise ValueError(f"cats_llm: w_gate must have 1 to {_MAX_NEURONS} rows")
    _check_matrix("w_gate", w_gate, (f, d), x)
    _check_matrix("w_up", w_up, (f, d), x)
    if w_down.dim() != 2:
        raise ValueError("cats_llm: w_down has the wrong shape")
    _check_matrix("w_down.t(), which must be stored neuron-major,", w_down.t(), (f, d), x)
    _check_threshold(threshold, f, x)
    _check_activation(activation)
    for name, bias, size in zip(("b_gate", "b_up", "b_down"), biases, (f, f, d), strict=True):
        _check_vector(name, bias, size, x)


def _check_matrix(name: str, w: Tensor, shape: tuple[int, int], x: Tensor) -> None:
    if w.shape != shape:
        raise ValueError(f"cats_llm: {name} has the wrong shape")
    if w.dtype != x.dtype or w.device != x.device:
        raise ValueError(f"cats_llm: {name} must have the dtype and device of x")
    if shape[1] > 1 and w.stride(1) != 1:
        raise ValueError(f"cats_llm: {name} must have adjacent columns")


def _check_vector(name: str, v: Tensor | None, size: int, x: Tensor) -> None:
    if v is not None and (v.shape != (size,) or v.dtype != x.dtype or v.device != x.device):
        raise ValueError(f"cats_llm: {name} must be ({size},) with the dtype and device of x")


def _check_threshold(threshold: Tensor, f: int, x: Tensor) -> None:
    if threshold.dtype != torch.float32 or threshold.device != x.device:
        raise ValueError("cats_llm: threshold must be float32 on the device of x")
    if threshold.shape not in ((), (1,), (f,)):
        raise ValueError("cats_llm: threshold must have the shape () or (f,)")


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"cats_llm: unknown activation {activation}")


INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1), on CPU tensors."""
