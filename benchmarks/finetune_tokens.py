"""Texts as token ids in one file, made once: what is trained on, what is set aside from it, what is reported on."""

import argparse
import json
import lzma
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cats_llm import bundled
from cats_llm.errors import CatsError
from cats_llm.outputs import write_file
from cats_llm.text import load_sequences, read_documents, token_sequences
from cats_llm.training.data import Example

# characters of a document that stay together: many books in few steps
_PIECE = 8_000
# words in a row that two texts may not share
_RUN = 13
_TEXT = "text."


def add_options(parser: argparse.ArgumentParser) -> None:
    """What can be said of the texts."""
    group = parser.add_argument_group("texts, for --prepare, or without --tokens")
    group.add_argument("--data", type=Path, nargs="+", help="training texts, .txt or .txt.xz")
    group.add_argument(
        "--text",
        action="append",
        metavar="NAME=FILE",
        help="reported on; repeat it. Default: the bundled held-out books",
    )
    group.add_argument("--seq-length", type=int, default=256)
    group.add_argument("--train-tokens", type=int, help="at most so many. Default: all of --data")
    group.add_argument("--final-samples", type=int, help="at most so many sequences of each text. Default: all")
    group.add_argument("--validation-samples", type=int, default=64, help="set aside to choose learning rates on")
    group.add_argument("--calibration-samples", type=int, default=64, help="set aside for thresholds")
    group.add_argument("--data-seed", type=int, default=0, help="of what is set aside")


@dataclass(frozen=True)
class Windows(Sequence[Example]):
    """Sequences of one length, (n, T), as examples in which every token is predicted."""

    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Windows(self.ids[index])
        ids = self.ids[index].long()
        return {"input_ids": ids, "labels": ids}

    def spread(self, count: int | None) -> "Windows":
        """At most so many of them, from all over the text."""
        if count is None or count >= len(self):
            return self
        return Windows(self.ids[torch.arange(count) * len(self) // count])


@dataclass(frozen=True)
class Tokens:
    """What a file of `prepare` holds.

    Attributes:
        texts: reported on, by name, in the order of --text.
        record: what it was made of, for the results.
    """

    train: Windows
    validation: Windows
    calibration: Windows
    texts: dict[str, Windows]
    record: dict[str, Any]

    @property
    def length(self) -> int:
        """Tokens a sequence."""
        return self.train.ids.shape[1]


def read_tokens(path: Path) -> Tokens:
    """A file of `prepare`."""
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
            # of 16 bits without a sign PyTorch can do little
            parts = {name: Windows(file.get_tensor(name).int()) for name in file.keys()}  # noqa: SIM118  # no mapping
    except Exception as error:  # whatever safetensors raises
        raise CatsError(f"{path} is no file of --prepare, or damaged ({error}); make it again.") from error
    texts = {name: parts[_TEXT + name] for name in record["texts"]}
    return Tokens(parts["train"], parts["validation"], parts["calibration"], texts, record)


def prepare(path: Path, args: argparse.Namespace, tokenizer: Any) -> Tokens:
    """Tokenise everything and write it.

    Raises:
        CatsError: the training text is too short to set anything aside.
    """
    if not args.data:
        raise CatsError("there is nothing to train on; pass --data or --tokens.")
    texts = named_files(args.text or [f"books={bundled.heldout_text()}"])
    length = args.seq_length
    reported = {name: [*load_sequences(str(file), tokenizer, length)] for name, file in texts.items()}
    known = set().union(*(word_runs(" ".join(read_documents(str(file)))) for file in texts.values()))
    training, left_out = [], 0
    for document in documents(args.data):
        for piece in pieces(document):
            if known & word_runs(piece):
                left_out += 1
            else:
                training.append(piece)
    random.Random(args.data_seed).shuffle(training)
    sequences = token_sequences(training, tokenizer, length)
    aside = {name: [*islice(sequences, getattr(args, f"{name}_samples"))] for name in ("calibration", "validation")}
    wanted = None if args.train_tokens is None else max(1, args.train_tokens // length)
    train = [*islice(sequences, wanted)]
    if not train:
        raise CatsError("the training texts are too short to set some aside; give more, or set less aside.")
    small = torch.uint16 if len(tokenizer) <= 1 << 16 else torch.int32
    parts = {"train": train, **aside, **{_TEXT + name: windows for name, windows in reported.items()}}
    tensors = {name: Windows(torch.stack(rows)) for name, rows in parts.items()}
    tensors |= {_TEXT + name: tensors[_TEXT + name].spread(args.final_samples) for name in reported}
    record = {
        "train": [file.name for file in args.data],
        "texts": {name: file.name for name, file in texts.items()},
        "sequence length": length,
        f"pieces of at most about {_PIECE} characters": len(training),
        f"pieces left out, since they share {_RUN} words in a row with a text that is reported on": left_out,
        "tokens": {name.removeprefix(_TEXT): windows.ids.numel() for name, windows in tensors.items()},
        "seed": args.data_seed,
    }
    with write_file(path, force=True) as file:
        save_file({k: v.ids.to(small) for k, v in tensors.items()}, file, {"record": json.dumps(record)})
    return read_tokens(path)


def named_files(pairs: list[str]) -> dict[str, Path]:
    """NAME=FILE as what it says.

    Raises:
        CatsError: it says something else.
    """
    split = [pair.partition("=") for pair in pairs]
    for name, _, file in split:
        if not name or not file or name in ("train", "validation", "calibration"):
            raise CatsError(f"--text {name}: write NAME=FILE, with a name of its own.")
    return {name: Path(file) for name, _, file in split}


def documents(files: list[Path]) -> Iterator[str]:
    """The documents of all files."""
    for path in files:
        if path.suffix != ".xz":
            yield from read_documents(str(path))
            continue
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / path.stem
            text.write_bytes(lzma.decompress(path.read_bytes()))
            yield from read_documents(str(text))


def word_runs(text: str) -> set[int]:
    """The runs of so many words, by hash."""
    words = text.lower().split()
    return {hash(tuple(words[i : i + _RUN])) for i in range(len(words) - _RUN + 1)}


def pieces(document: str) -> Iterator[str]:
    """Parts of a document, ending where a paragraph does."""
    part: list[str] = []
    size = 0
    for paragraph in document.splitlines():
        part.append(paragraph)
        size += len(paragraph)
        if size >= _PIECE:
            yield "\n".join(part)
            part, size = [], 0
    if part:
        yield "\n".join(part)
