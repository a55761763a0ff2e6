"""A small real model and two public-domain texts, so that the demo and the tests need no network.

`model/README.md` and `text/README.md` say where they come from and under which licence they stand.
"""

from pathlib import Path

__all__ = ["calibration_text", "heldout_text", "model_path"]

_HERE = Path(__file__).resolve().parent


def model_path() -> Path:
    """Folder of the bundled model, for `from_pretrained`: Mistral architecture, 8.1 M parameters, bfloat16."""
    return _HERE / "model"


def calibration_text() -> Path:
    """Text to calibrate on: nine whole books that the bundled model was trained on."""
    return _HERE / "text" / "calibration.txt"


def heldout_text() -> Path:
    """Text to evaluate on: three whole books that the bundled model never saw."""
    return _HERE / "text" / "heldout.txt"
