"""Batch sizes that shrink when memory runs out."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from cats_llm.errors import CatsError

Result = TypeVar("Result")


class BatchSize:
    """How many sequences are computed at a time; halved, once and for the rest of the run, when memory runs out."""

    def __init__(self, value: int, notify: Callable[[str], None] | None = None) -> None:
        self.value = value
        self.notify = notify

    def run(self, function: Callable[[int], Result]) -> Result:
        """Call the function with the batch size, again with half of it when memory runs out.

        Raises:
            CatsError: memory runs out with one sequence at a time.
        """
        while True:
            try:
                return function(self.value)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if self.value == 1:
                    raise CatsError(
                        "out of memory with one sequence at a time; use a smaller --dtype or --seq-length, or spread "
                        "the model with --device auto."
                    ) from error
            # outside the handler, which keeps the failed call's tensors alive
            self.value //= 2
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.notify is not None:
                self.notify(f"out of memory: going on with batches of {self.value}")


def out_of_memory(error: Exception) -> bool:
    """Whether an exception says that the memory of the GPU or of the machine is full."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # on a CPU, and where CUDA itself fails, it is a plain RuntimeError
    signs = ("not enough memory", "can't allocate memory", "out of memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
