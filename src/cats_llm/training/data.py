"""What models are fine-tuned on: packed text with the loss on every token, or instructions with the loss on answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from cats_llm.chat import Message, render
from cats_llm.errors import CatsError
from cats_llm.rows import Tally
from cats_llm.text import Content, Pair, TextSource, encode, load_sequences, log_notes, read_contents, text_ends

Example = dict[str, Tensor]
"""input_ids and labels, int64 (T,); a label of `IGNORED` is not trained on."""

IGNORED = -100


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
    asked = begin + encode(tokenizer, pair.prompt, where)
    # in one piece, as it is generated: tokenizers may treat the beginning of a text in a way of their own
    whole = begin + encode(tokenizer, pair.prompt + pair.completion, where)
    if tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id] if whole[-1:] != [tokenizer.eos_token_id] else []
    return _example(whole + end, [(_shared(asked, whole), len(whole + end))])


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


def collator() -> Callable[[Sequence[Example]], dict[str, Tensor]]:
    """Batches examples: (B, T) with padding on the right, which attention_mask tells of and labels ignore.

    It is token 0, which every model has: a padding token that was added to the tokenizer may have no embedding.
    """

    def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)

        def stack(name: str, fill: int) -> Tensor:
            rows = [example[name] for example in examples]
            return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=fill) for row in rows])

        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return {"input_ids": stack("input_ids", 0), "labels": stack("labels", IGNORED), "attention_mask": mask}

    return collate
