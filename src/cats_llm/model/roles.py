"""Which children of a module are gate, up and down: found by running the module's own code on stand-ins for them."""

import copy
import inspect
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from cats_llm.kernels.definition import ACTIVATIONS, Activation

Key = TypeVar("Key")

# what a clamp or a top-k does shows only where numbers are large; no family clamps above the largest of these
_SCALES = (0.3, 3.0, 30.0, 300.0)
_TOKENS_A_SCALE = 6
# of the norm of a token's output; stand-ins compute in float32
_TOLERANCE = 1e-3
# children that are the identity in evaluation mode
_NO_FUNCTION = (nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class Roles:
    """How a module computes ``down(act(gate(x)) * up(x))``.

    Attributes:
        gate, up, down: names of the children; gate and up are the same where one projection gives both.
        activation: name of the child that is the activation; None if the code calls a function.
        function: key of `ACTIVATIONS` of that function, where there is no such child.
        gate_first: of a projection that gives both, the gate is the first half.
    """

    gate: str
    up: str
    down: str
    activation: str | None
    function: str | None = None
    gate_first: bool = True

    @property
    def fused(self) -> bool:
        """One projection gives gate and up."""
        return self.gate == self.up

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of the two or three projections."""
        return tuple(dict.fromkeys((self.gate, self.up, self.down)))

    def linear(self, module: nn.Module, role: str) -> nn.Linear:
        """The projection of a module that plays the role "gate", "up" or "down"."""
        return cast("nn.Linear", module._modules[getattr(self, role)])

    def activation_of(self, module: nn.Module) -> Activation:
        """The activation function of a module."""
        if self.activation is not None:
            # not by attribute: a sparse MLP has some of its own
            return cast("Activation", module._modules[self.activation])
        return ACTIVATIONS[str(self.function)]

    def halves(self, both: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
        """Gate and up in the output, the weight or the bias of the projection that gives both; ``dim`` has size 2 f."""
        one, other = both.chunk(2, dim=dim)
        return (one, other) if self.gate_first else (other, one)

    def gate_and_up(self, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x W_gate`` and ``x W_up``, (..., f), through the module's own projections."""
        if self.fused:
            return self.halves(self.linear(module, "gate")(x))
        return self.linear(module, "gate")(x), self.linear(module, "up")(x)

    def dense_forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """``down(act(gate(x)) * up(x))`` through the module's own parts."""
        gate, up = self.gate_and_up(module, x)
        y: Tensor = self.linear(module, "down")(self.activation_of(module)(gate) * up)
        return y


@dataclass(frozen=True)
class Mismatch:
    """A module that has the projections of a gated MLP but is none.

    Attributes:
        reason: why, as the end of a sentence.
        similar: it takes and gives what a gated MLP does, but computes another function.
    """

    reason: str
    similar: bool = False


def find_roles(module: nn.Module) -> Roles | Mismatch | None:
    """The roles of a module's children if it computes a gated MLP and nothing else.

    It must own two or three projections of matching shapes, no other weights, and take one tensor. Its code is run with
    random stand-ins for the projections, of the true sizes but rank one, so that it costs no time, reads no weight, and
    works on the meta device. The answer does not depend on any name.

    Returns:
        The roles; why it is none, if it has the shapes of one; or None.
    """
    shapes = {name: shape for name, child in module.named_children() if (shape := _projection_shape(child))}
    candidates = list(_assignments(shapes))
    if not candidates or not _takes_one_tensor(module):
        return None
    extra = [name for name, child in module.named_children() if name not in shapes and _has_weights(child)]
    extra += [name for name, _ in module.named_parameters(recurse=False)]
    if extra:
        return Mismatch(f"it has other weights too ({extra[0]})")
    stand_ins = {name: _StandIn(*shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    own_device = cast("Tensor", module.get_submodule(next(iter(shapes))).weight).device
    # query, key and value of an attention have such shapes, and take more than one tensor
    square = all(out == into for out, into in shapes.values())
    mismatch = None if square else Mismatch("it cannot be run by itself")
    # code that runs on a GPU only is tried there
    for device in dict.fromkeys([torch.device("cpu"), own_device]):
        if device.type == "meta":
            continue
        answer = _match(module, stand_ins, candidates, device)
        if answer is not None:
            return answer
    return mismatch


def holds_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of several MLPs side by side, stacked: (E, 2 f, d) and (E, d, f), or the like.

    Each may be transposed, and may be its own or that of a child.
    """
    children = [shapes[0] for child in module.children() if len(shapes := _stacked_shapes(child)) == 1]
    for stacks in (_stacked_shapes(module), children):
        turned = product(*([shape[1:], shape[:0:-1]] for shape in stacks)) if len(stacks) <= 3 else ()
        if any(any(_assignments(dict(enumerate(shapes)))) for shapes in turned):
            return True
    return False


def _stacked_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    if isinstance(module, nn.modules.conv._ConvNd):
        return []
    return [tuple(p.shape) for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1]


def fingerprint(module: nn.Module) -> Hashable:
    """Equal for modules of a model for which `find_roles` gives the same answer; layers are mostly alike."""

    def plain(owner: nn.Module) -> tuple[tuple[str, Hashable], ...]:
        return tuple(
            (key, value if isinstance(value, (int, float, str, type(None))) else id(value))
            for key, value in vars(owner).items()
            if key[:1] != "_"
        )

    parts = tuple(
        (name, type(child), _projection_shape(child) or plain(child)) for name, child in module.named_children()
    )
    return type(module), plain(module), parts, len(list(module.parameters(recurse=False)))


def _match(
    module: nn.Module, stand_ins: dict[str, "_StandIn"], candidates: list[tuple[str, str, str]], device: torch.device
) -> Roles | Mismatch | None:
    """The roles that explain the module's output; else why none do; None if it cannot be run."""
    twin = _twin(module, {name: child.to(device) for name, child in stand_ins.items()})
    x = _probe(stand_ins[candidates[0][0]].row.numel()).to(device)
    with torch.no_grad(), device:  # the caller may have made another device the default
        try:
            y = type(module).forward(twin, x)
        except Exception:  # whatever a foreign module raises when it is given what it does not expect
            return None
        if not isinstance(y, Tensor) or y.shape != x.shape:
            return None
        limited = False
        for roles in _all_roles(twin, candidates):
            errors = _errors(roles, twin, x, y)
            if errors is None:
                continue
            if bool((errors <= _TOLERANCE).all()):
                if _is_elementwise(roles.activation_of(twin)):
                    return roles
                return Mismatch("its activation looks at all neurons at once", similar=True)
            limited = limited or bool((errors[: 2 * _TOKENS_A_SCALE] <= _TOLERANCE).all())
    return Mismatch("it limits large values" if limited else "it has one step more", similar=True)


def _all_roles(twin: nn.Module, candidates: list[tuple[str, str, str]]) -> Iterator[Roles]:
    """Every way in which the children could be used."""
    children = [
        name
        for name, child in twin.named_children()
        if not isinstance(child, (_StandIn, *_NO_FUNCTION)) and not _has_weights(child)
    ]
    activations: list[tuple[str | None, str | None]] = [(name, None) for name in children]
    activations += [(None, key) for key in ACTIVATIONS]
    for gate, up, down in candidates:
        for name, key in activations:
            for gate_first in (True, False) if gate == up else (True,):
                yield Roles(gate, up, down, name, key, gate_first)


def _errors(roles: Roles, twin: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
    """How far each token's output is from what the roles give, relative to its norm; None if they give nothing."""
    try:
        expected = roles.dense_forward(twin, x)
    except Exception:  # a child that is no activation
        return None
    if expected.shape != y.shape:
        return None
    size = expected.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    errors: Tensor = (y - expected).float().norm(dim=-1) / size
    return errors.reshape(-1)


def _is_elementwise(activation: Activation) -> bool:
    x = torch.linspace(-4.0, 4.0, 33)
    try:
        return torch.allclose(activation(x), activation(x[:, None])[:, 0], rtol=1e-5, atol=1e-6)
    except Exception:  # a foreign function that wants another shape
        return False


def _probe(d: int) -> Tensor:
    """Random tokens from small to large, (1, T, d)."""
    generator = torch.Generator("cpu").manual_seed(0)
    scales = torch.tensor(_SCALES, device="cpu").repeat_interleave(_TOKENS_A_SCALE)
    x = torch.randn(1, len(scales), d, generator=generator, device="cpu", dtype=torch.float32)
    return x * scales[:, None]


def _twin(module: nn.Module, stand_ins: dict[str, "_StandIn"]) -> nn.Module:
    """The module with other children in evaluation mode; the module itself is not touched."""
    twin = copy.copy(module)
    others = {name: nn.Identity() if isinstance(c, _NO_FUNCTION) else c for name, c in module.named_children()}
    twin.__dict__["_modules"] = others | stand_ins
    twin.__dict__["training"] = False
    return twin


class _StandIn(nn.Module):
    """A projection of rank one, (in) -> (out): its size in time and memory is that of a vector."""

    bias = None

    def __init__(self, out_features: int, in_features: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(seed + 1)
        self.out_features, self.in_features = out_features, in_features
        self.row, self.column = (
            torch.randn(n, generator=generator, device="cpu", dtype=torch.float32) for n in (in_features, out_features)
        )
        self.row /= in_features**0.5
        self.training = False

    @property
    def weight(self) -> Tensor:
        """(out, in), for code that reads it."""
        return torch.outer(self.column, self.row)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return (x.to(self.row) @ self.row).unsqueeze(-1) * self.column

    def to(self, device: Any) -> "_StandIn":  # type: ignore[override]
        """On another device."""
        moved = copy.copy(self)
        moved.row, moved.column = self.row.to(device), self.column.to(device)
        return moved


def _assignments(shapes: Mapping[Key, tuple[int, ...]]) -> Iterator[tuple[Key, Key, Key]]:
    """(gate, up, down) of which the shapes allow it; gate and up are the same where one projection gives both."""
    if len(shapes) == 2:
        for both, down in permutations(shapes):
            d, f = shapes[down]
            if shapes[both] == (2 * f, d):
                yield both, both, down
    elif len(shapes) == 3:
        for gate, up, down in permutations(shapes):
            d, f = shapes[down]
            if shapes[gate] == shapes[up] == (f, d):
                yield gate, up, down


def _projection_shape(child: nn.Module) -> tuple[int, int] | None:
    weight = getattr(child, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(child, nn.Embedding):
        return None
    return weight.shape[0], weight.shape[1]


def _has_weights(child: nn.Module) -> bool:
    return next(child.parameters(), None) is not None


def _takes_one_tensor(module: nn.Module) -> bool:
    try:
        inspect.signature(type(module).forward).bind(module, None)
    except (TypeError, ValueError):
        return False
    return True
