"""The cells of benchmarks/quality.py: which there are, and what each applies to the model."""

import argparse
import copy
import json
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cats_llm.calibration.batches import read_batches
from cats_llm.calibration.calibrate import calibrate
from cats_llm.calibration.criteria.search import find_config
from cats_llm.calibration.criteria.target import SparsityTarget
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.layer_tensors import FILE, write_layer_tensors
from cats_llm.errors import CatsError
from cats_llm.evaluation.baselines.input_mask import InputConfig, decoder_linears
from cats_llm.evaluation.method_data import MethodData
from cats_llm.evaluation.methods import METHODS, method
from cats_llm.evaluation.variants import Variant, share_of_inputs
from cats_llm.outputs import write_json
from cats_llm.text import batched, load_sequences

# what every draw of calibration text is used for, and what only draw 0 is
ALWAYS = (
    "cats",
    "moment+compensate+sequential",
    "moment+compensate+sequential+allocate",
    "moment+sequential+allocate+distill",
)
ONCE = ("chess", "norm", "moment", "cats+compensate", "cats+compensate+sequential", "norm+compensate+sequential")


@dataclass(frozen=True)
class Cell:
    """A method at a sparsity, learned from a draw of a calibration text.

    Attributes:
        name: of its row.
        method: "dense", "int8", a baseline or a criterion.
        k: the sparsity, in the method's unit; None if it takes none.
        source, draw: the text's name, "" where there is one only, and the draw's seed.
        equal_bytes: k is a gate sparsity of CATS, and the method skips as many weights as CATS does.
    """

    name: str
    method: str
    k: float | None = None
    source: str = ""
    draw: int = 0
    equal_bytes: bool = False

    @property
    def gate_sparsity(self) -> float | None:
        """That of plain CATS with the same bytes; None where no such is compared."""
        skips_inputs = self.method in METHODS and METHODS[self.method].unit == "inputs"
        return None if skips_inputs and not self.equal_bytes else self.k

    @property
    def folder(self) -> str:
        """Where in OUT/configs what it learned is."""
        source = f"-{self.source}" if self.source else ""
        return f"{self.method}-{self.k:g}{source}-{self.draw}" + "-bytes" * self.equal_bytes

    @property
    def group(self) -> Any:
        """Cells of a group are fitted one after the other: they share what is dear to learn."""
        return (self.method, self.source, self.draw) if self.method == "teal-greedy" else self

    @property
    def effort(self) -> int:
        """How long fitting takes, in some unit."""
        return 3 if self.method == "teal-greedy" else 2 if "distill" in self.method else int("+" in self.method)


def plan(args: argparse.Namespace) -> list[Cell]:
    """All cells, the dense model first."""
    ks = [float(k) for k in args.sparsity.split(",")]
    sources = list(calibration_files(args.calibration))
    cells = [Cell("dense", "dense")] + [Cell("dense int8", "int8")] * args.int8
    for draw in map(int, args.draws.split(",")):
        of_draw = f", draw {draw}" if draw else ""
        names = ALWAYS if draw else (*ALWAYS[:1], *ONCE, *ALWAYS[1:])
        if args.criteria is not None:
            names = tuple(name for name in args.criteria.split(",") if name)
        for source in sources:
            ending = (f", {source}" if len(sources) > 1 else "") + of_draw
            cells += [Cell(f"{name} k={k:g}{ending}", name, k, source, draw) for name in names for k in ks]
        if draw == 0:
            cells += _baselines(args, ks, sources[0])
    return cells


def _baselines(args: argparse.Namespace, ks: list[float], source: str) -> list[Cell]:
    """Others' methods, on the first source."""
    cells = []
    for name in filter(None, args.baselines.split(",")):
        if not METHODS[name].takes_sparsity:
            cells.append(Cell(name, name, source=source))
        elif METHODS[name].unit == "neurons":
            cells += [Cell(f"{name} k={k:g}", name, k, source) for k in ks]
        else:
            equal = args.equal.split(",")
            cells += [Cell(f"{name} k={k:g}", name, k, source) for k in ks if "share" in equal]
            cells += [Cell(f"{name} k={k:g} (equal bytes)", name, k, source, 0, True) for k in ks if "bytes" in equal]
    return cells


def calibration_files(given: list[str]) -> dict[str, list[str]]:
    """Files by the name of the text; it has no name where none is given."""
    named = [text.split("=", 1) if "=" in text else ["", text] for text in given]
    files = {name: joined.split(",") for name, joined in named}
    if len(files) < len(named):
        raise SystemExit("error: several calibration texts need names of their own: --calibration NAME=FILE.")
    return files


class Fits:
    """Variants by cell, from OUT/configs or made."""

    def __init__(self, args: argparse.Namespace, model: Any, tokenizer: Any) -> None:
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.files = calibration_files(args.calibration)
        self.sequences: dict[str, list[list[Tensor]]] = {}
        self.learned: dict[tuple[str, int], MethodData] = {}
        self.int8: Any = None

    def batches(self, source: str, draw: int) -> list[Tensor]:
        """The sequences of a draw, of every file of the text as many."""
        if source not in self.sequences:
            self.sequences[source] = [
                list(load_sequences(file, self.tokenizer, self.args.seq_length)) for file in self.files[source]
            ]
        files, rng = self.sequences[source], random.Random(draw)
        counts = [self.args.samples // len(files) + (i < self.args.samples % len(files)) for i in range(len(files))]
        drawn = [sequence for file, n in zip(files, counts, strict=True) for sequence in rng.sample(file, n)]
        if len(files) > 1:
            rng.shuffle(drawn)
        return list(batched(drawn, self.args.batch_size))

    def data(self, source: str, draw: int) -> MethodData:
        """What methods learn from; they keep in it what serves the next sparsity."""
        if (source, draw) not in self.learned:
            self.learned[source, draw] = MethodData(None, list(read_batches(self.model, self.batches(source, draw))))
        return self.learned[source, draw]

    def variant(self, cell: Cell) -> Variant:
        """What the cell is, for `run_evaluation`."""
        if cell.method == "dense":
            return Variant(cell.name)
        if cell.method == "int8":
            if self.int8 is None:
                self.int8 = int8_copy(self.model)
            return Variant(cell.name, "dense", None, self.int8)
        equal = cell.k if cell.equal_bytes else None
        if cell.k is None:
            config = method(cell.method).configure(self.model, MethodData(), None)
        else:
            config = self._kept(cell) or self._fitted(cell, cell.k)
        return Variant(cell.name, cell.method, config, equal_bytes=equal)

    def _kept(self, cell: Cell) -> CatsConfig | InputConfig | None:
        folder = self.args.out / "configs" / cell.folder
        if not folder.is_dir():
            return None
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if cell.method in METHODS and METHODS[cell.method].unit == "inputs":
            return InputConfig(**values)
        config = CatsConfig.from_dict(values)
        config.load_vectors(folder / FILE)
        return config

    def _fitted(self, cell: Cell, k: float) -> CatsConfig | InputConfig:
        """Learned now, and kept; seconds of it go into its record."""
        args, begun = self.args, time.perf_counter()
        if args.assemble:
            raise CatsError(f"{args.out / 'configs' / cell.folder} is not there; run the same without --assemble.")
        text = f"{cell.source}: {args.samples} sequences" if cell.source else f"{args.samples} sequences"
        text += f", draw {cell.draw}"
        config: Any
        if cell.method in METHODS and METHODS[cell.method].unit == "inputs":
            share = share_of_inputs(self.model, k) if cell.equal_bytes else k
            config = METHODS[cell.method].configure(self.model, self.data(cell.source, cell.draw), share)
            record: Any = {"data": text}
        else:
            target = SparsityTarget(sparsity=k, criterion=cell.method, distill_steps=args.distill_steps)
            batches: Any = self.batches(cell.source, cell.draw)
            if target.profile_is_enough:
                batches = calibrate(self.model, batches, data=text)
            config = find_config(self.model, batches, target, data=text).config
            record = config.calibration
        # results are for others: no path of this machine
        facts = {"model": Path(args.model).name, "seconds": round(time.perf_counter() - begun, 1)}
        config = replace(config, calibration={**record, **facts}) if isinstance(config, InputConfig) else config
        if isinstance(config, CatsConfig):
            config.calibration = {**record, **facts}
        self._keep(cell, config)
        return config

    def _keep(self, cell: Cell, config: CatsConfig | InputConfig) -> None:
        folder = self.args.out / "configs" / cell.folder
        half = folder.with_name(f"{folder.name}.part")  # so that a stopped run leaves no half of one
        half.mkdir(parents=True, exist_ok=True)
        if isinstance(config, InputConfig):
            values = {name: value for name, value in asdict(config).items() if name != "coverage"}
        else:
            values = config.to_dict()
            if config.vectors is not None:
                write_layer_tensors(half, config.vectors)
        write_json(half / "config.json", values, force=True)
        half.rename(folder)


def int8_copy(model: Any) -> Any:
    """The model with the weights of all linear layers inside the decoder layers as int8 would hold them."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for linears in decoder_linears(rounded).values():
            for linear in linears.values():
                linear.weight.copy_(round_int8(linear.weight))
    return rounded


def round_int8(weight: Tensor) -> Tensor:
    """A weight (out, in) as int8 holds it with a symmetric scale a row, max|w| / 127; computed in float32."""
    exact = weight.float()
    scale = exact.abs().amax(1, keepdim=True) / 127
    return (exact / scale.where(scale > 0, 1)).round() * scale
