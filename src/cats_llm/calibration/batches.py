"""What calibration runs on: batches of tokens, and the pass of one through the decoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cats_llm.checkpoint.coverage import Coverage
from cats_llm.errors import CatsError
from cats_llm.model.coverage import sparse_tokens
from cats_llm.model.structure import unwrap

Batch = Tensor | Mapping[str, Tensor]
"""input_ids (B, T), or a dict of input_ids and, for padded sequences, attention_mask (B, T)."""


def check_batch(batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
    """The batch as inputs of a model, and which of its tokens count: bool (B * T,), or None if all do.

    Raises:
        CatsError: it has no input_ids, or they are not (sequences, tokens), or the mask has another shape.
    """
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    ids = inputs.get("input_ids")
    if ids is None:
        raise CatsError(f"a calibration batch has no input_ids, only {', '.join(map(str, inputs)) or 'nothing'}.")
    if ids.dim() != 2:
        raise CatsError(f"a calibration batch has the shape {tuple(ids.shape)}; it must be (sequences, tokens).")
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise CatsError(
            f"a calibration batch has input_ids of shape {tuple(ids.shape)} but an attention_mask of shape "
            f"{tuple(mask.shape)}; they must be equal."
        )
    known = {name: inputs[name] for name in ("input_ids", "attention_mask") if inputs.get(name) is not None}
    return known, None if mask is None or bool(mask.all()) else mask.reshape(-1).bool()


def run_decoder(model: nn.Module, inputs: Mapping[str, Tensor], head: bool = False) -> Any:
    """Call the language model, without its head unless the logits are needed."""
    base: Any = unwrap(model)
    body = base.base_model if hasattr(base, "base_model") else base
    device = body.get_input_embeddings().weight.device
    if device.type == "meta":  # offloaded: hooks bring inputs where they belong
        device = torch.device("cpu")
    called = base if head else body
    return called(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False)


def sum_over_processes(tensors: list[Tensor]) -> None:
    """Sum each tensor, in place, over the processes of torch.distributed, if it runs."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    # NCCL moves only what is on a GPU
    transport = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    for tensor in tensors:
        moved = tensor.to(transport)
        dist.all_reduce(moved)
        tensor.copy_(moved)


class CalibrationText:
    """The calibration text.

    Attributes:
        inputs: of the model, a batch each.
        counted: which tokens of each batch are learned from, bool (B * T,); None for all.
        totals: tokens and sequences, over all processes.
        coverage: while calibrating.
    """

    def __init__(self, batches: Sequence[Batch], coverage: Coverage) -> None:
        self.coverage = coverage
        self.inputs: list[dict[str, Tensor]] = []
        self.counted: list[Tensor | None] = []
        totals = torch.zeros(2, dtype=torch.int64)
        for inputs, mask in map(check_batch, batches):
            if inputs["input_ids"].numel():
                sparse = sparse_tokens(coverage, inputs)
                if isinstance(sparse, Tensor):
                    mask = sparse.reshape(-1) if mask is None else mask & sparse.reshape(-1)
                self.inputs.append(inputs)
                self.counted.append(mask)
                number = inputs["input_ids"].numel() if mask is None else int(mask.sum())
                totals += torch.tensor([number, len(inputs["input_ids"])])
        sum_over_processes([totals])
        self.totals: tuple[int, int] = (int(totals[0]), int(totals[1]))
        if not self.totals[0]:
            raise CatsError("there was nothing to calibrate on: the data holds no tokens.")


def rows_of(x: Tensor, counted: Tensor | None) -> Tensor:
    """The tokens of x, (B, T, d), that are learned from: (n, d)."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if counted is None else rows[counted.to(rows.device)]
