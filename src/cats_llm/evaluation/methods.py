"""The methods that `cats eval` compares, in one registry. A method changes the model in place and undoes it.

A new method is one `Method` in `METHODS`; the harness knows nothing else of it. Every criterion of neurons
(`cats_llm.calibration.criteria.criterion`) is a method too, under its own name.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from cats_llm import distributed
from cats_llm.calibration.criteria.criterion import PARTS, Criterion
from cats_llm.calibration.criteria.scores import SCORES
from cats_llm.calibration.criteria.search import find_config
from cats_llm.calibration.criteria.target import SparsityTarget
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.errors import CatsError
from cats_llm.evaluation.baselines import teal, teal_greedy, wina
from cats_llm.evaluation.baselines.input_mask import InputConfig, Rule, dense_inputs, sparse_inputs
from cats_llm.evaluation.method_data import MethodData
from cats_llm.model.relufy import relu_config
from cats_llm.model.sparsify import as_dense, densify, sparse_mlps, sparsify

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
    return find_config(model, profile, SparsityTarget(sparsity=sparsity)).config


def _criterion_config(criterion: Criterion, model: nn.Module, data: MethodData, sparsity: float | None) -> CatsConfig:
    if sparsity is None:
        raise CatsError(f"the method {criterion} needs a sparsity; pass --sparsity 0.5.")
    # each process fits its share, and all get the same
    share = distributed.share(data.text(str(criterion)))
    name = data.profile.record.get("data") if data.profile is not None else None
    return find_config(model, share, SparsityTarget(sparsity=sparsity, criterion=str(criterion)), data=name).config


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
