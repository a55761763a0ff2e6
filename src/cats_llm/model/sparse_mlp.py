"""The module that takes the place of a gated MLP."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cats_llm.kernels.backend import MAX_DECODE_TOKENS, Backend, Request
from cats_llm.kernels.backends import backend_of
from cats_llm.kernels.definition import Activation, cats_activation
from cats_llm.kernels.operators import act_and_mul, gated_mlp
from cats_llm.model.structure import GatedMLP, activation_name

if TYPE_CHECKING:
    from cats_llm.model.token_mask import TokenMask

STATE = {
    "threshold",
    "compensation",
    "score",
    "layer",
    "roles",
    "activation_name",
    "sparse",
    "expected_sparsity",
    "token_mask",
}
"""Names of what a `SparseMLP` holds beside its children, which must not have them."""


class SparseMLP(nn.Module):
    """``down(CATS_t(act(gate(x))) * up(x))`` with the projections of the dense module, under the same names.

    The projections are shared with the dense module, not copied, and are called as modules wherever something may
    have been attached to them (adapters, hooks, sharding). Where they are plain linear layers and the call is a decode
    step, the backend of the device is asked whether it has a kernel for it. Threshold and compensation follow the model
    to its device, but never to its dtype, and are not part of the state dict.

    Attributes:
        threshold: float32, () or (f,).
        score: where the threshold is (f,): the one number, of the criterion's score, that it was made from.
        layer: index of the decoder layer that owns it.
        roles: which of its children does what.
        sparse: False runs the dense function, for calibration and comparison.
        expected_sparsity: share of neurons that a token is expected to skip; chooses kernels, not what is computed.
        token_mask: knows which tokens of the running call are sparse; None if all are.
    """

    threshold: Tensor
    score: float | None
    # the compensation in the weights' dtype, made once, so that a decode step need not make it
    _cast: Tensor

    def __init__(self, mlp: GatedMLP, threshold: Tensor) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold.to(torch.float32), persistent=False)
        self.score = None
        dense = mlp.module
        # not registered: its children are ours, and the state dict must not name them twice
        self.__dict__["_dense"] = dense
        # one set of hooks and of children for both: what is attached or replaced, now or later, stays after densify
        hooks = [name for name in vars(dense) if name.startswith("_forward_") and "hooks" in name]
        for attribute in (*hooks, "_modules"):
            setattr(self, attribute, getattr(dense, attribute))
        self.layer, self.roles = mlp.layer, mlp.roles
        self.__dict__["_relufied"] = None
        self._projections = mlp.roles.projections  # once, not at every decode step
        self.activation_name = activation_name(mlp.activation)
        self.sparse = True
        self.expected_sparsity = 0.0
        self.token_mask: TokenMask | None = None
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

    @property
    def compensation(self) -> Tensor | None:
        """Float32 (d,), added to the output of sparse tokens. Assign another one; do not change it in place."""
        return getattr(self, "_compensation", None)

    @compensation.setter
    def compensation(self, value: Tensor | None) -> None:
        self._set_buffer("_compensation", value)
        self._set_buffer("_cast", None)

    def use_activation(self, activation: Activation | None) -> None:
        """Compute with another activation function (ReLUfication); None takes the dense module's own again."""
        self.__dict__["_relufied"] = activation
        self.activation_name = activation_name(self.activation)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        tokens = x.numel() // x.shape[-1]
        threshold = self.of_sparse_tokens(self.threshold, x)
        decode = tokens <= MAX_DECODE_TOKENS and not torch.is_grad_enabled()
        if decode and threshold is not None and threshold.dim() < 2:  # tokens that differ are left to PyTorch
            backend, activation = backend_of(x.device), self.activation_name
            weights = self._plain_weights(x, backend)
            if weights is not None and activation is not None:
                (w_gate, w_up, w_down), (b_gate, b_up, _) = weights
                k = self.expected_sparsity if backend.depends_on_sparsity else 0.0  # compiled code depends on it
                if backend.supports(Request(tokens, w_gate, w_up, w_down, activation, k)):
                    b_down = self._bias_with(self._added(x))
                    return gated_mlp(x, w_gate, w_up, w_down, threshold, activation, b_gate, b_up, b_down, sparsity=k)
        gate, up = self.roles.gate_and_up(self, x)
        return self._down(self._product(gate, up, threshold))

    def _down(self, h: Tensor) -> Tensor:
        """down_proj of h, (..., f), and the compensation: as its bias, which costs no launch, where it can be."""
        added, down = self._added(h), self.down_linear
        plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled(h.device.type)
        if added is not None and added.dim() == 1 and plain and _is_plain(down, h, backend_of(h.device)):
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
            and backend_of(gate.device).supports_act_and_mul(gate, up)
        ):
            return act_and_mul(gate, up, threshold, self.activation_name)
        return cats_activation(gate, threshold, self.activation) * up

    def of_sparse_tokens(self, value: Tensor, x: Tensor) -> Tensor | None:
        """A value, () or (n,), for the sparse tokens of x, (..., d), and 0 for dense ones; None if all are dense."""
        if not self.sparse:
            return None
        return value if self.token_mask is None else self.token_mask.only_sparse(value, x)

    def _added(self, x: Tensor) -> Tensor | None:
        """The compensation for the tokens of x, in its dtype: (d,), or (..., d) where tokens differ; None for none."""
        compensation = self._compensation_like(x)
        return None if compensation is None else self.of_sparse_tokens(compensation, x)

    def _plain_weights(
        self, x: Tensor, backend: Backend
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]] | None:
        """Weights and biases of gate, up and down, or None where calling the modules means more than using these."""
        linears: list[Any] = [self._modules[name] for name in self._projections]
        if torch.is_autocast_enabled(x.device.type) or not all(_is_plain(linear, x, backend) for linear in linears):
            return None
        weights: list[Tensor] = [linear.weight for linear in linears]
        biases: list[Tensor | None] = [linear.bias for linear in linears]
        if self.roles.fused:
            weights[:1] = self.roles.halves(weights[0], dim=0)
            biases[:1] = (None, None) if biases[0] is None else self.roles.halves(biases[0])
        return tuple(weights), tuple(biases)

    @torch.no_grad()
    def set_tensors(self, threshold: Tensor, compensation: Tensor | None = None, score: float | None = None) -> None:
        """Take other thresholds and another compensation; in place where shapes stay, so that captured graphs see it.

        Args:
            threshold: float32, () or (f,).
            compensation: float32 (d,).
            score: of thresholds (f,), the one number that they were made from.
        """
        device = torch.device("cpu") if self.threshold.is_meta else self.threshold.device
        self.threshold = _in_place(self.threshold, threshold, device)
        self.score = score
        old, cast = self.compensation, getattr(self, "_cast", None)
        self.compensation = None if compensation is None else _in_place(old, compensation, device)
        if compensation is not None and self.compensation is old and cast is not None:
            self._set_buffer("_cast", cast.copy_(compensation))
        self._keep_cast()

    def _compensation_like(self, y: Tensor) -> Tensor | None:
        """The compensation in the dtype and on the device of y."""
        if self.compensation is None:
            return None
        cast = getattr(self, "_cast", None)
        if cast is None or not _fits(cast, y):
            cast = self.compensation.to(y.device, y.dtype)
            if not backend_of(y.device).in_graph() and _fits(cast, self.down_linear.weight):
                self._keep_cast()
        return cast

    @torch.inference_mode(False)
    def _keep_cast(self) -> None:
        weight = self.down_linear.weight
        known = hasattr(self, "_cast") and _fits(self._cast, weight)
        if self.compensation is not None and not weight.is_meta and not known:
            self._set_buffer("_cast", self.compensation.to(weight.device, weight.dtype))

    def _set_buffer(self, name: str, value: Tensor | None) -> None:
        if hasattr(self, name):
            delattr(self, name)
        if value is not None:  # a buffer that is None would trip up accelerate
            self.register_buffer(name, value, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseMLP":
        exact, cast = (self.threshold, self.compensation), getattr(self, "_cast", None)
        super()._apply(fn, recurse)
        self.threshold = _moved(exact[0], self.threshold)
        if exact[1] is not None and self.compensation is not None:
            self.compensation = _moved(exact[1], self.compensation)
            # what a captured graph reads stays where it is as long as the weights do
            self._set_buffer("_cast", cast if self.compensation is exact[1] else None)
            self._keep_cast()
        return self

    def store_neuron_major(self, enabled: bool = True) -> None:
        """Lay down_proj's weight out so that a neuron's column is contiguous, or, to undo it, its rows.

        Decode kernels need it to skip neurons. There is still one copy, of the same logical shape (d, f) and the same
        bytes on disk. Only plain weights are touched, and only if there are kernels for their device.
        """
        if type(self.down_linear) is not nn.Linear:
            return
        weight = self.down_linear.weight
        backend = backend_of(weight.device)
        if type(weight) in backend.weight_types:
            weight.data = backend.neuron_major(weight.data) if enabled else weight.data.contiguous()

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


def _is_plain(linear: nn.Module, x: Tensor, backend: Backend) -> bool:
    """Whether calling the layer with x does no more than a product with a weight that kernels can read."""
    return (
        type(linear) is nn.Linear
        and "forward" not in linear.__dict__  # accelerate's hooks replace the method of the instance
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and type(linear.weight) in backend.weight_types
        and linear.weight.device == x.device
        and linear.weight.dtype == x.dtype
    )


def _in_place(old: Tensor | None, new: Tensor, device: torch.device) -> Tensor:
    """``new`` in the memory of ``old`` if it fits there, else a copy of it on the device."""
    if old is not None and old.shape == new.shape and not old.is_meta:
        return old.copy_(new)
    return new.to(device, torch.float32, copy=True)


def _moved(exact: Tensor, like: Tensor) -> Tensor:
    if exact.is_meta or like.is_meta:
        return torch.empty_like(exact, device=like.device)
    return exact.to(like.device)


def _fits(tensor: Tensor, like: Tensor) -> bool:
    return tensor.dtype == like.dtype and tensor.device == like.device
