"""Load models and tokenizers, with errors for users."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cats_llm.checkpoint.config import QUANT_METHOD
from cats_llm.checkpoint.folder import ADAPTERS as _ADAPTERS
from cats_llm.checkpoint.folder import LEFT_OUT, check_files, read_folder
from cats_llm.checkpoint.tensors import check_keys
from cats_llm.dtypes import DTYPE_NAMES
from cats_llm.errors import CatsError, first_line
from cats_llm.gguf_files.header import is_gguf
from cats_llm.gguf_files.model import load_gguf_model, load_gguf_skeleton, load_gguf_tokenizer
from cats_llm.gguf_files.parts import read_gguf
from cats_llm.model.architecture import build_skeleton, model_class
from cats_llm.model.sparsify import thresholds
from cats_llm.model.structure import quantization_of
from cats_llm.options import Panel, option

logger = logging.getLogger(__name__)

BASE = "base"
"""Where a folder of adapters that `cats finetune` wrote keeps the model that they belong to."""


def parse_device(text: str) -> str:
    """The text itself, if it is a device that is there.

    Raises:
        CatsError: it is none.
    """
    if text == "auto":
        return text
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise CatsError(f"{text!r} is no device; use cpu, cuda, cuda:1 or auto.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CatsError(f"{text!r} was asked for, but PyTorch finds no CUDA GPU here.")
    return text


def parse_dtype(text: str) -> str:
    """The text itself, if it names a dtype of weights, or auto.

    Raises:
        CatsError: it does not.
    """
    if text not in DTYPE_NAMES:
        raise CatsError(f"{text!r} is none of {', '.join(DTYPE_NAMES)}.")
    return text


def device_option() -> Any:
    """The option of where to compute."""
    return option(
        None,
        help="cpu, cuda, cuda:1, or auto to spread over all. Default: the GPU if there is one.",
        parse=parse_device,
        panel=Panel.DATA,
    )


def _dtype_option() -> Any:
    return option(
        "auto",
        help=f"{', '.join(DTYPE_NAMES)}; auto is the checkpoint's own, bfloat16 of quantised GGUF.",
        parse=parse_dtype,
        panel=Panel.DATA,
    )


def revision_option() -> Any:
    """The option of which version of a model on the hub."""
    return option(None, help="Branch, tag or commit of a model on the hub.", panel=Panel.DATA)


def remote_code_option() -> Any:
    """The option to run a checkpoint's own code."""
    return option(False, help="Run model code that comes with the checkpoint.", panel=Panel.DATA)


@dataclass(frozen=True)
class Placement:
    """Where a model is computed, and in what dtype, for commands that know which model."""

    device: str | None = device_option()
    dtype: str = _dtype_option()


@dataclass(frozen=True)
class ModelSource:
    """Which model, and in what form it is loaded."""

    model: str = option(help="A folder, a GGUF file, or a name on the hub.", positional=True, metavar="MODEL")
    revision: str | None = revision_option()
    trust_remote_code: bool = remote_code_option()
    device: str | None = device_option()
    dtype: str = _dtype_option()

    def load(self) -> Any:
        """The model with its weights, see `load_model`."""
        return load_model(self.model, self.dtype, self.device, self.revision, self.trust_remote_code)

    def skeleton(self) -> Any:
        """Its structure without weights, see `load_skeleton`."""
        return load_skeleton(self.model, self.revision, self.trust_remote_code)

    def tokenizer(self) -> Any:
        """What turns text into its tokens, see `load_tokenizer`."""
        return load_tokenizer(self.model, self.revision, self.trust_remote_code)

    def folder(self) -> Path:
        """Its files, downloaded if need be, see `checkpoint_folder`."""
        return checkpoint_folder(self.model, self.revision)


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
    """A model from the hub, a folder or a GGUF file, dense or CATS, of the class that it was saved as, in eval mode.

    A folder of PEFT adapters gives the model that they belong to with the adapters in it. The weights of a GGUF file
    are dequantised: it gives an ordinary dense model.

    Args:
        name: of the hub, a folder, or a GGUF file or any part of a split one.
        dtype: one of `dtypes.DTYPE_NAMES`; "auto" is the checkpoint's own, bfloat16 of a quantised GGUF file.
        device: "cpu", "cuda", "cuda:1" ..., or "auto" to spread the model over all there are. Default: the GPU if
            there is one.
        revision: branch, tag or commit of a model on the hub; nothing to a model that is here.
        trust_remote_code: run code that comes with the checkpoint; a GGUF file has none.

    Raises:
        CatsError: it does not exist, is damaged, lacks weights, or is of no class that transformers has.
    """
    if (file := gguf_file(name)) is not None:
        with _loading_errors(name):
            return load_gguf_model(read_gguf(file), name, dtype, device or default_device()).eval()
    if (Path(name).expanduser() / _ADAPTERS).is_file():
        folder = Path(name).expanduser()
        base = load_model(_base_of(folder), dtype, device, None, trust_remote_code)
        return attach_adapters(base, folder).eval()
    check_name(name)
    device = device or default_device()
    with _loading_errors(name):
        config = _load_config(name, revision, trust_remote_code)
        model, info = model_class(config, trust_remote_code).from_pretrained(
            name,
            config=config,
            dtype=dtype,
            device_map=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **_valid_generation(name, revision),
        )
    check_keys(info, name)
    check_sparse(model, name)
    return model.eval()


def gguf_file(name: str) -> Path | None:
    """The path of a model in GGUF; None if the name is of one in another form.

    Raises:
        CatsError: it is the name of one on the hub.
    """
    path = Path(name).expanduser()
    if not is_gguf(path):
        return None
    if not path.exists() and name.count("/") > 1 and not name.startswith((".", "/", "~")):
        raise CatsError(f"there is no file {name}; one on the hub is downloaded first: hf download OWNER/NAME FILE.")
    return path


def _base_of(folder: Path) -> str:
    """The model that the adapters in a folder belong to: the one inside the folder, or the one that they name."""
    if (folder / BASE / "config.json").is_file():
        return str(folder / BASE)
    try:
        name = json.loads((folder / _ADAPTERS).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        name = None
    if not isinstance(name, str):
        raise CatsError(f"{folder / _ADAPTERS} does not say which model the adapters belong to; merge them first.")
    return name


def attach_adapters(model: Any, folder: Path) -> Any:
    """The model in a PEFT wrapper with the adapters of a folder.

    Raises:
        CatsError: peft is not installed, or the adapters are damaged or for another model.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise CatsError(f"{folder} holds adapters, which need peft: pip install 'cats-llm[train]'.") from error
    other = f"the adapters in {folder} do not fit the model"
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            stored = set(file.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is checked below
            adapted = PeftModel.from_pretrained(model, str(folder))
    except (SafetensorError, OSError) as error:
        raise CatsError(f"{folder / 'adapter_model.safetensors'} is missing or damaged; train again.") from error
    except (RuntimeError, ValueError) as error:
        # the first line of a mismatch only says that there are some
        lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
        raise CatsError(f"{other}: {lines[min(1, len(lines) - 1)]}.") from error
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if stored != wanted:
        odd = sorted(stored ^ wanted)
        raise CatsError(f"{other}: {len(odd)} tensors are in one and not in the other ({odd[0]}, ...).")
    return adapted


def load_skeleton(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The dense model's structure on the meta device: shapes and names without weights."""
    if (file := gguf_file(name)) is not None:
        with _loading_errors(name):
            return load_gguf_skeleton(read_gguf(file), name)
    check_name(name)
    with _loading_errors(name), torch.device("meta"):
        return build_skeleton(_load_config(name, revision, trust_remote_code), trust_remote_code)


def _valid_generation(name: str, revision: str | None) -> dict[str, Any]:
    """What to pass to ``from_pretrained`` so that a generation_config.json of invalid values does not stop it."""
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:
        return {}  # there is none, and transformers knows what to do
    except Exception as error:  # of a file that may hold anything
        logger.warning("generation_config.json of %s is left out: %s", name, _reason(error))
        return {"generation_config": GenerationConfig()}
    return {}


def _load_config(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model from the hub, a folder or a GGUF file, with its chat template.

    Raises:
        CatsError: there is none.
    """
    from transformers import AutoTokenizer

    if (Path(name).expanduser() / _ADAPTERS).is_file():
        name = _base_of(Path(name).expanduser())
    if (file := gguf_file(name)) is not None:
        with _loading_errors(f"the tokenizer of {name}"):
            return load_gguf_tokenizer(read_gguf(file), name)
    check_name(name)
    with _loading_errors(f"the tokenizer of {name}"):
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def checkpoint_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a model's files, downloaded from the hub if need be.

    Raises:
        CatsError: there is none, or it is damaged, or the model is a GGUF file, which `conversion` makes a folder of.
    """
    check_name(name)
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download

    # at any depth, and all that is in a folder of such a name
    unwanted = [f"{start}{pattern}{end}" for pattern in LEFT_OUT for start in ("", "*/") for end in ("", "/*")]
    with _loading_errors(name):
        folder = Path(snapshot_download(name, revision=revision, ignore_patterns=[*unwanted, "pytorch_model*.bin*"]))
        if not list(folder.glob("model.safetensors*")):  # then there is only the older format
            folder = Path(snapshot_download(name, revision=revision, ignore_patterns=unwanted))
    check_name(str(folder))
    return folder


def check_name(name: str) -> None:
    """Tell a missing or damaged folder from the name of a model on the hub.

    Raises:
        CatsError: it is a path to nothing, to a file, or to a folder that holds no model or a damaged one, or that a
            weights' index leads out of.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise CatsError(
            f"{name} is a file, but not in GGUF; a model is a folder with config.json and weights, a GGUF file, or a "
            "name on the hub."
        )
    if folder.is_dir():
        check_files(read_folder(folder, links_may_leave=True))
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CatsError(f"there is no folder {name}.")


def check_sparse(model: Any, name: str) -> None:
    """Make sure that a CATS checkpoint became a sparse model with its thresholds.

    Raises:
        CatsError: it did not.
    """
    config, method = quantization_of(model)
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
        raise CatsError(f"could not load {name}: {_reason(error)}.") from error


# what transformers says, and what a user of the command line should do
_ADVICE = (
    ("trust_remote_code", "its code comes with the checkpoint; pass --trust-remote-code to run it"),
    (
        "does not recognize this arch",
        "this transformers does not know its model_type; pip install --upgrade transformers",
    ),
    (
        "backend tokenizer from one of",
        "there are no tokenizer files that can be read; put those of its model there, or "
        "pip install sentencepiece tiktoken protobuf if they are tokenizer.model or of tiktoken",
    ),
    ("gated repo", "it is gated; accept its terms on the hub and log in with hf auth login"),
    (
        "couldn't connect to",
        "the hub cannot be reached and it was not downloaded before; check the name, or give a folder",
    ),
)


def _reason(error: Exception) -> str:
    """An error of loading in one line, without a full stop."""
    for part, advice in _ADVICE:
        if part in str(error):
            return advice
    line = first_line(error)
    # what these say means little alone
    return f"{type(error).__name__} {line}" if isinstance(error, (LookupError, AttributeError, TypeError)) else line
