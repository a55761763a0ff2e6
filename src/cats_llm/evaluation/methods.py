"""The methods that `cats eval` compares, in one registry. A method changes the model in place and undoes it.

A new method is one `Method` in `METHODS`; the harness knows nothing else of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from cats_llm.calibration.profile import Profile
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.coverage import Coverage
from cats_llm.errors import CatsError
from cats_llm.model.surgery import dense_function, densify, relu_config, sparse_mlps, sparsify


@dataclass(frozen=True)
class Method:
    """How to bring a model into a method's form.

    Attributes:
        name: for `--method` and result files.
        takes_sparsity: there is one variant a sparsity asked for; else one, whose sparsity follows from the data.
        configure: (model, profile, sparsity) -> the config to apply; None if there is nothing to set. The profile is
            None if the user gave none, the sparsity None where the method takes none.
        applied: (model, config) -> a context in which the model, dense or CATS before, computes the method. What it
            leaves behind must be a model that every other method accepts.
        dense: (model) -> a context, used inside `applied`, in which the model computes its dense function.
    """

    name: str
    takes_sparsity: bool
    configure: Callable[[nn.Module, Profile | None, float | None], CatsConfig | None]
    applied: Callable[[Any, CatsConfig | None], AbstractContextManager[None]]
    dense: Callable[[nn.Module], AbstractContextManager[None]] = dense_function


@contextmanager
def _dense(model: nn.Module, config: CatsConfig | None) -> Iterator[None]:
    densify(model)
    yield


def _cats_config(model: nn.Module, profile: Profile | None, sparsity: float | None) -> CatsConfig:
    if profile is None:
        raise CatsError("the method cats needs thresholds: pass --profile, or --calibration with a text.")
    if sparsity is None:
        raise CatsError("the method cats needs a sparsity; pass --sparsity 0.5.")
    profile.check_model(model)
    return profile.config(sparsity)


@contextmanager
def _cats(model: nn.Module, config: CatsConfig | None) -> Iterator[None]:
    assert config is not None
    sparsify(model, config)
    yield


def _relu_config(model: nn.Module, profile: Profile | None, sparsity: float | None) -> CatsConfig:
    return relu_config(model)


@contextmanager
def _relu(model: nn.Module, config: CatsConfig | None) -> Iterator[None]:
    assert config is not None
    sparsify(model, config)
    mlps = list(sparse_mlps(model).values())
    try:
        for mlp in mlps:
            mlp.use_activation(nn.ReLU())
        yield
    finally:
        for mlp in mlps:
            mlp.use_activation(None)


@contextmanager
def _relu_dense(model: nn.Module) -> Iterator[None]:
    mlps = list(sparse_mlps(model).values())
    replaced = [mlp.activation for mlp in mlps]
    try:
        for mlp in mlps:
            mlp.use_activation(None)
        with dense_function(model):
            yield
    finally:
        for mlp, activation in zip(mlps, replaced, strict=True):
            mlp.use_activation(activation)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("dense", False, lambda *_: None, _dense),
        # one threshold a layer on |act(gate)|
        Method("cats", True, _cats_config, _cats),
        # ReLUfication: act replaced by ReLU, no threshold, no shift
        Method("relu", False, _relu_config, _relu, _relu_dense),
    )
}


@dataclass(frozen=True)
class Variant:
    """One row of the table: a method with its settings.

    Attributes:
        name: for people, and unique in a result file.
        method: a key of `METHODS`.
        config: what the method applies; None for dense.
        model: where it is not the base model: another one with weights of its own.
    """

    name: str
    method: str = "dense"
    config: CatsConfig | None = None
    model: nn.Module | None = None

    @property
    def sparsity(self) -> float | None:
        """The gate sparsity asked for, if the method takes one."""
        return self.config.sparsity if self.config is not None else None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a result file."""
        config = self.config
        takes = METHODS[self.method].takes_sparsity
        return {
            "name": self.name,
            "method": self.method,
            "sparsity": self.sparsity,
            "coverage": (config.coverage if config is not None else Coverage()).to_dict(),
            "thresholds": {str(k): v for k, v in config.thresholds.items()} if config is not None and takes else None,
            "layer_sparsity": {str(k): v for k, v in config.layer_sparsity.items()} if config is not None else {},
            "calibration": (config.calibration or None) if config is not None else None,
        }


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        CatsError: there is none.
    """
    if name not in METHODS:
        raise CatsError(f"{name!r} is no method; choose from {', '.join(METHODS)}.")
    return METHODS[name]


def make_variants(
    model: nn.Module,
    methods: Sequence[str] = ("cats",),
    sparsities: Sequence[float] = (),
    profile: Profile | None = None,
    coverage: Coverage | None = None,
) -> list[Variant]:
    """The dense variant, and one a method and sparsity.

    Args:
        model: the base model.
        methods: keys of `METHODS`; "dense" is always there, first.
        sparsities: gate sparsities for the methods that take one. 0 is the dense model and makes no variant.
        profile: of the model, for methods that need thresholds.
        coverage: which tokens are sparse, in all of them.

    Raises:
        CatsError: an unknown method, or one that lacks what it needs.
    """
    coverage = coverage or Coverage()
    suffix = "" if coverage.all_tokens else f" ({coverage})"
    made = [Variant("dense")]
    for name in dict.fromkeys(methods):
        chosen = method(name)
        if name == "dense":
            continue
        asked = sorted({k for k in sparsities if k > 0}) if chosen.takes_sparsity else [None]
        if not asked:
            raise CatsError(f"the method {name} needs a sparsity above 0; pass --sparsity 0.5, or leave it out.")
        for k in asked:
            config = chosen.configure(model, profile, k)
            if config is not None:
                config = config.with_coverage(coverage)
            made.append(Variant(name + ("" if k is None else f" k={k:g}") + suffix, name, config))
    return made
