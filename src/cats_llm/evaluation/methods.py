"""The methods that `cats eval` compares, in one registry. A method changes the model in place and undoes it.

A new method is one `Method` in `METHODS`; the harness knows nothing else of it. Every criterion of neurons
(`cats_llm.calibration.criterion`) is a method too, under its own name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from cats_llm import distributed
from cats_llm.calibration.batches import CalibrationData, read_batches
from cats_llm.calibration.criterion import PARTS, Criterion
from cats_llm.calibration.fit import fit
from cats_llm.calibration.profile import Profile
from cats_llm.calibration.scores import SCORES
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.errors import CatsError
from cats_llm.evaluation.baselines import teal, teal_greedy, wina
from cats_llm.evaluation.baselines.input_mask import InputConfig, Rule, decoder_linears, dense_inputs, sparse_inputs
from cats_llm.evaluation.method_data import MethodData
from cats_llm.model.contexts import as_dense
from cats_llm.model.relufy import relu_config
from cats_llm.model.sparsify import densify, sparse_mlps, sparsify
from cats_llm.model.structure import find_gated_mlps
from cats_llm.model.weight_traffic import input_sparsity_of, sparsity_of

Config = CatsConfig | InputConfig
"""What a method applies to a model."""


@dataclass(frozen=True)
class Method:
    """How to bring a model into a method's form.

    Attributes:
        name: for `--method` and result files.
        takes_sparsity: there is one variant a sparsity asked for; else one, whose sparsity follows from the data.
        configure: (model, data, sparsity) -> the config to apply; None if there is nothing to set. The sparsity
            is None where the method takes none.
        applied: (model, config) -> a context in which the model, dense or CATS before, computes the method. What it
            leaves behind must be a model that every other method accepts.
        dense: (model) -> a context, used inside `applied`, in which the model computes its dense function.
        unit: what its sparsity is a share of: "neurons" of every MLP, or "inputs" of every linear layer.
    """

    name: str
    takes_sparsity: bool
    configure: Callable[[nn.Module, MethodData, float | None], Config | None]
    applied: Callable[[Any, Any], AbstractContextManager[None]]
    dense: Callable[[nn.Module], AbstractContextManager[None]] = as_dense
    unit: str = "neurons"


@contextmanager
def _dense(model: nn.Module, config: None) -> Iterator[None]:
    densify(model)
    yield


def _cats_config(model: nn.Module, data: MethodData, sparsity: float | None) -> CatsConfig:
    profile = data.profile
    if profile is None:
        raise CatsError("the method cats needs thresholds: pass --profile, or --calibration with a text.")
    if sparsity is None:
        raise CatsError("the method cats needs a sparsity; pass --sparsity 0.5.")
    profile.check_model(model)
    return profile.config(sparsity)


def _criterion_config(criterion: Criterion, model: nn.Module, data: MethodData, sparsity: float | None) -> CatsConfig:
    if sparsity is None:
        raise CatsError(f"the method {criterion} needs a sparsity; pass --sparsity 0.5.")
    # each process fits its share, and all get the same
    share = data.text(str(criterion))[distributed.rank() :: distributed.world_size()]
    name = data.profile.record.get("data") if data.profile is not None else None
    return fit(model, share, sparsity, criterion, data=name)


@contextmanager
def _cats(model: nn.Module, config: CatsConfig) -> Iterator[None]:
    sparsify(model, config)
    yield


def _relu_config(model: nn.Module, data: MethodData, sparsity: float | None) -> CatsConfig:
    return relu_config(model)


@contextmanager
def _relu(model: nn.Module, config: CatsConfig) -> Iterator[None]:
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
        with as_dense(model):
            yield
    finally:
        for mlp, activation in zip(mlps, replaced, strict=True):
            mlp.use_activation(activation)


def _skips_inputs(name: str, configure: Callable[[nn.Module, MethodData, float], InputConfig], rule: Rule) -> Method:
    def checked(model: nn.Module, data: MethodData, sparsity: float | None) -> InputConfig:
        if sparsity is None:
            raise CatsError(f"the method {name} needs a sparsity; pass --sparsity 0.5.")
        return configure(model, data, sparsity)

    @contextmanager
    def applied(model: nn.Module, config: InputConfig) -> Iterator[None]:
        densify(model)
        with sparse_inputs(model, config, rule):
            yield

    return Method(name, True, checked, applied, dense_inputs, "inputs")


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("dense", False, lambda *_: None, _dense),
        # one threshold a layer on |act(gate)|
        Method("cats", True, _cats_config, _cats),
        # ReLUfication: act replaced by ReLU, no threshold, no shift
        Method("relu", False, _relu_config, _relu, _relu_dense),
        # inputs of all linear layers, simulated
        _skips_inputs("teal", teal.teal, teal.keep_large),
        _skips_inputs("teal-greedy", teal_greedy.teal_greedy, teal.keep_large),
        _skips_inputs("wina", wina.wina, wina.keep_largest),
    )
}


@dataclass(frozen=True)
class Variant:
    """One row of the table: a method with its settings.

    Attributes:
        name: for people, and unique in a result file.
        method: a key of `METHODS`, or a criterion.
        config: what the method applies; None for dense.
        model: where it is not the base model: another one with weights of its own.
        equal_bytes: its sparsity was chosen such that it skips as many weights as CATS at this gate sparsity; None if
            it is the one asked for.
    """

    name: str
    method: str = "dense"
    config: Config | None = None
    model: nn.Module | None = None
    equal_bytes: float | None = None

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the method aims at, in its own unit, if it takes one."""
        return self.config.sparsity if self.config is not None else None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a result file."""
        config = self.config
        cats = config if isinstance(config, CatsConfig) else None
        inputs = config if isinstance(config, InputConfig) else None
        chosen = method(self.method)
        return {
            "name": self.name,
            "method": self.method,
            "sparsity": self.sparsity,
            "unit": chosen.unit if config is not None else None,
            "equal_bytes": self.equal_bytes,
            "coverage": (config.coverage if config is not None else TokenPolicy()).to_dict(),
            # those of a criterion are of its score, and no measure of activations
            "thresholds": _by_name(cats.thresholds) if cats and not cats.criterion and chosen.takes_sparsity else None,
            "criterion": (cats.criterion or None) if cats is not None else None,
            "layer_sparsity": _by_name(cats.layer_sparsity) if cats is not None else {},
            "linear_thresholds": _by_name(inputs.thresholds) if inputs is not None else {},
            "linear_sparsity": _by_name(inputs.linear_sparsity) if inputs is not None else {},
            "calibration": (dict(config.calibration) or None) if config is not None else None,
        }

    def settings(self) -> Any:
        """What of the config decides the result, for JSON."""
        config = self.config
        if config is None:
            return None
        rest = _by_name(config.linear_sparsity) if isinstance(config, InputConfig) else config.vectors_sha256
        return [_by_name(config.thresholds), config.coverage.to_dict(), rest]


def _by_name(values: Mapping[Any, float]) -> dict[str, float]:
    return {str(key): value for key, value in values.items()}


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        CatsError: there is none.
    """
    if name in METHODS:
        return METHODS[name]
    try:
        criterion = Criterion.parse(name)
    except CatsError as error:
        raise CatsError(
            f"{name!r} is no method; choose from {', '.join(METHODS)}, or a criterion, as in "
            f"moment+compensate+sequential (scores {', '.join(SCORES)}; parts {', '.join(PARTS)})."
        ) from error
    return Method(str(criterion), True, partial(_criterion_config, criterion), _cats)


def make_variants(
    model: nn.Module,
    methods: Sequence[str] = ("cats",),
    sparsities: Sequence[float] = (),
    profile: Profile | None = None,
    coverage: TokenPolicy | None = None,
    batches: CalibrationData | None = None,
    equal_bytes: bool = False,
) -> list[Variant]:
    """The dense variant, and one a method and sparsity.

    Args:
        model: the base model.
        methods: keys of `METHODS`, or criteria; "dense" is always there, first.
        sparsities: for the methods that take one, each in its unit. 0 is the dense model and makes no variant.
        profile: of the model, for methods that need thresholds.
        coverage: which tokens are sparse, in all of them.
        batches: the calibration text, see `read_batches`, for methods that learn more than the profile holds. Of
            several processes each passes all of it, and all get what the first one learned.
        equal_bytes: sparsities are gate sparsities of CATS, and a method with another unit skips as many weights as
            CATS does with them.

    Raises:
        CatsError: an unknown method, or one that lacks what it needs.
    """
    coverage = coverage or TokenPolicy()
    suffix = "" if coverage.all_tokens else f" ({coverage})"
    data = MethodData(profile, list(read_batches(model, batches)) if batches is not None else None)
    variants = [Variant("dense")]
    for chosen in {chosen.name: chosen for chosen in map(method, methods)}.values():
        name = chosen.name
        if name == "dense":
            continue
        targets = sorted({k for k in sparsities if k > 0}) if chosen.takes_sparsity else [None]
        if not targets:
            raise CatsError(f"the method {name} needs a sparsity above 0; pass --sparsity 0.5, or leave it out.")
        for k in targets:
            equal = k if equal_bytes and chosen.unit == "inputs" else None
            share = k if equal is None else share_of_inputs(model, equal)
            config = distributed.broadcast(chosen.configure(model, data, share))
            if config is not None:
                config = config.with_coverage(coverage)
            title = name + ("" if k is None else f" k={k:g}") + ("" if equal is None else " (equal bytes)") + suffix
            variants.append(Variant(title, name, config, equal_bytes=equal))
    return variants


def share_of_inputs(model: nn.Module, sparsity: float) -> float:
    """The share of the inputs of all linear layers that saves as many weights as CATS at a gate sparsity."""
    neurons = sparsity_of(model, {mlp.layer: sparsity for mlp in find_gated_mlps(model)}).model
    names = [name for linears in decoder_linears(model).values() for name in linears]
    return neurons / input_sparsity_of(model, dict.fromkeys(names, 1.0)).model
