"""The dtypes of weights that the package computes with, and what options and files call them."""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""By name."""

DTYPE_NAMES = ("auto", *DTYPES)
"""What options take; "auto" is the checkpoint's own."""


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
