"""CatsConfig: the `quantization_config` of a CATS checkpoint, and its rules (docs/checkpoint.md)."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from cats_llm.checkpoint.layer_tensors import FILE, LayerTensors, digest, encode, read_layer_tensors
from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.errors import CatsError

QUANT_METHOD = "cats"
VERSION = 3
"""The newest version that is read. A config is written in the oldest version that can say it, see `CatsConfig`."""
_LARGEST = torch.finfo(torch.float32).max


class CatsConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """One threshold a layer, and where it comes from.

    Attributes:
        thresholds: by index of the decoder layer; the float32 values, exact. Where a layer has a vector of thresholds,
            the number is the threshold of the criterion's score, and the vector is what is computed with.
        sparsity: the gate sparsity asked for, in [0, 1), if one was.
        layer_sparsity: the gate sparsity that each threshold gives on the calibration tokens.
        calibration: what was calibrated on what (model, data, tokens, date, versions); a record, not used to compute.
        coverage: which tokens are sparse; stands in the file as the keys of `TokenPolicy`.
        criterion: what chooses neurons and corrects the output (name and settings); a record, not used to compute.
            Empty for plain CATS.
        vectors: by layer, what does not fit into JSON; None if no layer has any. In config.json they are the name and
            the digest of a file: ``{"file": "cats.safetensors", "sha256": ...}``.
        version: of the format: 1; 2 where the coverage is not all tokens; 3 where there are vectors or a criterion; so
            that older programs refuse what they would compute wrongly.
    """

    def __init__(
        self,
        thresholds: Mapping[Any, float] | None = None,
        sparsity: float | None = None,
        layer_sparsity: Mapping[Any, float] | None = None,
        calibration: Mapping[str, Any] | None = None,
        version: int = 1,
        quant_method: str = QUANT_METHOD,
        dense_prefill: bool = False,
        dense_first_tokens: int = 0,
        last_fraction: float | None = None,
        criterion: Mapping[str, Any] | None = None,
        vectors: Mapping[int, LayerTensors] | Mapping[str, str] | None = None,
        **unknown: Any,
    ) -> None:
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise CatsError(f"the CATS config has version {short(version)}; it must be a positive whole number.")
        if version > VERSION:
            raise CatsError(
                f"the CATS config has version {version}, newer than {VERSION}, the newest that this cats-llm reads; "
                "upgrade cats-llm."
            )
        if quant_method != QUANT_METHOD:
            raise CatsError(f"quant_method is {short(quant_method)}; a CATS config says {QUANT_METHOD!r}.")
        if unknown:
            raise CatsError(
                f"the CATS config has unknown keys ({', '.join(sorted(unknown))}); it was damaged, or written by "
                "something else than cats-llm."
            )
        self.quant_method = QUANT_METHOD
        self.coverage = TokenPolicy(dense_prefill, dense_first_tokens, last_fraction)
        self.thresholds = _by_layer("thresholds", thresholds, upper=_LARGEST)
        if not self.thresholds:
            raise CatsError("the CATS config has no thresholds; give one a layer.")
        # what the model computes with
        self.thresholds = {layer: torch.tensor(t, dtype=torch.float32).item() for layer, t in self.thresholds.items()}
        self.sparsity = None if sparsity is None else check_sparsity(sparsity)
        self.layer_sparsity = _by_layer("layer_sparsity", layer_sparsity or {}, upper=1.0)
        self.calibration = _record("calibration", calibration)
        self.criterion = _record("criterion", criterion)
        # or the digest of a file that is not read yet
        self._vectors: dict[int, LayerTensors] | str | None = None
        if isinstance(vectors, Mapping) and "file" in vectors:
            self._vectors = _digest_of(vectors)
        elif vectors is not None:
            self._vectors = _by_known_layer(vectors, self.thresholds)

    @property
    def vectors(self) -> dict[int, LayerTensors] | None:
        """By layer; None if no layer has any.

        Raises:
            CatsError: the config has only been read from JSON, without their file.
        """
        if isinstance(self._vectors, str):
            raise CatsError(
                f"this CATS config names {FILE} but does not hold what is in it; take it from the loaded model "
                "(model.config.quantization_config)."
            )
        return self._vectors

    @property
    def vectors_are_loaded(self) -> bool:
        """Whether `vectors` can be asked for: all but what was read from JSON and names a file."""
        return not isinstance(self._vectors, str)

    @property
    def vectors_sha256(self) -> str | None:
        """The digest of the vectors' file, read or not; None if no layer has any."""
        return digest(encode(self._vectors)) if isinstance(self._vectors, dict) else self._vectors

    def load_vectors(self, path: Path) -> None:
        """Read the vectors of a config that names a file; otherwise there is nothing to do.

        Raises:
            CatsError: the file is missing, damaged, or of another model.
        """
        if isinstance(self._vectors, str):
            self._vectors = _by_known_layer(read_layer_tensors(path, self._vectors), self.thresholds)

    def with_coverage(self, coverage: TokenPolicy) -> "CatsConfig":
        """A copy of the config, with another choice of the tokens that are sparse."""
        changed = copy.deepcopy(self)
        changed.coverage = coverage
        return changed

    @property
    def version(self) -> int:
        """The oldest version of the format that can say what the config says; it is written in that one."""
        if self._vectors is not None or self.criterion:
            return 3
        return 1 if self.coverage.all_tokens else 2

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        values: dict[str, Any] = {
            "version": self.version,
            "quant_method": self.quant_method,
            "thresholds": {str(layer): value for layer, value in self.thresholds.items()},
            "sparsity": self.sparsity,
            "layer_sparsity": {str(layer): value for layer, value in self.layer_sparsity.items()},
            "calibration": copy.deepcopy(self.calibration),
        }
        if not self.coverage.all_tokens:
            values |= self.coverage.to_dict()
        if self.criterion:
            values["criterion"] = copy.deepcopy(self.criterion)
        sha256 = self.vectors_sha256
        if sha256 is not None:
            values["vectors"] = {"file": FILE, "sha256": sha256}
        return values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CatsConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it is mutable


def check_sparsity(value: object) -> float:
    """The value as a gate sparsity in [0, 1).

    Raises:
        CatsError: it is no number or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise CatsError(f"sparsity is {value!r}; it must be a number from 0 up to, but not including, 1 (0.5 is 50 %).")
    return float(value)


def parse_sparsity(text: str) -> float:
    """The gate sparsity that a text says.

    Raises:
        CatsError: it says none.
    """
    try:
        value = float(text)
    except ValueError as error:
        raise CatsError(f"{text!r} is not a number; 0.5 skips 50 % of the neurons.") from error
    return check_sparsity(value)


def _record(key: str, value: object) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise CatsError(f"{key} in the CATS config is {short(value)}; it must be a record (a JSON object).")
    return dict(value or {})


def _digest_of(record: Mapping[Any, Any]) -> str:
    """The digest in the JSON entry that stands for vectors."""
    sha256 = record.get("sha256")
    is_digest = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)
    if set(record) != {"file", "sha256"} or record["file"] != FILE or not is_digest:
        raise CatsError(
            f"vectors in the CATS config is {short(dict(record))}; it must be the file {FILE} and its sha256."
        )
    return str(sha256)


def _by_known_layer(vectors: object, thresholds: Mapping[int, float]) -> dict[int, LayerTensors] | None:
    """Copies, sorted by layer; None if there is no vector."""
    if not isinstance(vectors, Mapping) or not all(isinstance(v, LayerTensors) for v in vectors.values()):
        raise CatsError(
            f"vectors in the CATS config is {short(vectors)}; it must map layer indices to LayerTensors, or name the "
            f"file {FILE} and its sha256."
        )
    unknown = [layer for layer in vectors if isinstance(layer, bool) or layer not in thresholds]
    if unknown:
        raise CatsError(f"the CATS config has vectors of layer {short(unknown[0])}, but no threshold of it.")
    return {layer: vectors[layer].copy() for layer in sorted(vectors) if vectors[layer]} or None


def _by_layer(key: str, values: object, upper: float) -> dict[int, float]:
    """{layer: value} from JSON, with string keys, or from Python, sorted by layer."""
    if not isinstance(values, Mapping):
        raise CatsError(f"{key} in the CATS config must map each layer index to a number, but it is {short(values)}.")
    checked = {}
    for layer, value in values.items():
        if isinstance(layer, bool) or not str(layer).isdecimal():
            raise CatsError(f"{key} in the CATS config has the key {short(layer)}; keys are layer indices (0, 1, ...).")
        # not (0 <= NaN) holds too
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= upper:
            raise CatsError(
                f"{key} of layer {layer} in the CATS config is {short(value)}; "
                f"it must be a number from 0 to {upper:.7g}."
            )
        checked[int(layer)] = float(value)
    if len(checked) != len(values):
        raise CatsError(f"{key} in the CATS config names a layer twice.")
    return dict(sorted(checked.items()))
