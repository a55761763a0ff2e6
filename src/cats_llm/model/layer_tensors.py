"""Threshold and compensation as tensors of a module: exact in float32, whatever dtype the model is cast to."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from cats_llm.kernels.backends import backend_of

Self = TypeVar("Self", bound="Float32Buffers")


class Float32Buffers(nn.Module):
    """The part of `SparseMLP` that holds its own tensors. They follow the model to its device, but never to its dtype.

    Attributes:
        threshold: float32, () or (f,); not part of the state dict.
        score: where the threshold is (f,): the one number, of the criterion's score, that it was made from.
    """

    threshold: Tensor
    score: float | None
    # the compensation in the weights' dtype, made once, so that a decode step need not make it
    _cast: Tensor

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold.to(torch.float32), persistent=False)
        self.score = None

    @property
    def down_linear(self) -> nn.Linear:
        """The projection whose output the compensation is added to."""
        raise NotImplementedError

    @property
    def compensation(self) -> Tensor | None:
        """Float32 (d,), added to the output of sparse tokens. Assign another one; do not change it in place."""
        return getattr(self, "_compensation", None)

    @compensation.setter
    def compensation(self, value: Tensor | None) -> None:
        self._set_buffer("_compensation", value)
        self._set_buffer("_cast", None)

    @torch.no_grad()
    def set_tensors(self, threshold: Tensor, compensation: Tensor | None = None, score: float | None = None) -> None:
        """Take other thresholds and another compensation; in place where shapes stay, so that captured graphs see it.

        Args:
            threshold: float32, () or (f,).
            compensation: float32 (d,).
            score: of thresholds (f,), the one number that they were made from.
        """
        device = torch.device("cpu") if self.threshold.is_meta else self.threshold.device
        self.threshold = _in_place(self.threshold, threshold, device)
        self.score = score
        if compensation is None:
            self.compensation = None
            return
        old, cast = self.compensation, getattr(self, "_cast", None)
        self.compensation = _in_place(old, compensation, device)
        if self.compensation is old and cast is not None:
            self._set_buffer("_cast", cast.copy_(compensation))
        self._keep_cast()

    def _compensation_like(self, y: Tensor) -> Tensor | None:
        """The compensation in the dtype and on the device of y."""
        if self.compensation is None:
            return None
        cast = getattr(self, "_cast", None)
        if cast is None or not _fits(cast, y):
            cast = self.compensation.to(y.device, y.dtype)
            if not backend_of(y.device).in_graph() and _fits(cast, self.down_linear.weight):
                self._keep_cast()
        return cast

    @torch.inference_mode(False)
    def _keep_cast(self) -> None:
        weight = self.down_linear.weight
        known = hasattr(self, "_cast") and _fits(self._cast, weight)
        if self.compensation is not None and not weight.is_meta and not known:
            self._set_buffer("_cast", self.compensation.to(weight.device, weight.dtype))

    def _set_buffer(self, name: str, value: Tensor | None) -> None:
        if hasattr(self, name):
            delattr(self, name)
        if value is not None:  # a buffer that is None would trip up accelerate
            self.register_buffer(name, value, persistent=False)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact, cast = (self.threshold, self.compensation), getattr(self, "_cast", None)
        super()._apply(fn, recurse)
        self.threshold = _moved(exact[0], self.threshold)
        if exact[1] is not None and self.compensation is not None:
            self.compensation = _moved(exact[1], self.compensation)
            # what a captured graph reads stays where it is as long as the weights do
            self._set_buffer("_cast", cast if self.compensation is exact[1] else None)
            self._keep_cast()
        return self


def _in_place(old: Tensor | None, new: Tensor, device: torch.device) -> Tensor:
    """``new`` in the memory of ``old`` if it fits there, else a copy of it on the device."""
    if old is not None and old.shape == new.shape and not old.is_meta:
        return old.copy_(new)
    return new.to(device, torch.float32, copy=True)


def _moved(exact: Tensor, like: Tensor) -> Tensor:
    if exact.is_meta or like.is_meta:
        return torch.empty_like(exact, device=like.device)
    return exact.to(like.device)


def _fits(tensor: Tensor, like: Tensor) -> bool:
    return tensor.dtype == like.dtype and tensor.device == like.device
