"""What calibration runs on: the text in the forms that people have it in, and its pass through the decoder."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.distributed import sum_over_processes
from cats_llm.dtypes import dtype_name
from cats_llm.errors import CatsError
from cats_llm.model.architecture import check_predicts_tokens, text_alone
from cats_llm.model.structure import unwrap
from cats_llm.model.token_mask import sparse_tokens
from cats_llm.model.tokens import check_positions, check_tokens

CalibrationData = Iterable[Any]
"""One batch or many, in any form that `read_batches` takes."""

Inputs = dict[str, Tensor]
"""input_ids, int64 (B, T), and attention_mask (B, T) where some of the tokens are padding."""

_TAKEN = (
    "pass a tensor of token numbers (sequences, tokens), lists of token numbers, a tokenizer's output, texts together "
    "with tokenizer=, or an iterable of any of these, as a DataLoader"
)


def read_batches(model: nn.Module, data: CalibrationData, tokenizer: Any = None) -> Iterator[Inputs]:
    """The calibration text as inputs of a model, one batch at a time.

    Args:
        model: what they are for; tokens that it has no embedding for are refused.
        data: one batch, or an iterable of batches, which is consumed one at a time. A batch is

            - token numbers as a tensor or numpy array (B, T) or (T,), or as lists, a list a sequence; lists of
              different lengths are sequences of their own;
            - a mapping of ``input_ids`` in one of these forms and maybe an ``attention_mask`` of the same shape, as a
              tokenizer returns it, or a list of such mappings; other keys are left out;
            - a tuple or list of tensors as a DataLoader over a TensorDataset gives it: input_ids, then maybe an
              attention_mask (of the same shape, only 0 and 1); what follows is left out;
            - a text or a list of texts, with ``tokenizer``.
        tokenizer: for texts, and to name tokens in errors.

    Raises:
        CatsError: it is something else, or holds tokens that the model cannot read.
    """
    for ids, mask in _all_parts(data, tokenizer):
        if ids.dim() != 2:
            raise CatsError(
                f"a calibration batch has the shape {tuple(ids.shape)}; it must be (sequences, tokens) or (tokens,)."
            )
        if mask is not None and mask.dim() == 1 and len(ids) == 1:
            mask = mask[None]
        if mask is not None and mask.shape != ids.shape:
            raise CatsError(
                f"a calibration batch has input_ids of shape {tuple(ids.shape)} but an attention_mask of shape "
                f"{tuple(mask.shape)}; they must be equal."
            )
        check_positions(model, ids.shape[1])
        if mask is None:
            check_tokens(model, ids, tokenizer)
            yield {"input_ids": ids}
            continue
        # nobody reads the padding, so what stands there need not be a token of the model
        ids = ids.masked_fill(mask.to(ids.device) == 0, 0)
        check_tokens(model, ids, tokenizer)
        yield {"input_ids": ids, "attention_mask": mask}


_Part = tuple[Tensor, Tensor | None]


def _all_parts(data: Any, tokenizer: Any) -> Iterator[_Part]:
    """Input ids and mask of every batch, not checked yet."""
    pair = isinstance(data, (list, tuple)) and len(data) == 2 and _is_masked(data)
    if isinstance(data, (str, Mapping)) or _is_array(data) or _is_sequence(data) or pair:
        data = [data]
    if isinstance(data, (bytes, nn.Module)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise CatsError(f"calibration data is {_described(data)}; {_TAKEN}.")
    for item in data:
        yield from _parts(item, tokenizer)


def _parts(item: Any, tokenizer: Any) -> Iterator[_Part]:
    """Of one batch, or of several in a list; each is first brought into the form of a mapping."""
    if isinstance(item, str):
        item = _tokenized(item, tokenizer)
    elif _is_array(item) or _is_sequence(item):
        item = {"input_ids": item}
    elif isinstance(item, (list, tuple)) and item:
        if _is_masked(item):
            item = {"input_ids": item[0], "attention_mask": item[1]}
        elif _is_array(item[0]) and item[0].ndim > 1:
            item = {"input_ids": item[0]}
        elif all(map(_is_sequence, item)):
            item = {"input_ids": item}
    if isinstance(item, (list, tuple)):
        for part in item:
            yield from _parts(part, tokenizer)
        return
    if not isinstance(item, Mapping):
        raise CatsError(f"a calibration batch is {_described(item)}; {_TAKEN}.")
    if item.get("input_ids") is None:
        raise CatsError(f"a calibration batch has no input_ids, only {', '.join(map(str, item)) or 'nothing'}.")
    ids, mask = _blocks(item["input_ids"]), item.get("attention_mask")
    masks = [None] * len(ids) if mask is None else _blocks(mask, "attention_mask")
    if len(masks) != len(ids):
        raise CatsError(f"a calibration batch has {len(ids)} sequences but an attention_mask of {len(masks)}.")
    yield from zip(ids, masks, strict=True)


def _blocks(values: Any, name: str = "input_ids") -> list[Tensor]:
    """Tensors (B, T): one if it is one or all sequences are of one length, else one a sequence."""
    if _is_array(values) or _is_sequence(values):
        tensor = _tensor(values, name)
        return [tensor[None] if tensor.dim() == 1 and name == "input_ids" else tensor]
    if not isinstance(values, (list, tuple, np.ndarray)):
        raise CatsError(f"{name} of a calibration batch is {_described(values)}; {_TAKEN}.")
    rows = [_tensor(row, name) if _is_array(row) or _is_sequence(row) else _refused(row, name) for row in values]
    if len({row.shape for row in rows}) == 1:
        return [torch.stack(rows)]
    return [row[None] for row in rows]


def _tensor(values: Any, name: str) -> Tensor:
    """One sequence or mask as a tensor; token numbers in int64.

    Raises:
        CatsError: they are no whole numbers.
    """
    tensor: Tensor = values
    if not isinstance(values, Tensor):
        try:
            array = np.asarray(values)
            array = array.astype(np.int64) if array.dtype.kind in "iu" else array
            tensor = torch.from_numpy(np.ascontiguousarray(array))
        except (TypeError, ValueError, OverflowError) as error:
            raise CatsError(f"{name} of a calibration batch is {_described(values)}; {_TAKEN}.") from error
    if not tensor.numel() or name != "input_ids":
        return tensor if tensor.numel() else tensor.long()
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise CatsError(
            f"{name} of a calibration batch holds {dtype_name(tensor.dtype)} values, which are no "
            f"token numbers; {_TAKEN}."
        )
    return tensor.long()


def _tokenized(text: str, tokenizer: Any) -> Any:
    if tokenizer is None:
        raise CatsError(
            f"the calibration data holds a text ({short(text)}); pass tokenizer= with it, or token numbers."
        )
    try:
        return {"input_ids": tokenizer(text, verbose=False)["input_ids"]}
    except (TypeError, ValueError) as error:  # as for a lone surrogate
        raise CatsError(f"the tokenizer cannot read the calibration text {short(text)}; leave it out.") from error


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype != object)


def _is_sequence(value: Any) -> bool:
    """Whether it is a list of numbers: one sequence. What numbers, `_tensor` looks at."""
    if isinstance(value, Tensor | np.ndarray):
        return _is_array(value) and value.ndim == 1
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(v, (int, float, np.generic)) for v in value)
    )


def _is_masked(item: Sequence[Any]) -> bool:
    """Whether tensors are input_ids and attention_mask, as they come from a TensorDataset."""
    if len(item) < 2 or not (_is_array(item[0]) and _is_array(item[1])) or item[0].shape != item[1].shape:
        return False
    ids, mask = (torch.as_tensor(part) for part in item[:2])
    return bool(((mask == 0) | (mask == 1)).all()) and not bool(((ids == 0) | (ids == 1)).all())


def _refused(value: Any, name: str) -> Tensor:
    raise CatsError(f"{name} of a calibration batch holds {_described(value)}; {_TAKEN}.")


def _described(value: Any) -> str:
    return "None" if value is None else f"{short(value)}, a {type(value).__name__}"


def run_decoder(model: nn.Module, inputs: Mapping[str, Tensor], head: bool = False) -> Any:
    """Call the language model, without its head unless the logits are needed.

    Raises:
        CatsError: the model does not run on text alone, or has no head that predicts tokens.
    """
    base: Any = unwrap(model)
    if head:
        check_predicts_tokens(model, "comparing predictions")
    body = base.base_model if hasattr(base, "base_model") else base
    device = body.get_input_embeddings().weight.device
    if device.type == "meta":  # offloaded: hooks bring inputs where they belong
        device = torch.device("cpu")
    called = base if head else body
    with text_alone(model):
        return called(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False)


@torch.no_grad()
def check_runs(model: nn.Module) -> None:
    """Make sure, on two tokens and before any long work, that the model predicts from text alone.

    Raises:
        CatsError: it does not.
    """
    run_decoder(model, {"input_ids": torch.zeros(1, 2, dtype=torch.int64)}, head=True)


def padding_mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Which tokens of a batch count, bool (B * T,); None if all do."""
    mask = inputs.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.reshape(-1).bool()


class CalibrationText:
    """The calibration text.

    Attributes:
        inputs: of the model, a batch each.
        counted: which tokens of each batch are learned from, bool (B * T,); None for all.
        totals: tokens and sequences over all processes, int64 (2,).
        coverage: while calibrating.
    """

    def __init__(self, batches: Iterable[Inputs], coverage: TokenPolicy) -> None:
        self.coverage = coverage
        self.inputs: list[dict[str, Tensor]] = []
        self.counted: list[Tensor | None] = []
        totals = torch.zeros(2, dtype=torch.int64)
        for inputs in batches:
            mask = padding_mask(inputs)
            if inputs["input_ids"].numel():
                sparse = sparse_tokens(coverage, inputs)
                if isinstance(sparse, Tensor):
                    mask = sparse.reshape(-1) if mask is None else mask & sparse.reshape(-1)
                self.inputs.append(inputs)
                self.counted.append(mask)
                totals += count(inputs, mask)
        sum_over_processes([totals])
        check_totals(totals)
        self.totals = totals


def count(inputs: Inputs, counted: Tensor | None) -> Tensor:
    """How many tokens of a batch count, and how many sequences it has: int64 (2,)."""
    ids = inputs["input_ids"]
    return torch.tensor([ids.numel() if counted is None else int(counted.sum()), len(ids)])


def check_totals(totals: Tensor) -> None:
    """Make sure that there was a token to calibrate on.

    Raises:
        CatsError: there was none.
    """
    if not totals[0]:
        raise CatsError("there was nothing to calibrate on: the data holds no tokens.")


def rows_of(x: Tensor, counted: Tensor | None) -> Tensor:
    """The tokens of x, (B, T, d), that are learned from: (n, d)."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if counted is None else rows[counted.to(rows.device)]
