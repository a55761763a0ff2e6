"""Checkpoint folders as tests handle them: loaded, digested, edited, read by a new process."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from cats_llm import bundled

SUPPORT = Path(__file__).parent


def load(folder, family=None, **kwargs):
    images = family is not None and family.architecture.endswith("ConditionalGeneration")
    return (AutoModelForImageTextToText if images else AutoModelForCausalLM).from_pretrained(folder, **kwargs)


def save_with_tokenizer(model, folder):
    """A model of 4096 tokens with weights that matter, saved beside the bundled model's tokenizer."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.model_path() / name, folder)
    return folder


def digests(folder):
    """What the weight files of a checkpoint hold, to the bit."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in Path(folder).glob("*safetensors*")}


def python(code, *arguments):
    """Run code in a new process."""
    path = os.pathsep.join([str(SUPPORT), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def edit(folder, target, change):
    """A copy of a checkpoint with another quantization_config; weights are linked, not copied."""
    target.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    return target
