"""Versions of the package and of what its results depend on. Works from a source tree that is not installed."""

import torch
import transformers

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """For the record beside every result."""
    return {"cats-llm": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}
