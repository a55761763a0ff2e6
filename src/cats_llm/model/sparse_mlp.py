"""The module that takes the place of a gated MLP."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cats_llm.kernels import cpu, gpu, registry
from cats_llm.kernels.definition import Activation, cats_activation
from cats_llm.model.structure import GatedMLP, activation_name
from cats_llm.model.vectors import ExactVectors

if TYPE_CHECKING:
    from cats_llm.model.coverage import TokenCoverage

# where nn.Module keeps the hooks of its calls
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


STATE = {
    "threshold",
    "compensation",
    "score",
    "layer",
    "roles",
    "activation_name",
    "sparse",
    "expected_sparsity",
    "tokens",
}
"""Names of what a `SparseMLP` holds beside its children, which must not have them."""


class SparseMLP(ExactVectors):
    """``down(CATS_t(act(gate(x))) * up(x))`` with the projections of the dense module, under the same names.

    The projections are shared with the dense module, not copied, and are called as modules wherever something may
    have been attached to them (adapters, hooks, sharding). Where they are plain linear layers and the call is a decode
    step, the kernel registry chooses the implementation.

    Attributes:
        threshold, compensation, score: see `ExactVectors`.
        layer: index of the decoder layer that owns it.
        roles: which of its children does what.
        sparse: False runs the dense function, for calibration and comparison.
        expected_sparsity: share of neurons that a token is expected to skip; chooses kernels, not what is computed.
        tokens: knows which tokens of the running call are sparse; None if all are.
    """

    def __init__(self, mlp: GatedMLP, threshold: Tensor) -> None:
        super().__init__(threshold)
        dense = mlp.module
        # not registered: its children are ours, and the state dict must not name them twice
        self.__dict__["_dense"] = dense
        # one set of hooks and of children for both: what is attached or replaced, now or later, stays after densify
        for attribute in (*_HOOKS, "_modules"):
            setattr(self, attribute, getattr(dense, attribute))
        self.layer, self.roles = mlp.layer, mlp.roles
        self.__dict__["_relufied"] = None
        self._projections = mlp.roles.projections  # once, not at every decode step
        self.activation_name = activation_name(mlp.activation)
        self.sparse = True
        self.expected_sparsity = 0.0
        self.tokens: TokenCoverage | None = None
        self.train(dense.training)

    @property
    def activation(self) -> Activation:
        """The activation function."""
        relufied: Activation | None = self.__dict__["_relufied"]
        return relufied or self.roles.activation_of(self)

    @property
    def down_linear(self) -> nn.Linear:
        """The projection back to the hidden size."""
        return self.roles.linear(self, "down")

    def use_activation(self, activation: Activation | None) -> None:
        """Compute with another activation function (ReLUfication); None takes the dense module's own again."""
        self.__dict__["_relufied"] = activation
        self.activation_name = activation_name(self.activation)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        tokens = x.numel() // x.shape[-1]
        threshold = self.threshold_for(x)
        one_for_all = threshold is not None and threshold.dim() < 2
        if one_for_all and tokens <= registry.MAX_DECODE_TOKENS and not torch.is_grad_enabled():
            weights = self._plain_weights(x)
            if weights is not None and self.activation_name is not None:
                (w_gate, w_up, w_down), biases = weights
                k = self.expected_sparsity if x.is_cuda else 0.0  # compiled code depends on it
                kernel = registry.best(registry.Request(tokens, w_gate, w_up, w_down, self.activation_name, k))
                if kernel.reads_less:
                    biases = (*biases[:-1], self._bias_with(self._added(x)))
                    return kernel.run(x, w_gate, w_up, w_down, threshold, self.activation_name, *biases, sparsity=k)
        gate, up = self.roles.gate_and_up(self, x)
        return self._down(self._product(gate, up, threshold))

    def _down(self, h: Tensor) -> Tensor:
        """down_proj of h, (..., f), and the compensation: as its bias, which costs no launch, where it can be."""
        added, down = self._added(h), self.down_linear
        plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled(h.device.type)
        if added is not None and added.dim() == 1 and plain and _is_plain(down, h):
            return F.linear(h, down.weight, self._bias_with(added))
        y: Tensor = down(h)
        return y if added is None else y + added.to(y.device, y.dtype)

    def _bias_with(self, added: Tensor | None) -> Tensor | None:
        """down_proj's bias and the compensation."""
        bias: Tensor | None = self.down_linear.bias
        if bias is None or added is None:
            return bias if added is None else added
        return bias + added

    def _product(self, gate: Tensor, up: Tensor, threshold: Tensor | None) -> Tensor:
        """The activation of ``gate``, thresholded unless there is no threshold, times ``up``."""
        if threshold is None:
            a: Tensor = self.activation(gate)
            return a * up
        threshold = threshold.to(gate.device)
        if (
            self.activation_name is not None
            and threshold.dim() <= 1  # tokens that differ are rare, and left to PyTorch
            and not torch.is_grad_enabled()
            and gpu.supports_product(gate, up)
        ):
            return gpu.product(gate, up, threshold, self.activation_name)
        return cats_activation(gate, threshold, self.activation) * up

    def threshold_for(self, x: Tensor) -> Tensor | None:
        """The threshold of x, (..., d): (), (f,), or (..., 1 or f) where tokens differ; None if all are dense."""
        return self.of_sparse_tokens(self.threshold, x)

    def of_sparse_tokens(self, value: Tensor, x: Tensor) -> Tensor | None:
        """A value, () or (n,), for the sparse tokens of x, (..., d), and 0 for dense ones; None if all are dense."""
        if not self.sparse:
            return None
        return value if self.tokens is None else self.tokens.only_sparse(value, x)

    def _added(self, x: Tensor) -> Tensor | None:
        """The compensation for the tokens of x, in its dtype: (d,), or (..., d) where tokens differ; None for none."""
        compensation = self._compensation_like(x)
        return None if compensation is None else self.of_sparse_tokens(compensation, x)

    def _plain_weights(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]] | None:
        """Weights and biases of gate, up and down, or None where calling the modules means more than using these."""
        linears: list[Any] = [self._modules[name] for name in self._projections]
        if torch.is_autocast_enabled(x.device.type) or not all(_is_plain(linear, x) for linear in linears):
            return None
        weights: list[Tensor] = [linear.weight for linear in linears]
        biases: list[Tensor | None] = [linear.bias for linear in linears]
        if self.roles.fused:
            weights[:1] = self.roles.halves(weights[0], dim=0)
            biases[:1] = (None, None) if biases[0] is None else self.roles.halves(biases[0])
        return tuple(weights), tuple(biases)

    def store_neuron_major(self, enabled: bool = True) -> None:
        """Lay down_proj's weight out so that a neuron's column is contiguous, or, to undo it, its rows.

        Decode kernels need it to skip neurons. There is still one copy, of the same logical shape (d, f) and the same
        bytes on disk. Only plain weights are touched, and only if there is a kernel for their device.
        """
        weight = self.down_linear.weight
        if type(self.down_linear) is not nn.Linear or type(weight) is not nn.Parameter:
            return
        kernels = {"cpu": cpu, "cuda": gpu}.get(weight.device.type)
        if kernels is None:
            return
        if not enabled:
            weight.data = weight.data.contiguous()
        elif kernels.available() and (weight.stride(0) != 1 or weight.shape[0] == 1):
            weight.data = kernels.neuron_major(weight.data)

    def dense_module(self) -> nn.Module:
        """The dense module that this one replaced, with the projections as they are now."""
        self.store_neuron_major(False)
        dense: nn.Module = self.__dict__["_dense"]
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        scalar = self.threshold.dim() == 0 and not self.threshold.is_meta
        shown = f"{self.threshold.item():.4g}" if scalar else tuple(self.threshold.shape)
        return f"threshold={shown}" + (", compensation" if self.compensation is not None else "")


def _is_plain(linear: nn.Module, x: Tensor) -> bool:
    return (
        type(linear) is nn.Linear
        and "forward" not in linear.__dict__  # accelerate's hooks replace the method of the instance
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and type(linear.weight) is nn.Parameter  # not a DTensor, nor a quantised tensor
        and linear.weight.device == x.device
        and linear.weight.dtype == x.dtype
    )
