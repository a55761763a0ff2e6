"""Write a CATS checkpoint from a dense one: the same files to the byte, thresholds in config.json, maybe vectors."""

import json
import shutil
from pathlib import Path

from cats_llm.checkpoint.config import QUANT_METHOD, CatsConfig
from cats_llm.checkpoint.files import write_folder
from cats_llm.checkpoint.vectors import write_vectors
from cats_llm.errors import CatsError

# what a checkpoint folder may hold beside weights, and in how large a file
_NO_WEIGHTS = (".json", ".txt", ".model", ".md", ".py", ".jinja", ".tiktoken")
_NAMES = ("LICENSE", "LICENCE", "NOTICE")


def write_checkpoint(source: Path, out: Path, config: CatsConfig, force: bool = False) -> None:
    """Copy the checkpoint folder ``source`` to ``out``, put ``config`` into its config.json and its vectors beside it.

    Weights are copied as they are, whatever their sharding; optimizer states and other formats are left out.

    Raises:
        CatsError: ``source`` is quantised by another method or holds no weights, the config's vectors are not read
            yet, or ``out`` cannot be written. ``out`` is then as it was.
    """
    if out.exists() and out.resolve() == source.resolve():
        raise CatsError(f"{out} is the model itself; write the CATS checkpoint to another folder.")
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    method = (values.get("quantization_config") or {}).get("quant_method", QUANT_METHOD)
    if method != QUANT_METHOD:
        raise CatsError(f"{source} is already quantised with {method}; start from the unquantised model.")
    values["quantization_config"], vectors = config.to_dict(), config.vectors
    with write_folder(out, force) as folder:
        for file in [*_weights(source), *_others(source)]:
            shutil.copyfile(file, folder / file.name)
        if (source / "additional_chat_templates").is_dir():
            shutil.copytree(source / "additional_chat_templates", folder / "additional_chat_templates")
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        if vectors is not None:
            write_vectors(folder, vectors)


def _weights(source: Path) -> list[Path]:
    """The files that transformers would load, and their index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = source / f"{name}.index.json"
        if (source / name).is_file():
            return [source / name]
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [shard for shard in shards if not (source / shard).is_file()]
            if missing:
                raise CatsError(f"{source} lacks {missing[0]}, which its index names; download the model again.")
            return [index, *(source / shard for shard in shards)]
    raise CatsError(f"{source} holds no weights (model.safetensors or pytorch_model.bin).")


def _others(source: Path) -> list[Path]:
    return sorted(
        file
        for file in source.iterdir()
        if file.is_file()
        and (file.suffix in _NO_WEIGHTS or file.name in _NAMES)
        and not file.name.endswith(".index.json")
        and not file.name.startswith(("trainer_state", "."))
    )
