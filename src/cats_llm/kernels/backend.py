"""What the model asks of a device's kernels. Which device has which backend is said in backends.py."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cats_llm.dtypes import DTYPES

FLOAT_DTYPES = tuple(DTYPES.values())
"""What all kernels compute with."""

MAX_DECODE_TOKENS = 16
"""Calls with more tokens than this are prefill and use the model's own matrix products."""


class Request(NamedTuple):
    """A decode step of a gated MLP.

    Attributes:
        tokens: number of rows of x, over all sequences.
        w_gate, w_up, w_down: the weights as the model holds them, (f, d), (f, d) and (d, f).
        activation: a key of `definition.ACTIVATIONS`.
        sparsity: share of neurons that a token is expected to skip; for choosing, not for computing.
    """

    tokens: int
    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor
    activation: str
    sparsity: float = 0.0


class Backend:
    """The kernels of one type of device. This class has none, and stands for devices without a backend.

    A backend says which calls its operators (`kernels.operators`) can and should serve, and lays weights out for them;
    torch's dispatcher finds the implementation. What is not supported, the model computes with its own layers. All but
    `neuron_major` is asked at every decode step: cheap, without waiting for the device, constant to torch.compile.

    Attributes:
        name: what tables and tests call it.
        built: whether this installation has its kernels.
        weight_types: classes of weights that its kernels read, which excludes sharded and quantised ones.
        depends_on_sparsity: whether the expected sparsity matters to it. Code that is compiled depends on it then.
        linear_in_graphs_only: whether `operators.linear` costs more than it saves where Python launches each kernel.
    """

    name = "plain"
    built = False
    weight_types: tuple[type, ...] = (nn.Parameter,)
    depends_on_sparsity = False
    linear_in_graphs_only = False

    def available(self) -> bool:
        """Whether the kernels are there and can run here."""
        return self.built

    def supports(self, request: Request) -> bool:
        """Whether `operators.gated_mlp` can serve the request, reading fewer weights, and should."""
        return False

    def supports_linear(self, x: Tensor, w: Tensor) -> bool:
        """Whether `operators.linear` can and should compute ``F.linear(x, w)``."""
        return False

    def supports_act_and_mul(self, gate: Tensor, up: Tensor) -> bool:
        """Whether `operators.act_and_mul` can compute the step between the matrix products of prefill."""
        return False

    def in_graph(self) -> bool:
        """Whether this call is compiled or captured, so that launches cost the processor nothing."""
        return torch.compiler.is_compiling()

    def neuron_major(self, weight: Tensor) -> Tensor:
        """``weight``, (d, f), with the d numbers of a neuron adjacent if the kernels need it: a copy, or itself."""
        if not self.available() or (weight.stride(0) == 1 and weight.shape[0] > 1):
            return weight
        return self._copy_neuron_major(weight)

    def _copy_neuron_major(self, weight: Tensor) -> Tensor:
        return weight.t().contiguous().t()
