"""What a model's MLP answers on a GPU, against the definition in float64: wrong results have no speed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_llm.benchmark.cuda_mlp import DENSE, kernel_of
from cats_llm.benchmark.models import MLPs, thresholds_for
from cats_llm.benchmark.shapes import Shape
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.dtypes import dtype_name
from cats_llm.kernels.definition import ACTIVATIONS, gate_activation, gated_mlp, keep_mask
from cats_llm.kernels.gpu.graphs import captured
from cats_llm.model.sparsify import sparsify
from cats_llm.model.structure import find_gated_mlps

_UNDECIDED = 1e-5  # an activation so near the threshold may fall on either side, by the order of a sum


@torch.no_grad()
def check_mlp(
    shape: Shape, dtype: torch.dtype, sparsities: list[float], tokens: int, device: str = "cuda"
) -> list[dict[str, Any]]:
    """Compare one sparse MLP of a shape with the definition in float64, the gate rounded to ``dtype`` as it says.

    Returns:
        A row for each sparsity. ``error`` and ``plain_error`` are those of the model's MLP and of the plain definition
        in ``dtype``, ``undecided`` what the neurons at the threshold are worth, all relative to the norm of the result.
        ``same_bits`` means in two runs and in a replayed graph whose input was changed after its capture. ``right``: no
        less exact than twice the plain definition and, if the kernel is ours, the same bits.
    """
    torch.manual_seed(0)
    model = MLPs(shape, 1, dtype, device)
    x = torch.randn(tokens, shape.hidden_size, device=device).to(dtype)
    mlp = find_gated_mlps(model)[0]
    module: Any = mlp.module
    gate, up, down = (linear.weight.clone() for linear in (module.gate_proj, module.up_proj, module.down_proj))
    thresholds, _ = thresholds_for(mlp.gate_linear(x), sparsities)
    rows = []
    for k, at in zip(sparsities, thresholds, strict=True):
        threshold = at * (1 - 1e-4)  # beside the activation that it was taken from
        sparsify(model, CatsConfig({0: float(threshold)}, sparsity=k, layer_sparsity={0: k}))

        truth = _exact(x, gate, up, down, threshold)
        y = model(x)[0]
        held = torch.zeros_like(x)
        results: list[Tensor] = []
        replay = captured(lambda held=held, results=results: results.append(model(held)[0]))  # type: ignore[misc]
        held.copy_(x)
        replay()
        errors = {
            "error": y.double() - truth,
            "plain_error": gated_mlp(x, gate, up, down, threshold).double() - truth,
            "undecided": _exact(x, gate, up, down, threshold - _UNDECIDED)
            - _exact(x, gate, up, down, threshold + _UNDECIDED),
        }
        sizes = {name: float(error.norm() / truth.norm()) for name, error in errors.items()}
        bound = 2 * sizes["plain_error"] + sizes["undecided"] + torch.finfo(dtype).eps
        same = torch.equal(y, model(x)[0]) and torch.equal(y, results[-1])
        kernel = kernel_of(model, tokens, k)
        rows.append(
            {
                "shape": shape.name,
                "dtype": dtype_name(dtype),
                "tokens": tokens,
                "sparsity": k,
                "kernel": kernel,
                **sizes,
                "same_bits": same,
                "right": sizes["error"] <= bound and (same or kernel == DENSE),
            }
        )
    return rows


def _exact(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, threshold: Tensor) -> Tensor:
    """The definition in float64; only the gate is rounded, since that decides which neurons are kept."""
    gate = F.linear(x.double(), w_gate.double()).to(x.dtype)
    a = gate_activation(gate, ACTIVATIONS["silu"])
    kept = torch.where(keep_mask(a, threshold), a, 0.0).double()
    return F.linear(kept * F.linear(x.double(), w_up.double()), w_down.double())
