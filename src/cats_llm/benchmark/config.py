"""What `cats bench` and `cats tune` can be told."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cats_llm.benchmark.models import SHAPES, parse_shape, random_model
from cats_llm.checkpoint.config import parse_sparsity
from cats_llm.dtypes import DTYPE_NAMES, DTYPES
from cats_llm.errors import CatsError, UsageError
from cats_llm.kernels.backend import MAX_DECODE_TOKENS
from cats_llm.loading import load_model, load_skeleton, parse_device, remote_code_option, revision_option
from cats_llm.model.sparsify import densify
from cats_llm.model.structure import find_gated_mlps
from cats_llm.options import Panel, option

_WHOLE: dict[str, Any] = {
    "minimum": 1,
    "expected": "whole numbers from 1, separated by commas",
    "panel": Panel.MEASURING,
}
_SHAPE: dict[str, Any] = {
    "help": f"{', '.join(SHAPES)}, or hidden and intermediate size.",
    "metavar": "NAME|D,F",
    "panel": Panel.DATA,
}
_MODEL: dict[str, Any] = {"help": "A folder or name; or pass --shape.", "positional": True, "metavar": "[MODEL]"}
_ROUNDS: dict[str, Any] = {"help": "Turns of each contestant.", "minimum": 1, "panel": Panel.MEASURING}


def _one_device(text: str) -> str:
    if text == "auto":
        raise CatsError("'auto' may be several devices; name one.")
    return parse_device(text)


@dataclass(frozen=True)
class _Workload:
    """Calls of a sparse MLP."""

    dtype: str = option(
        "bfloat16",
        help=f"{', '.join(DTYPE_NAMES)}; auto is the checkpoint's own.",
        choices=DTYPE_NAMES,
        panel=Panel.DATA,
    )
    sparsities: tuple[float, ...] = option(
        (0.0, 0.5, 0.7, 0.9),
        help="Gate sparsities, separated by commas.",
        flags=("--sparsity",),
        parse=parse_sparsity,
        panel=Panel.SPARSITY,
    )
    batches: tuple[int, ...] = option((1,), help="Tokens at a time, separated by commas.", flags=("--batch",), **_WHOLE)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of random weights: bfloat16 for "auto"."""
        return DTYPES.get(self.dtype, torch.bfloat16)


@dataclass(frozen=True)
class _Timed(_Workload):
    """A workload on a device."""

    device: str = option("cpu", help="cpu, cuda or cuda:1.", parse=_one_device, panel=Panel.MEASURING)
    threads: tuple[int, ...] | None = option(
        None, help="Numbers of threads, separated by commas. Default: all.", **_WHOLE
    )

    def __post_init__(self) -> None:
        if self.device != "cpu" and self.threads is not None:
            raise UsageError("--threads is for the CPU.")

    @property
    def cpu_settings(self) -> list[tuple[int, int]]:
        """Pairs of threads and tokens at a time."""
        return list(itertools.product(self.threads or (torch.get_num_threads(),), self.batches))


@dataclass(frozen=True)
class MLPBench(_Timed):
    """One MLP at decode, with random weights."""

    shape: str = option("mistral-7b", **_SHAPE)
    rounds: int = option(40, **_ROUNDS)


@dataclass(frozen=True)
class DecodeBench(_Timed):
    """Whole tokens through `generate`, of a model or of one of a shape with random weights."""

    model: str | None = option(None, **_MODEL)
    shape: str | None = option(None, **_SHAPE)
    layers: int | None = option(
        None, help="Layers of the random model of --shape. Default: 4, on a GPU all.", minimum=1, panel=Panel.DATA
    )
    profile: Path | None = option(None, help="Of MODEL. Default: thresholds from random tokens.", panel=Panel.SPARSITY)
    tokens: int | None = option(
        None, help="Tokens generated in each turn. Default: 16, on a GPU 128.", minimum=3, panel=Panel.MEASURING
    )
    rounds: int = option(7, **_ROUNDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_model_or_shape(self.model, self.shape)

    def load(self) -> tuple[Any, str]:
        """The dense model on the device, and what tables call it."""
        if self.model is not None:
            return densify(load_model(self.model, self.dtype, self.device)), self.model
        shape = parse_shape(str(self.shape))
        layers = self.layers or (4 if self.device == "cpu" else shape.layers)
        model = random_model(shape, layers, self.torch_dtype, self.device)
        return model, f"{shape.name}, {layers} layers, random weights"


@dataclass(frozen=True)
class TuneConfig(_Workload):
    """The MLPs of a model, or one of a shape, that GPU kernels are tuned for."""

    model: str | None = option(None, **_MODEL)
    shape: str | None = option(None, **_SHAPE)
    revision: str | None = revision_option()
    trust_remote_code: bool = remote_code_option()

    def __post_init__(self) -> None:
        _check_model_or_shape(self.model, self.shape)
        if max(self.batches) > MAX_DECODE_TOKENS:
            raise UsageError(f"--batch goes up to {MAX_DECODE_TOKENS}; more tokens than that use dense products.")

    def sizes(self) -> list[tuple[int, int]]:
        """Hidden and intermediate size of each different MLP."""
        if self.shape is not None:
            shape = parse_shape(self.shape)
            return [(shape.hidden_size, shape.intermediate_size)]
        skeleton = load_skeleton(str(self.model), self.revision, self.trust_remote_code)
        return list(dict.fromkeys((mlp.hidden_size, mlp.intermediate_size) for mlp in find_gated_mlps(skeleton)))


def _check_model_or_shape(model: str | None, shape: str | None) -> None:
    if (model is None) == (shape is None):
        raise UsageError("pass either MODEL or --shape.")
