"""What models are fine-tuned on: packed text with the loss on every token, or instructions with the loss on answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cats_llm.chat import Message, render
from cats_llm.errors import CatsError
from cats_llm.number_format import counted
from cats_llm.rows import Tally
from cats_llm.text import (
    Content,
    Pair,
    TextSource,
    encode,
    load_sequences,
    log_notes,
    read_contents,
    same_text,
    text_ends,
)
from cats_llm.training.config import DataConfig

IGNORED = -100
Example = dict[str, Tensor]
"""input_ids and labels, int64 (T,); a label of `IGNORED` is not trained on."""
# of what is read, at most this share is set aside for each purpose
_ASIDE = 10


@dataclass(frozen=True)
class Data:
    """What a run trains on and measures on; the same in every process.

    Attributes:
        train: the examples of the steps.
        heldout: measured at intervals; never trained on.
        aside: for calibrating thresholds; never trained on where it comes from the training data.
        record: what it is, for the log.
    """

    train: Sequence[Example]
    heldout: Sequence[Example]
    aside: Sequence[Example]
    record: dict[str, Any]

    def calibration_batches(self, size: int) -> list[dict[str, Tensor]]:
        """The examples set aside, in batches without labels."""
        batches = [collate(self.aside[i : i + size]) for i in range(0, len(self.aside), size)]
        return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]


def read_data(source: str, config: DataConfig, tokenizer: Any, seed: int, calibrates: bool) -> Data:
    """Read everything; what is set aside is drawn at random.

    Args:
        source: what is trained on: a text, or instructions in .jsonl, .parquet or a dataset.
        calibrates: the run needs examples to calibrate on.

    Raises:
        CatsError: a source cannot be read, is empty or too small, or is measured on and trained on.
    """
    if config.heldout is not None and same_text(config.heldout, source):
        raise CatsError(f"--heldout and --data are the same text ({source}); measure on another one.")

    def read(path: str, samples: int | None) -> Examples:
        text = TextSource(path, config.rows)
        return (read_instructions if is_instructions(text) else read_text)(text, tokenizer, config.seq_length, samples)

    pool = read(source, config.samples)
    order = torch.randperm(len(pool.examples), generator=torch.Generator().manual_seed(seed)).tolist()
    record: dict[str, Any] = {"train": source, "kind": "instructions" if pool.instructions else "text"}
    parts: dict[str, list[Example]] = {}
    for name, path, count, wanted in (
        ("heldout", config.heldout, config.heldout_samples, True),
        ("calibration", config.calibration, config.calibration_samples, calibrates),
    ):
        parts[name] = []
        if path is None:
            # also where it is not wanted: every method trains on the same examples
            count = max(1, min(count, len(pool.examples) // _ASIDE))
            taken, order = order[:count], order[count:]
            path, parts[name] = f"set aside from {source}", [pool.examples[i] for i in taken if wanted]
        elif wanted:
            parts[name] = read(path, count).examples
        if wanted:
            record[name] = path
    train = [pool.examples[i] for i in sorted(order)]
    if not train:
        raise CatsError(
            f"{source} holds {counted(len(pool.examples), 'example')}, too few to set some aside for measuring and "
            "calibrating; give more, or pass --heldout and --calibration."
        )
    if not any((example["labels"][1:] >= 0).any() for example in parts["heldout"]):
        raise CatsError("the held-out examples predict no token; give longer ones.")
    record |= {
        "seq_length": config.seq_length,
        "examples": len(train),
        "tokens": sum(len(example["input_ids"]) for example in train),
        "heldout_examples": len(parts["heldout"]),
        "calibration_examples": len(parts["calibration"]),
        "too_long": pool.too_long,
        "empty": pool.empty,
    }
    return Data(train, parts["heldout"], parts["calibration"], record)


@dataclass(frozen=True)
class Examples:
    """What was read.

    Attributes:
        examples: in the order of the source.
        too_long: how many instructions were left out, since they are longer than a sequence.
        empty: how many rows were left out, since they hold no text.
        instructions: whether they are that, and not text.
    """

    examples: list[Example]
    too_long: int = 0
    empty: int = 0
    instructions: bool = False


def is_instructions(source: TextSource | str) -> bool:
    """Whether the rows of the source are instructions: prompt and completion, or messages."""
    try:
        _, content = next(read_contents(source), ("", ""))
    except CatsError:
        return False  # the reader of texts says what is wrong
    return not isinstance(content, str)


def read_text(source: TextSource | str, tokenizer: Any, length: int, samples: int | None = None) -> Examples:
    """Text packed into sequences of ``length`` tokens, each predicting all of its tokens but the first.

    Args:
        samples: at most so many sequences.

    Raises:
        CatsError: there is no such text, or less than one sequence of it.
    """
    tally = Tally()
    sequences = load_sequences(source, tokenizer, length, samples=samples, tally=tally)
    examples = [{"input_ids": ids, "labels": ids} for ids in sequences]
    log_notes(source, tally)
    return Examples(examples, empty=tally.empty)


def read_instructions(source: TextSource | str, tokenizer: Any, length: int, samples: int | None = None) -> Examples:
    """Instructions, one a row; only answers are predicted.

    A row holds either ``prompt`` and ``completion``, two texts, or ``messages``, a conversation with ``role`` and
    ``content`` for the tokenizer's chat template, in which every message of the assistant is an answer.

    Args:
        source: see `cats_llm.text.read_contents`, which says what becomes of bad rows.
        length: instructions of more tokens are left out.
        samples: at most so many instructions are read.

    Raises:
        CatsError: the source is damaged, a row is neither, or nothing is left to train on.
    """
    examples: list[Example] = []
    too_long = 0
    tally = Tally()
    for where, content in islice(read_contents(source, tally), samples):
        example = _example_of(content, tokenizer, where)
        if len(example["input_ids"]) > length:
            too_long += 1
        else:
            examples.append(example)
    if not examples:
        reason = (
            f"all {too_long} are longer than {length} tokens; pass a larger --seq-length" if too_long else "add some"
        )
        raise CatsError(f"{TextSource.of(source).path} holds no instruction to train on: {reason}.")
    log_notes(source, tally)
    return Examples(examples, too_long, tally.empty, True)


def _example_of(content: Content, tokenizer: Any, where: str) -> Example:
    if isinstance(content, Pair):
        return _answered(content, tokenizer, where)
    if isinstance(content, str):
        raise CatsError(f"{where} is a text, among rows with prompt and completion or messages; train on one kind.")
    return _chat(content, tokenizer, where)


def _answered(pair: Pair, tokenizer: Any, where: str) -> Example:
    begin, end = text_ends(tokenizer)
    prompt = begin + encode(tokenizer, pair.prompt, where)
    # in one piece, as it is generated: tokenizers may treat the beginning of a text in a way of their own
    whole = begin + encode(tokenizer, pair.prompt + pair.completion, where)
    if tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id] if whole[-1:] != [tokenizer.eos_token_id] else []
    return _example(whole + end, [(_shared(prompt, whole), len(whole + end))])


def _chat(messages: list[Message], tokenizer: Any, where: str) -> Example:
    if not any(message["role"] == "assistant" for message in messages):
        raise CatsError(
            f"{where} has messages that are no conversation with an assistant in it, so there is no answer."
        )

    def tokens(part: list[Message], prompt: bool = False) -> list[int]:
        return encode(tokenizer, render(part, tokenizer, where, prompt), where)

    whole = tokens(messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            begin, end = _shared(tokens(messages[:i], prompt=True), whole), _shared(tokens(messages[: i + 1]), whole)
            if begin >= end:
                raise CatsError(
                    f"{where} has an answer that the chat template changes when more follows; "
                    "give prompt and completion."
                )
            spans.append((begin, end))
    return _example(whole, spans)


def _shared(a: list[int], b: list[int]) -> int:
    """How many tokens the two begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _example(ids: list[int], spans: Sequence[tuple[int, int]]) -> Example:
    labels = torch.full((len(ids),), IGNORED)
    for begin, end in spans:
        labels[begin:end] = torch.tensor(ids[begin:end])
    return {"input_ids": torch.tensor(ids), "labels": labels}


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch of examples: (B, T) with padding on the right, which attention_mask tells of and labels ignore.

    It is token 0, which every model has: a padding token that was added to the tokenizer may have no embedding.
    """

    def stack(rows: list[Tensor], fill: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=fill)

    ids = [example["input_ids"] for example in examples]
    return {
        "input_ids": stack(ids, 0),
        "labels": stack([example["labels"] for example in examples], IGNORED),
        "attention_mask": stack([torch.ones_like(row) for row in ids], 0),
    }
