"""A GGUF model through transformers' own loading, made a plain one: dense weights, and no trace of the format."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cats_llm.checkpoint.tensors import check_keys
from cats_llm.errors import CatsError
from cats_llm.gguf_files.parts import GgufModel
from cats_llm.gguf_files.rope import FREQUENCIES, set_rope
from cats_llm.model.architecture import build_skeleton, model_class

_DTYPES = {0: "float32", 1: "float16", 30: "bfloat16"}  # the GGML types of plain numbers
_QUANTISED = "bfloat16"
_CONFIGS: dict[tuple[Any, ...], Any] = {}
_TOKENIZER = "tokenizer.ggml."
_TOKENS = f"{_TOKENIZER}tokens"
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_LAYER = re.compile(r"blk\.(\d+)\.")


def own_dtype(gguf: GgufModel) -> str:
    """The dtype of most weights in the file's matrices; bfloat16 if any matrix is quantised."""
    sizes: Counter[str] = Counter()
    for tensor in gguf.tensors:
        if len(tensor.shape) > 1:
            if tensor.type not in _DTYPES:
                return _QUANTISED
            sizes[_DTYPES[tensor.type]] += tensor.numel
    return sizes.most_common(1)[0][0] if sizes else "float32"


def load_gguf_skeleton(gguf: GgufModel, name: str) -> Any:
    """The model's structure on the meta device, from the file's metadata; no weight is read.

    Args:
        gguf: the checked file.
        name: what the user calls it.

    Raises:
        CatsError: transformers has no such architecture, or would compute something else than the file says.
    """
    with gguf.one_file(with_data=False) as file:
        return _skeleton(gguf, name, file)


def load_gguf_model(gguf: GgufModel, name: str, dtype: str, device: str) -> Any:
    """The model with its weights, dequantised, as if it had been loaded from an ordinary folder.

    Args:
        gguf: the checked file.
        name: what the user calls it, for records.
        dtype: of the weights; "auto" is `own_dtype`.
        device: as ``device_map`` of `from_pretrained`.

    Raises:
        CatsError: as `load_gguf_skeleton`, or the file lacks weights.
    """
    chosen = getattr(torch, own_dtype(gguf) if dtype == "auto" else dtype)
    with gguf.one_file() as file, _sentences(gguf, name), _bars_as_elsewhere():
        config = _skeleton(gguf, name, file).config
        loaded, info = model_class(config).from_pretrained(
            str(file.parent), gguf_file=str(file), config=config, dtype=chosen, output_loading_info=True, **_dense()
        )
    check_keys(info, name)
    # some versions of transformers mark it, in several places, as quantised; one from the state dict never was
    clean = type(loaded.config).from_dict(_without_format(loaded.config.to_dict()))
    with _sentences(gguf, name):
        plain = type(loaded).from_pretrained(
            None, config=clean, state_dict=loaded.state_dict(), dtype=chosen, device_map=device
        )
    plain.name_or_path = plain.config.name_or_path = name
    return plain


def load_gguf_tokenizer(gguf: GgufModel, name: str) -> Any:
    """The tokenizer that the file describes, with its chat template.

    Raises:
        CatsError: it describes none that transformers knows.
    """
    from transformers import AutoTokenizer

    if not gguf.metadata.get(_TOKENS):
        raise CatsError(f"{name} holds no tokenizer ({_TOKENS}); take a file that has one.")
    # older versions of transformers pass over these, and take other special tokens
    added = {f"add_{end}_token": True for end in ("bos", "eos") if gguf.metadata.get(f"{_TOKENIZER}add_{end}_token")}
    with gguf.one_file(with_data=False) as file, _sentences(gguf, name):
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=str(file), **added)
    for special, token in _special_tokens(gguf).items():
        if getattr(tokenizer, special) != token:
            setattr(tokenizer, special, token)
    tokenizer.name_or_path = name
    return tokenizer


def _special_tokens(gguf: GgufModel) -> dict[str, str]:
    ids = {ours: gguf.metadata.get(f"{_TOKENIZER}{theirs}_token_id") for ours, theirs in _SPECIAL.items()}
    named = {name: number for name, number in ids.items() if isinstance(number, int)}
    tokens = gguf.parts[0].strings(_TOKENS, named.values())
    return {name: tokens[number] for name, number in named.items() if number in tokens}


def _dense() -> dict[str, Any]:
    """What keeps transformers from leaving the weights of some architectures in their blocks."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)  # older versions always dequantise
    return {"quantization_config": config(dequantize=True)} if config is not None else {}


def _skeleton(gguf: GgufModel, name: str, file: Path) -> Any:
    from transformers import AutoConfig

    # reading a vocabulary takes seconds, and one command asks several times
    state = [(part.path.resolve(), part.path.stat()) for part in gguf.parts]
    key = tuple((path, facts.st_mtime_ns, facts.st_size) for path, facts in state)
    if key not in _CONFIGS:
        with _sentences(gguf, name):
            _CONFIGS[key] = AutoConfig.from_pretrained(str(file.parent), gguf_file=str(file))
    read = _CONFIGS[key]
    config = type(read).from_dict(_without_format(read.to_dict()))
    config.name_or_path = name
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if layers > len(gguf.tensors):  # millions of them would take hours to build
        raise CatsError(
            f"{name} says that it has {layers} layers, but holds {len(gguf.tensors)} tensors; it is damaged."
        )
    set_rope(config, gguf, name)
    with torch.device("meta"):
        skeleton = build_skeleton(config)
    _check_nothing_is_left(gguf, skeleton, name)
    return skeleton


def _without_format(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what only a file of llama.cpp brings into it."""
    return {key: value for key, value in config.items() if key not in ("quantization_config", "_model_name_or_path")}


def _check_nothing_is_left(gguf: GgufModel, skeleton: Any, name: str) -> None:
    """Make sure that the model has a place for every weight of the file: transformers drops others silently.

    Raises:
        CatsError: it has not.
    """
    # layers after the last, which predict several tokens at once; a plain model does without
    more = gguf.metadata.get(f"{gguf.architecture}.nextn_predict_layers", 0)
    last = getattr(skeleton.config.get_text_config(), "num_hidden_layers", 0) if more else math.inf
    layer_of = {tensor.name: int(match[1]) for tensor in gguf.tensors if (match := _LAYER.match(tensor.name))}
    held = [t for t in gguf.tensors if t.name not in FREQUENCIES and layer_of.get(t.name, -1) < last]
    buffers = {key: value for key, value in skeleton.named_buffers() if key in skeleton.state_dict()}
    taken = [*skeleton.parameters(), *buffers.values()]
    if sum(tensor.numel for tensor in held) <= sum(tensor.numel() for tensor in taken):
        return
    free = Counter(tensor.numel() for tensor in taken)
    left = []
    for tensor in held:
        free[tensor.numel] -= 1
        if free[tensor.numel] < 0:
            left.append(tensor.name)
    example = f" ({left[-1]}{', ...' * (len(left) > 1)})" if left else ""
    raise CatsError(
        f"{name} holds weights that transformers' {type(skeleton).__name__} has no place for{example}, so it would "
        "compute something else; take the model that the file was made from."
    )


@contextmanager
def _bars_as_elsewhere() -> Iterator[None]:
    """Let the bar of dequantising obey the switch that all other bars of transformers obey."""
    from transformers import modeling_gguf_pytorch_utils as module
    from transformers.utils import logging

    own = module.tqdm
    module.tqdm = logging.tqdm
    try:
        yield
    finally:
        module.tqdm = own


@contextmanager
def _sentences(gguf: GgufModel, name: str) -> Iterator[None]:
    """Say which architecture it is that transformers does not read, and what it means that shapes differ."""
    try:
        yield
    except CatsError:
        raise
    except Exception as error:  # of other classes in other versions
        if re.search("not supported yet|Unknown gguf model_type", str(error)):
            raise CatsError(
                f"{name} is of the architecture {gguf.architecture!r}, which this transformers does not read from "
                "GGUF; take the model that the file was made from, or pip install --upgrade transformers."
            ) from error
        if "ignore_mismatched_sizes" in str(error):
            raise CatsError(f"{name} holds weights of other shapes than its metadata say; it is damaged.") from error
        raise
