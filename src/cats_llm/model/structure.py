"""Find the gated MLPs of a language model by their parts, never by the names of model families."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from cats_llm.errors import CatsError
from cats_llm.kernels.definition import ACTIVATIONS

SPLIT_PARTS = ("gate_proj", "up_proj", "down_proj")
FUSED_PARTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class GatedMLP:
    """A module that computes ``down(act(gate(x)) * up(x))``.

    Attributes:
        layer: index of the decoder layer that owns it.
        name: path of the module in the model.
        parent: the module that owns it, under the last part of ``name``.
        module: the module itself, dense or already sparse.
        fused: gate and up are the two halves of one gate_up_proj.
        activation: the activation function, a module without parameters.
    """

    layer: int
    name: str
    parent: nn.Module
    module: nn.Module
    fused: bool
    activation: nn.Module

    @property
    def gate_linear(self) -> nn.Linear:
        """The projection whose output holds the gate: gate_proj, or the fused gate_up_proj."""
        return cast("nn.Linear", self.module.gate_up_proj if self.fused else self.module.gate_proj)

    @property
    def down_linear(self) -> nn.Linear:
        """The projection back to the hidden size."""
        return cast("nn.Linear", self.module.down_proj)

    def gate_of(self, output: Tensor) -> Tensor:
        """The gate, (..., f), in the output of `gate_linear`."""
        return output.chunk(2, dim=-1)[0] if self.fused else output

    @property
    def hidden_size(self) -> int:
        """Size d of the input and output."""
        return int(self.down_linear.weight.shape[0])

    @property
    def intermediate_size(self) -> int:
        """Number f of neurons."""
        return int(self.down_linear.weight.shape[1])


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return cast("nn.Module", get_base_model()) if callable(get_base_model) else model


def decoder_of(model: nn.Module) -> nn.Module:
    """The text decoder of a model, without heads and towers; a model that knows of none is its own."""
    base = unwrap(model)
    get_decoder = getattr(base, "get_decoder", None)
    return cast("nn.Module", get_decoder()) if callable(get_decoder) else base


def find_gated_mlps(model: nn.Module) -> list[GatedMLP]:
    """All gated MLPs of the model's text decoder, in the order of its layers.

    A gated MLP is a module that owns gate_proj, up_proj and down_proj (or gate_up_proj and down_proj) of matching
    shapes and one activation without parameters. Vision and audio towers of multimodal models are left alone.

    Raises:
        CatsError: there is none, the model routes tokens through experts, or the layers cannot be told apart.
    """
    model = unwrap(model)
    kind = type(model).__name__
    decoder = decoder_of(model)
    paths = {module: name for name, module in model.named_modules()}
    prefix = paths.get(decoder, "")
    found = []
    for name, module in decoder.named_modules(prefix=prefix):
        if name.rpartition(".")[2] == "experts":
            raise CatsError(
                f"{kind} routes tokens through experts ({name}); CATS works on models with one gated MLP a layer."
            )
        activation = _activation_of(module)
        if activation is not None:
            parent = model.get_submodule(name.rpartition(".")[0])
            found.append(GatedMLP(_layer_index(name, kind), name, parent, module, _is_fused(module), activation))
    if not found:
        raise CatsError(
            f"{kind} has no gated MLP (gate_proj, up_proj and down_proj, or gate_up_proj and down_proj, with an "
            "activation between them), which CATS needs; Llama, Mistral, Qwen, Gemma and Phi-3 models have one a layer."
        )
    by_layer: dict[int, str] = {}
    for mlp in found:
        if mlp.layer in by_layer:
            raise CatsError(
                f"{kind} has two gated MLPs in layer {mlp.layer} ({by_layer[mlp.layer]} and {mlp.name}); "
                "CATS works on models with one gated MLP a layer."
            )
        by_layer[mlp.layer] = mlp.name
    return sorted(found, key=lambda mlp: mlp.layer)


def _is_fused(module: nn.Module) -> bool:
    return hasattr(module, "gate_up_proj")


def _activation_of(module: nn.Module) -> nn.Module | None:
    """The activation if the module has the parts of a gated MLP, else None."""
    for parts in (SPLIT_PARTS, FUSED_PARTS):
        shapes = [_weight_shape(getattr(module, part, None)) for part in parts]
        if all(len(shape) == 2 for shape in shapes):
            break
    else:
        return None
    d, f = shapes[-1]
    if any(shape != ((2 * f, d) if parts is FUSED_PARTS else (f, d)) for shape in shapes[:-1]):
        return None
    others = [
        child
        for name, child in module.named_children()
        if name not in parts and not isinstance(child, (nn.Dropout, nn.Identity))
    ]
    if len(others) == 1 and not list(others[0].parameters()) and not list(module.parameters(recurse=False)):
        return others[0]
    return None


def _weight_shape(projection: object) -> tuple[int, ...]:
    weight = getattr(projection, "weight", None)
    return tuple(weight.shape) if isinstance(projection, nn.Module) and isinstance(weight, Tensor) else ()


def _layer_index(name: str, kind: str) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise CatsError(f"the gated MLP {name} of {kind} is not in a numbered list of layers, so CATS cannot name it.")
    return numbers[-1]


def activation_name(activation: nn.Module) -> str | None:
    """The key of `ACTIVATIONS` that computes the same function, found by trying; None if there is none."""
    x = torch.linspace(-9.0, 9.0, 1801, device="cpu")
    with torch.no_grad():
        y = activation(x)
        for name, function in ACTIVATIONS.items():
            if torch.allclose(y, function(x), rtol=1e-5, atol=1e-5):
                return name
    return None


def execution_device(linear: nn.Linear) -> torch.device:
    """Where the projection computes: its weight's device, or where accelerate brings an offloaded weight."""
    device = getattr(getattr(linear, "_hf_hook", None), "execution_device", None)
    if linear.weight.is_meta and device is not None:
        return torch.device(device)
    return linear.weight.device


@torch.no_grad()
def check_function(mlp: GatedMLP) -> None:
    """Check on random input that the module computes ``down(act(gate(x)) * up(x))`` and nothing else.

    Some modules have the parts of a gated MLP and one step more (a scale, a top-k): made sparse, they would silently
    compute something else.

    Raises:
        CatsError: it computes another function.
    """
    module = mlp.module
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, mlp.hidden_size, generator=generator)
    x = x.to(device=execution_device(mlp.down_linear), dtype=mlp.down_linear.weight.dtype)
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        # forward, not a call: hooks on the module are the user's, and what they do is no part of its function
        expected, actual = module.forward(x), dense_forward(mlp, x)
    finally:
        for m, training in modes.items():
            m.training = training
    error, size = (actual - expected).float().norm(), expected.float().norm()
    if expected.isfinite().all() and not error <= 1e-2 * size:
        raise CatsError(
            f"{mlp.name} ({type(module).__name__}) has the parts of a gated MLP but computes more than "
            "down(act(gate(x)) * up(x)), so CATS cannot replace it."
        )


def dense_forward(mlp: GatedMLP, x: Tensor) -> Tensor:
    """``down(act(gate(x)) * up(x))`` through the module's own projections: the MLP before CATS."""
    gate, up = gate_and_up(mlp.module, mlp.fused, x)
    y: Tensor = mlp.down_linear(mlp.activation(gate) * up)
    return y


def gate_and_up(module: Any, fused: bool, x: Tensor) -> tuple[Tensor, Tensor]:
    """``x W_gate`` and ``x W_up``, (..., f), through the module's own projections."""
    if fused:
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
        return gate, up
    return module.gate_proj(x), module.up_proj(x)


class GateObserver(Protocol):
    """Called with a layer and its gate pre-activations, (..., f), at every forward pass."""

    def __call__(self, mlp: GatedMLP, gate: Tensor) -> None: ...  # noqa: D102


@contextmanager
def observe_gates(mlps: list[GatedMLP], observer: GateObserver) -> Iterator[None]:
    """Show the observer the output of every gate projection while the context lasts."""

    def hook(mlp: GatedMLP) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: observer(mlp, mlp.gate_of(output.detach()))

    with ExitStack() as stack:
        for mlp in mlps:
            stack.callback(mlp.gate_linear.register_forward_hook(hook(mlp)).remove)
        yield
