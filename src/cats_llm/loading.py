"""Load models and tokenizers for the command line, with errors for users."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cats_llm.checkpoint.config import QUANT_METHOD
from cats_llm.errors import CatsError
from cats_llm.model.surgery import thresholds

DTYPES = ("auto", "float32", "bfloat16", "float16")


def default_device() -> str:
    """The GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(
    name: str,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model from the hub or a folder, dense or CATS, in eval mode.

    Args:
        name: of the hub, or a folder.
        dtype: one of `DTYPES`; "auto" is the checkpoint's own.
        device: "cpu", "cuda", "cuda:1" ..., or "auto" to spread the model over all there are.

    Raises:
        CatsError: it does not exist, is damaged, lacks weights, or is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    check_name(name)
    device = device or default_device()
    with _loading_errors(name):
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            device_map=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CatsError(f"{name} lacks {len(missing)} weights of the model ({missing[0]}, ...); download it again.")
    check_sparse(model, name)
    return model.eval()


def load_skeleton(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The dense model's structure on the meta device: shapes and names without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    check_name(name)
    with _loading_errors(name), torch.device("meta"):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer.

    Raises:
        CatsError: there is none.
    """
    from transformers import AutoTokenizer

    check_name(name)
    with _loading_errors(f"the tokenizer of {name}"):
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def checkpoint_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a model's files, downloaded from the hub if need be.

    Raises:
        CatsError: there is none.
    """
    check_name(name)
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download

    with _loading_errors(name):
        return Path(snapshot_download(name, revision=revision, ignore_patterns=["*.gguf", "*.onnx", "original/*"]))


def check_name(name: str) -> None:
    """Tell a missing or damaged folder from the name of a model on the hub.

    Raises:
        CatsError: it is a path to nothing, to a file, or to a folder that holds no model or a damaged one.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise CatsError(f"{name} is a file; a model is a folder with config.json and weights, or a name on the hub.")
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise CatsError(f"there is no folder {name}.")
        return
    if not (folder / "config.json").is_file():
        raise CatsError(f"the folder {name} has no config.json, so it holds no model.")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CatsError(f"{folder / 'config.json'} is not JSON; the model is damaged.") from error
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CatsError(f"{file} is truncated or damaged ({error}); download or write it again.") from error


def check_sparse(model: Any, name: str) -> None:
    """Make sure that a CATS checkpoint became a sparse model with its thresholds.

    Raises:
        CatsError: it did not.
    """
    config: Any = getattr(model.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    if method == QUANT_METHOD and (isinstance(config, dict) or thresholds(model) != config.thresholds):
        raise CatsError(f"{name} is a CATS checkpoint, but it was loaded without its thresholds; please report this.")


@contextmanager
def _loading_errors(name: str) -> Iterator[None]:
    """Turn the many exceptions of loading into one sentence."""
    try:
        yield
    except CatsError:
        raise
    except torch.OutOfMemoryError as error:
        raise CatsError(f"{name} does not fit on the device; try --device auto or --dtype bfloat16.") from error
    except Exception as error:  # transformers raises whatever its parts raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CatsError(f"could not load {name}: {lines[0].strip().rstrip('.:')}.") from error
