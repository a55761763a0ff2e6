"""What models are fine-tuned on: packed text with the loss on every token, or instructions with the loss on answers."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cats_llm.errors import CatsError
from cats_llm.text import load_sequences

Example = dict[str, Tensor]
"""input_ids and labels, int64 (T,); a label of `IGNORED` is not trained on."""

IGNORED = -100


@dataclass(frozen=True)
class Examples:
    """What was read.

    Attributes:
        examples: in the order of the source.
        too_long: how many instructions were left out, since they are longer than a sequence.
    """

    examples: list[Example]
    too_long: int = 0


def is_instructions(source: str, text_column: str = "text") -> bool:
    """Whether the source is a .jsonl file whose rows are instructions: prompt and completion, or messages."""
    path = Path(source).expanduser()
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as stream:
        first = next((line for line in stream if line.strip()), "")
    try:
        row = json.loads(first)
    except ValueError:
        return False  # the reader of texts says what is wrong
    return (
        isinstance(row, dict) and text_column not in row and ("messages" in row or {"prompt", "completion"} <= {*row})
    )


def read_text(source: str, tokenizer: Any, length: int, samples: int | None = None, **reading: Any) -> Examples:
    """Text packed into sequences of ``length`` tokens, each predicting all of its tokens but the first.

    Args:
        source: see `cats_llm.text.load_sequences`, which takes ``reading`` too.
        samples: at most so many sequences.

    Raises:
        CatsError: there is no such text, or less than one sequence of it.
    """
    sequences = load_sequences(source, tokenizer, length, samples=samples, **reading)
    return Examples([{"input_ids": ids, "labels": ids} for ids in sequences])


def read_instructions(source: str, tokenizer: Any, length: int, samples: int | None = None) -> Examples:
    """Instructions of a .jsonl file, one a line; only answers are predicted.

    A row holds either ``prompt`` and ``completion``, two texts, or ``messages``, a conversation with ``role`` and
    ``content`` for the tokenizer's chat template, in which every message of the assistant is an answer.

    Args:
        length: instructions of more tokens are left out.
        samples: at most so many instructions are read.

    Raises:
        CatsError: the file is damaged, a row is neither, or nothing is left to train on.
    """
    examples: list[Example] = []
    too_long = 0
    for where, row in islice(_rows(Path(source).expanduser()), samples):
        example = _chat(row["messages"], tokenizer, where) if "messages" in row else _pair(row, tokenizer, where)
        if len(example["input_ids"]) > length:
            too_long += 1
        else:
            examples.append(example)
    if not examples:
        reason = (
            f"all {too_long} are longer than {length} tokens; pass a larger --seq-length" if too_long else "add some"
        )
        raise CatsError(f"{source} holds no instruction to train on: {reason}.")
    return Examples(examples, too_long)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                where = f"line {number} of {path}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise CatsError(f"{where} is not JSON: {error.msg}.") from error
                if not isinstance(row, dict):
                    raise CatsError(f"{where} is no JSON object; give prompt and completion, or messages.")
                yield where, row
    except UnicodeDecodeError as error:
        raise CatsError(f"{path} is not UTF-8 text (byte {error.start}); convert it first.") from error
    except OSError as error:
        raise CatsError(f"could not read {path}: {error.strerror or error}.") from error


def _pair(row: dict[str, Any], tokenizer: Any, where: str) -> Example:
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        raise CatsError(f"{where} has no text in prompt and completion, nor messages (it has: {', '.join(row)}).")
    asked = tokenizer(prompt, verbose=False).input_ids
    # in one piece, as it is generated: tokenizers may treat the beginning of a text in a way of their own
    whole = tokenizer(prompt + completion, verbose=False).input_ids
    if tokenizer.eos_token_id is not None and whole[-1:] != [tokenizer.eos_token_id]:
        whole = [*whole, tokenizer.eos_token_id]
    return _example(whole, [(_shared(asked, whole), len(whole))])


def _chat(messages: Any, tokenizer: Any, where: str) -> Example:
    known = isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= {*m} for m in messages)
    if not known or not any(message["role"] == "assistant" for message in messages):
        raise CatsError(f"{where} has messages that are no conversation with role and content and an assistant in it.")
    if not tokenizer.chat_template:
        raise CatsError(f"{where} has messages, but the tokenizer has no chat template; give prompt and completion.")

    def tokens(part: list[Any], prompt: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

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


def collator(tokenizer: Any) -> Callable[[Sequence[Example]], dict[str, Tensor]]:
    """Batches examples: (B, T) with padding on the right, which attention_mask tells of and labels ignore."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(token for token in ids if token is not None)

    def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)

        def stack(name: str, fill: int) -> Tensor:
            rows = [example[name] for example in examples]
            return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=fill) for row in rows])

        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return {"input_ids": stack("input_ids", pad), "labels": stack("labels", IGNORED), "attention_mask": mask}

    return collate
