"""Several processes that share the work, as `accelerate launch` or `torchrun` start them."""

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cats_llm.errors import CatsError

Key = TypeVar("Key")
Item = TypeVar("Item")


def join(device: str | None) -> str | None:
    """Join the processes of `accelerate launch` or `torchrun`, if there are several.

    Args:
        device: that the user asked for.

    Returns:
        The device of this process; as given where it is alone.

    Raises:
        CatsError: one model was to be spread over all GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device == "auto":
        raise CatsError("--device auto spreads one model over all GPUs; it cannot be used with several processes.")
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    return device or str(state.device)


def share(items: Iterable[Item]) -> Iterator[Item]:
    """Of what all of n processes have, what this one works on: every n-th."""
    return islice(items, rank(), None, world_size())


def rank() -> int:
    """Number of the process, 0 without torch.distributed."""
    return dist.get_rank() if _running() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _running() else 1


def gather(value: Any) -> list[Any]:
    """The value of every process, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's value, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_over_processes(tensors: Iterable[torch.Tensor]) -> None:
    """Sum each tensor, in place, over the processes, if there are several."""
    if world_size() == 1:
        return
    # NCCL moves only what is on a GPU
    transport = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    for tensor in tensors:
        moved = tensor.to(transport)
        dist.all_reduce(moved)
        tensor.copy_(moved)


def leave() -> None:
    """Leave the other processes at the end of a program, if there are any."""
    if _running():
        dist.destroy_process_group()


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def add_counts(parts: Iterable[Mapping[Key, tuple[int, int]]]) -> dict[Key, tuple[int, int]]:
    """The sum of several counts of what was skipped and seen."""
    total: dict[Key, tuple[int, int]] = {}
    for part in parts:
        for key, (skipped, seen) in part.items():
            before = total.get(key, (0, 0))
            total[key] = (before[0] + skipped, before[1] + seen)
    return total


def all_gather_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of all processes, joined along the first axis."""
    parts = gather(tensor.cpu())
    return torch.cat([part.reshape(-1) if part.dim() == 0 else part for part in parts]).to(tensor.device)
