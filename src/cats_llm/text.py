"""Text for calibration and evaluation: from files or hub datasets to token sequences of one length, streamed."""

import logging
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from cats_llm.chat import Message, conversation, render
from cats_llm.errors import CatsError, first_line
from cats_llm.options import Panel, option
from cats_llm.rows import Tally, missing_column, pieces, read_rows

Item = TypeVar("Item")
logger = logging.getLogger(__name__)

_CONVERSATIONS = ("messages", "conversations")


@dataclass(frozen=True)
class RowFormat:
    """Where the text stands in files of rows and in datasets."""

    panel = Panel.DATA

    text_column: str = option("text", help="Where the text or conversation is in .jsonl, .parquet and datasets.")
    dataset_config: str | None = option(None, help="Configuration of a hub dataset.")
    split: str = option("train", help="Split of a hub dataset, or of a folder laid out as one.")


@dataclass(frozen=True)
class TextSource:
    """A .txt, .jsonl or .parquet file, a folder of them, or a dataset on the hub.

    Attributes:
        path: of the file or folder, or the name of the dataset.
        rows: where the text stands in it.
    """

    path: str
    rows: RowFormat = RowFormat()

    @classmethod
    def of(cls, source: "TextSource | str") -> "TextSource":
        """The source itself; a path alone is read with the usual columns."""
        return source if isinstance(source, TextSource) else cls(source)


@dataclass
class TextSize:
    """How much text was read and turned into tokens.

    Attributes:
        tokens: with one end-of-text token a document.
        words: runs of characters that are no white space.
        bytes: in UTF-8.
    """

    tokens: int = 0
    words: int = 0
    bytes: int = 0


class Pair(NamedTuple):
    """A prompt and what answers it."""

    prompt: str
    completion: str


Content = str | Pair | list[Message]
"""What a row holds: a text, a prompt and its completion, or a conversation."""


def read_contents(source: TextSource | str, tally: Tally | None = None) -> Iterator[tuple[str, Content]]:
    """What the rows of a source hold, and where each stands.

    Of a row the first of these that has a value counts: the text column, ``messages`` or ``conversations``, ``prompt``
    with ``completion``. A row without any text in it (null, or white space) is left out and counted; one that is
    neither stops the reading.

    Args:
        tally: counts rows, and those that are left out.

    Raises:
        CatsError: from `read_rows`; or a row is damaged or has none of the columns.
    """
    source = TextSource.of(source)
    tally = tally if tally is not None else Tally()
    rows = source.rows
    columns = (rows.text_column, *_CONVERSATIONS, *Pair._fields)
    for where, row in read_rows(source.path, columns, rows.dataset_config, rows.split, tally):
        content = row if isinstance(row, str) else _content(row, rows.text_column, where)
        if isinstance(row, str) or not _is_empty(content):
            yield where, content
        else:
            tally.count_empty()


def _content(row: dict[str, Any], text_column: str, where: str) -> Content:
    # as pandas writes a missing value
    row = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
    value = row.get(text_column)
    if isinstance(value, str):
        return value.removeprefix("\ufeff")
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return conversation(value, where)
    if value is not None:
        kind = "list" if isinstance(value, list) else type(value).__name__
        raise CatsError(f"{where} has no text in the column {text_column!r} but a {kind}; pass --text-column.")
    for name in _CONVERSATIONS:
        if row.get(name) is not None:
            return conversation(row[name], where)
    if row.keys() >= {*Pair._fields}:
        return _pair(row["prompt"], row["completion"], where)
    if text_column not in row and not row.keys() & {*_CONVERSATIONS}:
        raise missing_column(row, text_column, where)
    return ""


def _pair(prompt: Any, completion: Any, where: str) -> Content:
    if isinstance(prompt, list) and isinstance(completion, list):
        return conversation([*prompt, *completion], where)
    if not isinstance(prompt, str | None) or not isinstance(completion, str | None):
        raise CatsError(f"{where} has no text in prompt and completion, nor messages.")
    return "" if prompt is None or completion is None else Pair(prompt, completion)


def _is_empty(content: Content) -> bool:
    if isinstance(content, Pair):
        return not content.completion.strip()
    if isinstance(content, str):
        return not content.strip()
    return not any(message["content"].strip() or "tool_calls" in message for message in content)


def read_documents(source: TextSource | str, tokenizer: Any = None, tally: Tally | None = None) -> Iterator[str]:
    """Documents of a text source, one at a time.

    Conversations become texts by the tokenizer's chat template, without the special tokens at their beginning and
    end that `token_sequences` adds; a prompt and its completion are one text.

    Args:
        tokenizer: has the chat template; needed only for conversations.
        tally: counts rows, and those that are left out; None says at the end how many in a warning of the log.

    Raises:
        CatsError: there is no such file or dataset, or it cannot be read; see `read_contents`.
    """
    counted = tally if tally is not None else Tally()
    for where, content in read_contents(source, counted):
        if isinstance(content, Pair):
            yield content.prompt + content.completion
        elif isinstance(content, str):
            yield content
        elif tokenizer is None:
            raise CatsError(f"{where} has messages, which need a tokenizer with a chat template; pass one.")
        else:
            yield _without_ends(render(content, tokenizer, where), tokenizer)
    if tally is None:
        log_notes(source, counted)


def log_notes(source: TextSource | str, tally: Tally) -> None:
    """Tell the user, by a warning of the log, what was left out of a source."""
    for note in tally.notes():
        logger.warning("%s: %s.", TextSource.of(source).path, note)


def text_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after every text; most put one before it, or none."""
    plain, whole = encode(tokenizer, "a"), encode(tokenizer, "a", add_special_tokens=True)
    for begin in range(len(whole) - len(plain) + 1):
        end = begin + len(plain)
        if whole[begin:end] == plain:
            return whole[:begin], whole[end:]
    # it changes the text too
    mask = tokenizer("a", return_special_tokens_mask=True, verbose=False).special_tokens_mask
    number = next((i for i, special in enumerate(mask) if not special), len(mask))
    return whole[:number], whole[len(mask) - next((i for i, s in enumerate(mask[::-1]) if not s), 0) :]


def encode(tokenizer: Any, text: str, where: str = "the text", add_special_tokens: bool = False) -> list[int]:
    """The tokens of a text.

    Args:
        where: what the text is, for errors.

    Raises:
        CatsError: the tokenizer cannot read it.
    """
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
    except Exception as error:  # tokenizers raises whatever its parts raise
        raise CatsError(f"the tokenizer cannot read {where} ({first_line(error)}); mend it or leave it out.") from error
    return ids


def _without_ends(text: str, tokenizer: Any) -> str:
    """A conversation without the special tokens that are added to every text again."""
    text = text.removeprefix("".join(tokenizer.convert_ids_to_tokens(text_ends(tokenizer)[0])))
    end = tokenizer.eos_token
    return text.rstrip().removesuffix(end) if end and text.rstrip().endswith(end) else text


def token_sequences(
    documents: Iterable[str],
    tokenizer: Any,
    length: int,
    stride: int | None = None,
    size: TextSize | None = None,
    tally: Tally | None = None,
) -> Iterator[Tensor]:
    """Cut the documents, joined by end-of-text tokens, into sequences of ``length`` tokens; the rest is dropped.

    Where the tokenizer begins texts with special tokens (a begin-of-text token, or several), every sequence begins
    with them: models trained that way put most of their attention there.

    Args:
        stride: text tokens from the beginning of one sequence to that of the next; None lets none overlap.
        size: counts what is read.
        tally: of the reading that brings the documents, to say where one stands that the tokenizer cannot read.

    Yields:
        input_ids, int64 (length,).
    """
    size = size if size is not None else TextSize()
    start, eos = text_ends(tokenizer)
    if tokenizer.eos_token_id is not None:
        eos = [tokenizer.eos_token_id]
    if length <= len(start):
        raise CatsError(f"a sequence length of {length} leaves no room for text; pass a larger one.")
    room = length - len(start)
    step = min(stride or room, room)
    waiting: list[int] = []
    for document in documents:
        for new in _tokens(document, tokenizer, (tally.where if tally else "") or "a document", eos, size):
            waiting += new
            begin = 0
            while begin + room <= len(waiting):
                yield torch.tensor(start + waiting[begin : begin + room])
                begin += step
            del waiting[:begin]


def _tokens(document: str, tokenizer: Any, where: str, eos: list[int], size: TextSize) -> Iterator[list[int]]:
    """The tokens of a document, a piece at a time, and the end-of-text token."""
    parts = list(pieces(document)) if document else []
    for number, part in enumerate(parts, 1):
        new = encode(tokenizer, part, where) + (eos if number == len(parts) else [])
        size.tokens += len(new)
        size.words += len(part.split())
        size.bytes += len(part.encode())
        yield new


def shuffled(items: Iterable[Item], seed: int, buffer: int = 1024) -> Iterator[Item]:
    """The items in a random order: each is drawn from a buffer of the next ``buffer`` ones."""
    rng = random.Random(seed)
    items = iter(items)
    held = list(islice(items, buffer))
    for item in items:
        i = rng.randrange(len(held))
        held[i], item = item, held[i]
        yield item
    rng.shuffle(held)
    yield from held


def load_sequences(
    source: TextSource | str,
    tokenizer: Any,
    length: int,
    samples: int | None = None,
    seed: int | None = None,
    stride: int | None = None,
    size: TextSize | None = None,
    tally: Tally | None = None,
) -> Iterator[Tensor]:
    """Token sequences of a text source.

    Args:
        length: tokens a sequence.
        samples: at most so many sequences; None takes all.
        seed: draw them in a random order; None takes them in the order of the text.
        stride, size: see `token_sequences`.
        tally: see `read_documents`.

    Raises:
        CatsError: from `read_documents`; or the text is empty or shorter than one sequence.
    """
    source = TextSource.of(source)
    counted = tally if tally is not None else Tally()
    size = size if size is not None else TextSize()
    documents = read_documents(source, tokenizer, counted)
    sequences: Iterable[Tensor] = token_sequences(documents, tokenizer, length, stride, size, counted)
    if seed is not None:
        sequences = shuffled(sequences, seed)
    number = 0
    for sequence in islice(sequences, samples):
        number += 1
        yield sequence
    if number == 0 and samples != 0:
        if size.bytes == 0:
            empty = f": all of its {counted.rows} rows are empty" if counted.empty else ""
            raise CatsError(f"{source.path} holds no text{empty}.")
        raise CatsError(
            f"{source.path} holds fewer tokens than one sequence of {length}; give more text or a smaller --seq-length."
        )
    if tally is None:
        log_notes(source, counted)


def check_length(length: int, config: Any) -> None:
    """Refuse sequences longer than the model of this config can read.

    Raises:
        CatsError: they are.
    """
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise CatsError(f"--seq-length {length} is more than the {limit} tokens that the model can read.")


def same_text(one: str, other: str) -> bool:
    """Whether two text sources are the same: the same name, or files of the same content."""
    a, b = Path(one).expanduser(), Path(other).expanduser()
    if a.is_file() and b.is_file():
        return a.samefile(b) or (a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes())
    if a.exists() and b.exists():
        return a.samefile(b)
    return one == other


def batched(sequences: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Stack up to ``size`` sequences (T,) into batches (B, T)."""
    sequences = iter(sequences)
    while batch := list(islice(sequences, size)):
        yield torch.stack(batch)
