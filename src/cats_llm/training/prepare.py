"""What comes before training: reading data, choosing thresholds, and the folder of a run that may be resumed."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cats_llm import distributed
from cats_llm.calibration.calibrate import calibrate
from cats_llm.calibration.profile import Profile
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.errors import CatsError
from cats_llm.outputs import write_json
from cats_llm.text import RowFormat, TextSource, same_text
from cats_llm.training.data import Example, Examples, collator, is_instructions, read_instructions, read_text
from cats_llm.training.run import Data
from cats_llm.training.trainer import last_checkpoint

_RUN_FILE = "run.json"
# of what is read, at most this share is set aside for each purpose
_ASIDE = 10


@dataclass(frozen=True)
class Sources:
    """Where the examples come from.

    Attributes:
        train: a text (see `cats_llm.text.read_documents`), or instructions in .jsonl, .parquet or a dataset.
        heldout: the same, to measure on; None sets a part of ``train`` aside.
        calibration: a text to calibrate thresholds on; None sets a part of ``train`` aside.
        length: tokens a sequence at most.
        samples: at most so many training examples are read.
        heldout_samples, calibration_samples: at most so many examples for each.
        reading: where the text stands in the rows of all of them.
    """

    train: str
    heldout: str | None
    calibration: str | None
    length: int
    samples: int | None
    heldout_samples: int
    calibration_samples: int
    reading: RowFormat

    def instructions(self, source: str) -> bool:
        """Whether it is read as instructions."""
        return is_instructions(TextSource(source, self.reading))

    def enough_for(self, examples: int) -> "Sources":
        """The same, reading no more than so many training examples and what is set aside."""
        return replace(self, samples=examples + self.heldout_samples + self.calibration_samples)

    def _read(self, path: str, tokenizer: Any, samples: int | None) -> Examples:
        read = read_instructions if self.instructions(path) else read_text
        return read(TextSource(path, self.reading), tokenizer, self.length, samples)

    def read(self, tokenizer: Any, seed: int, calibrates: bool) -> Data:
        """Read everything; what is set aside is drawn at random.

        Args:
            calibrates: the run needs examples to calibrate on.

        Raises:
            CatsError: a source cannot be read, is empty or too small, or is measured on and trained on.
        """
        if self.heldout is not None and same_text(self.heldout, self.train):
            raise CatsError(f"--heldout and --data are the same text ({self.train}); measure on another one.")
        found = self._read(self.train, tokenizer, self.samples)
        pool = found.examples
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
        record = {"train": self.train, "kind": "instructions" if found.instructions else "text"}
        parts: dict[str, list[Example]] = {}
        for name, source, count in (
            ("heldout", self.heldout, self.heldout_samples),
            ("calibration", self.calibration, self.calibration_samples),
        ):
            wanted = calibrates or name == "heldout"
            parts[name] = []
            if source is None:
                # also where it is not wanted: every method trains on the same examples
                count = max(1, min(count, len(pool) // _ASIDE))
                taken, order = order[:count], order[count:]
                source, parts[name] = f"set aside from {self.train}", [pool[i] for i in taken if wanted]
            elif wanted:
                parts[name] = self._read(source, tokenizer, count).examples
            if wanted:
                record[name] = source
        train = [pool[i] for i in sorted(order)]
        if not train:
            raise CatsError(
                f"{self.train} holds {len(pool)} example{'s' * (len(pool) > 1)}, too few to set some aside for "
                "measuring and calibrating; give more, or pass --heldout and --calibration."
            )
        if not any((example["labels"][1:] >= 0).any() for example in parts["heldout"]):
            raise CatsError("the held-out examples predict no token; give longer ones.")
        return Data(
            train,
            parts["heldout"],
            parts["calibration"],
            collator(),
            {
                **record,
                "seq_length": self.length,
                "examples": len(train),
                "tokens": sum(len(example["input_ids"]) for example in train),
                "heldout_examples": len(parts["heldout"]),
                "calibration_examples": len(parts["calibration"]),
                "too_long": found.too_long,
                "empty": found.empty,
            },
        )


def choose_thresholds(
    model: Any, data: Data, sparsity: float | None, profile: Profile | None, batch_size: int
) -> CatsConfig:
    """Thresholds of the model as it is: given by a profile, kept, or calibrated on the examples set aside.

    Raises:
        CatsError: the profile is of another model, or there is neither a sparsity nor a CATS model to keep.
    """
    own = getattr(model.config, "quantization_config", None)
    if sparsity is None:
        if not isinstance(own, CatsConfig):
            raise CatsError("the model is dense, so the method cats needs a sparsity; pass --sparsity 0.5.")
        return own
    if profile is not None:
        profile.check_model(model)
    else:
        batches = data.calibration_batches(batch_size)[distributed.rank() :: distributed.world_size()]
        profile = calibrate(model, batches, str(data.record["calibration"]))
    return profile.config(sparsity)


def begin(work: Path, facts: dict[str, Any], resume: bool, force: bool) -> tuple[Path, list[dict[str, Any]]] | None:
    """Make the folder of a run, or find the checkpoint to go on from. All processes get the same answer.

    Args:
        work: the folder.
        facts: what decides the run; a run is resumed only with the same.

    Raises:
        CatsError: there is an unfinished run that is neither resumed nor to be replaced, or it is another run.
    """
    found: Any = None
    error: str | None = None
    if distributed.rank() == 0:
        try:
            found = _begin(work, json.loads(json.dumps(facts)), resume, force)
        except CatsError as reason:
            error = str(reason)
    found, error = distributed.broadcast((found, error))
    if error is not None:
        raise CatsError(error)
    checkpoint: tuple[Path, list[dict[str, Any]]] | None = found
    return checkpoint


def _begin(work: Path, facts: dict[str, Any], resume: bool, force: bool) -> tuple[Path, list[dict[str, Any]]] | None:
    last = last_checkpoint(work) if work.is_dir() else None
    if last is not None and resume:
        before = json.loads((work / _RUN_FILE).read_text(encoding="utf-8"))
        for key in facts:
            if facts[key] != before.get(key):
                raise CatsError(
                    f"{work} was begun with {key} {before.get(key)!r} and not {facts[key]!r}; resume it with the same "
                    "options, or begin again with --force."
                )
        return last
    if last is not None and not force:
        raise CatsError(f"{work} holds a run that was not finished; pass --resume, or --force to begin again.")
    finish(work)
    work.mkdir(exist_ok=True)
    write_json(work / _RUN_FILE, facts, force=True)
    return None


def finish(work: Path) -> None:
    """Remove what a run needs only while it is unfinished; TensorBoard's files stay."""
    if not work.is_dir():
        return
    for path in work.iterdir():
        if path.is_dir() and path.name != "tensorboard":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    if not any(work.iterdir()):
        work.rmdir()
