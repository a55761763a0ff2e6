"""What `cats eval` compares: the variants of a model, by method and sparsity or from saved checkpoints."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from cats_llm import distributed
from cats_llm.calibration.batches import CalibrationData, read_batches
from cats_llm.calibration.profile import Profile
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.errors import CatsError
from cats_llm.evaluation.baselines.input_mask import InputConfig, decoder_linears
from cats_llm.evaluation.cache import digest_model
from cats_llm.evaluation.method_data import MethodData
from cats_llm.evaluation.methods import Config, method
from cats_llm.model.sparsify import thresholds
from cats_llm.model.structure import find_gated_mlps
from cats_llm.model.weight_traffic import input_sparsity_of, sparsity_of


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
        """The entry of ``variants`` in a result file (docs/evaluation.md)."""
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
        """What of the config decides the result, for the cache's key: no record, no sparsity that was aimed at."""
        config = self.config
        if config is None:
            return None
        rest = _by_name(config.linear_sparsity) if isinstance(config, InputConfig) else config.vectors_sha256
        return [_by_name(config.thresholds), config.coverage.to_dict(), rest]


def _by_name(values: Mapping[Any, float]) -> dict[str, float]:
    return {str(key): value for key, value in values.items()}


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


def checkpoint_variant(model: Any, name: str, coverage: TokenPolicy, base: nn.Module) -> Variant:
    """A loaded model, CATS or dense, as a variant; one with the weights of the base model needs none of its own.

    Args:
        name: of the checkpoint.
        coverage: which tokens are sparse, where that is not all; else as the checkpoint says.
        base: the dense model that it is compared with; may be ``model``.
    """
    same = model is base or digest_model(model) == digest_model(base)
    if not thresholds(model):
        return Variant(Path(name).name, "dense", None, None if same else model)
    config: CatsConfig = model.config.quantization_config
    if not coverage.all_tokens:
        config = config.with_coverage(coverage)
    suffix = "" if config.coverage.all_tokens else f" ({config.coverage})"
    return Variant(Path(name).name + suffix, "cats", config, None if same else model)


def with_unique_names(variants: Iterable[Variant]) -> list[Variant]:
    """The variants, each with a name of its own."""
    unique: dict[str, Variant] = {}
    for variant in variants:
        name = variant.name
        while name in unique:
            name += "'"
        unique[name] = replace(variant, name=name)
    return list(unique.values())
