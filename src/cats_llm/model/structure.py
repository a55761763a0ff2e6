"""Find the gated MLPs of a language model by what they compute, never by the names of families or of parts."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cats_llm.errors import CatsError
from cats_llm.kernels.definition import ACTIVATIONS, Activation
from cats_llm.model.roles import Mismatch, Roles, find_roles, fingerprint, holds_experts


@dataclass(frozen=True)
class GatedMLP:
    """A module that computes ``down(act(gate(x)) * up(x))``.

    Attributes:
        layer: index of the decoder layer that owns it; the first, if several layers share it.
        name: path of the module in the model.
        layer_path: path of that decoder layer.
        parents: the modules that own it, each with the name that it has there.
        module: the module itself, dense or already sparse.
        roles: which of its children does what.
    """

    layer: int
    name: str
    layer_path: str
    parents: tuple[tuple[nn.Module, str], ...]
    module: nn.Module
    roles: Roles

    @property
    def activation(self) -> Activation:
        """The activation function."""
        return self.roles.activation_of(self.module)

    @property
    def gate_linear(self) -> nn.Linear:
        """The projection whose output holds the gate, (..., f), or both gate and up, (..., 2 f)."""
        return self.roles.linear(self.module, "gate")

    @property
    def down_linear(self) -> nn.Linear:
        """The projection back to the hidden size."""
        return self.roles.linear(self.module, "down")

    def gate_of(self, output: Tensor) -> Tensor:
        """The gate, (..., f), in the output of `gate_linear`."""
        return self.roles.halves(output)[0] if self.roles.fused else output

    @property
    def hidden_size(self) -> int:
        """Size d of the input and output."""
        return int(self.down_linear.weight.shape[0])

    @property
    def intermediate_size(self) -> int:
        """Number f of neurons."""
        return int(self.down_linear.weight.shape[1])


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers (PEFT, torch.compile, data parallel), or the model itself."""
    while True:
        inner: Any
        get_base_model = getattr(model, "get_base_model", None)
        if callable(get_base_model):
            inner = get_base_model()
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        else:
            inner = getattr(model, "_orig_mod", None)
        if inner is None:
            return model
        model = inner


def quantization_of(model: nn.Module) -> tuple[Any, Any]:
    """The quantization_config that a model has, as an object or as read from JSON, and the name of its method."""
    config = getattr(getattr(unwrap(model), "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return config, getattr(method, "value", method)


def decoder_of(model: nn.Module) -> nn.Module:
    """The text decoder of a model, without heads and towers; a model that knows of none is its own."""
    base = unwrap(model)
    get_decoder = getattr(base, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    # some call their head a decoder
    return decoder if isinstance(decoder, nn.Module) and any(True for _ in decoder.children()) else base


def find_gated_mlps(model: nn.Module) -> list[GatedMLP]:
    """All gated MLPs of the model's text decoder, in the order of its layers.

    A gated MLP is a module that computes ``down(act(gate(x)) * up(x))`` from two or three projections that it owns
    (`find_roles`), whatever their names. Vision and audio towers of multimodal models are left alone.

    Raises:
        CatsError: there is none, a layer's MLP computes more, the model routes tokens through experts, or the layers
            cannot be told apart.
    """
    if not isinstance(model, nn.Module):
        raise CatsError(
            f"a loaded model is needed, but this is a {type(model).__name__}; load one with "
            "transformers.AutoModelForCausalLM.from_pretrained."
        )
    model = unwrap(model)
    kind = type(model).__name__
    decoder = decoder_of(model)
    prefix = {module: name for name, module in model.named_modules()}.get(decoder, "")
    experts = next((name for name, module in decoder.named_modules(prefix=prefix) if holds_experts(module)), None)
    if experts is not None:
        raise CatsError(
            f"{kind} routes tokens through experts ({experts}); CATS works on models with one gated MLP a layer."
        )
    gated: dict[nn.Module, tuple[str, Roles, list[tuple[nn.Module, str]]]] = {}
    mismatches: dict[str, Mismatch] = {}
    answers: dict[Hashable, Roles | Mismatch | None] = {}
    for name, module in decoder.named_modules(prefix=prefix, remove_duplicate=False):
        parent_name, _, child_name = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if module in gated:
            gated[module][2].append((parent, child_name))
            continue
        key = fingerprint(module)
        if key not in answers:
            known = getattr(module, "roles", None)  # of a sparse MLP
            answers[key] = known if isinstance(known, Roles) else find_roles(module)
        answer = answers[key]
        if isinstance(answer, Mismatch):
            mismatches[name] = answer
        elif answer is not None:
            if hasattr(parent, "_orig_mod"):
                raise CatsError(
                    f"{name} is compiled by itself, which CATS could not change; compile the model afterwards."
                )
            gated[module] = (name, answer, [(parent, child_name)])
    layer_of = _layer_paths([name for name, _, _ in gated.values()])
    mlps = [
        GatedMLP(_layer_index(name, layer_of(name), kind), name, layer_of(name), tuple(parents), module, roles)
        for module, (name, roles, parents) in gated.items()
    ]
    mlps.sort(key=lambda mlp: mlp.layer)
    _check_mismatches({layer_of(mlp.name) for mlp in mlps}, mismatches, layer_of, model)
    if not mlps:
        raise CatsError(f"{kind} has no gated MLP{_instead(model)}, so CATS, which skips their neurons, cannot use it.")
    for one, other in pairwise(mlps):
        if one.layer == other.layer:
            raise CatsError(
                f"{kind} has two gated MLPs in layer {one.layer} ({one.name} and {other.name}); "
                "CATS works on models with one gated MLP a layer."
            )
    return mlps


def _check_mismatches(
    layers: set[str], mismatches: dict[str, Mismatch], layer_of: Callable[[str], str], model: nn.Module
) -> None:
    """Refuse a model of which a layer has no gated MLP but something similar, or which has nothing but.

    Made sparse in its other layers only, it would not be what its user thinks.

    Args:
        layers: paths of the layers that have a gated MLP.
    """
    stacks = {path.rpartition(".")[0] for path in layers}
    for name, mismatch in sorted(mismatches.items(), key=lambda item: not item[1].similar):
        layer = layer_of(name)
        # what stands in another list of layers is a tower or an encoder
        similar = mismatch.similar and layer not in layers and layer.rpartition(".")[0] in stacks
        if layer and (similar or not layers):
            raise CatsError(
                f"{name} ({type(model.get_submodule(name)).__name__}) has the parts of a gated MLP but computes more "
                f"than down(act(gate(x)) * up(x)): {mismatch.reason}; so CATS cannot replace it."
            )


def _instead(model: nn.Module) -> str:
    """What the model says of itself that explains why it has none, as a part of a sentence."""
    _, method = quantization_of(model)
    if method is not None:
        return f" that can be read (it is quantised with {method})"
    return " (down(act(gate(x)) * up(x)), as Llama, Mistral, Qwen, Gemma and Phi-3 models have in every layer)"


def _layer_paths(names: list[str]) -> Callable[[str], str]:
    """The path of the decoder layer in which a module lies.

    It ends with a number in the module's path: the first one if that tells the MLPs apart, else the last.
    """

    def path(name: str, which: int) -> str:
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        return ".".join(parts[: numbers[which] + 1]) if numbers else ""

    first = {path(name, 0).rpartition(".")[2] for name in names}
    which = 0 if len(first) == len(names) else -1
    return lambda name: path(name, which)


def _layer_index(name: str, layer_path: str, kind: str) -> int:
    if not layer_path:
        raise CatsError(f"the gated MLP {name} of {kind} is not in a numbered list of layers, so CATS cannot name it.")
    return int(layer_path.rpartition(".")[2])


def activation_name(activation: Activation) -> str | None:
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


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Let a module and all in it be in eval mode while the context lasts; each has its own mode again afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let no parameter of a module want a gradient while the context lasts."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


# some channels of real inputs are a hundred times larger than the others
_SCALES = (1.0, 100.0)
_CHECKED_TOKENS = 8


@torch.no_grad()
def check_function(mlp: GatedMLP, x: Tensor | None = None) -> None:
    """Check with its real weights that the module computes ``down(act(gate(x)) * up(x))`` and nothing else.

    `find_roles` has compared the functions; this sees what depends on the weights, or on the inputs.

    Args:
        mlp: dense.
        x: inputs, (1, T, d); None takes random ones, small and large.

    Raises:
        CatsError: it computes another function.
    """
    module = mlp.module
    if x is None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 3, mlp.hidden_size, generator=generator, device="cpu")
        x = torch.cat([scale * x for scale in _SCALES], dim=1)
        x = x.to(device=execution_device(mlp.down_linear), dtype=mlp.down_linear.weight.dtype)
    with eval_mode(module):
        # forward, not a call: hooks on the module are the user's, and what they do is no part of its function
        expected, actual = module.forward(x).float(), mlp.roles.dense_forward(module, x).float()
    # a token each: large ones must not hide small ones; what overflows the dtype says nothing
    error, size = (actual - expected).norm(dim=-1), expected.norm(dim=-1)
    if bool((size.isfinite() & ~(error <= 1e-2 * size)).any()):
        raise CatsError(
            f"{mlp.name} ({type(module).__name__}) has the parts of a gated MLP but computes more than "
            "down(act(gate(x)) * up(x)), so CATS cannot replace it."
        )


@contextmanager
def checked_on_inputs(mlps: list[GatedMLP]) -> Iterator[None]:
    """`check_function`, at the end, on the largest inputs that the MLPs have seen while the context lasted.

    Random numbers, however large, are not what a model computes with. The check is made last since it calls the MLPs.

    Raises:
        CatsError: an MLP computes another function.
    """
    largest: dict[int, Tensor] = {}

    def note(mlp: GatedMLP, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        if mlp.layer in largest:
            rows = torch.cat([rows, largest[mlp.layer].to(rows)])
        size = rows.abs().amax(dim=-1)
        largest[mlp.layer] = rows[size.topk(min(_CHECKED_TOKENS, len(rows))).indices]

    with observe_inputs(mlps, note):
        yield
    for mlp in mlps:
        if mlp.layer in largest:
            check_function(mlp, largest[mlp.layer][None])


Observer = Callable[[GatedMLP, Tensor], None]
"""Called with a layer and a tensor of it at every forward pass."""


@contextmanager
def observe_inputs(mlps: Iterable[GatedMLP], observer: Observer) -> Iterator[None]:
    """Show the observer the input of every MLP, (..., d), before it runs, while the context lasts."""

    def hook(mlp: GatedMLP) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _module, args, kwargs: observer(
            mlp, next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        )

    with ExitStack() as stack:
        for mlp in mlps:
            stack.callback(mlp.module.register_forward_pre_hook(hook(mlp), with_kwargs=True).remove)
        yield


@contextmanager
def observe_gates(mlps: Iterable[GatedMLP], observer: Observer) -> Iterator[None]:
    """Show the observer the gate pre-activations of every MLP, (..., f), while the context lasts."""

    def hook(mlp: GatedMLP) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: observer(mlp, mlp.gate_of(output.detach()))

    with ExitStack() as stack:
        for mlp in mlps:
            stack.callback(mlp.gate_linear.register_forward_hook(hook(mlp)).remove)
        yield
