"""A model in another form as an ordinary folder: what `cats densify` makes of a GGUF file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cats_llm.checkpoint.folder import read_folder
from cats_llm.checkpoint.write import Written
from cats_llm.gguf_files.model import own_dtype
from cats_llm.gguf_files.parts import read_gguf
from cats_llm.loading import ModelSource, gguf_file, load_model, load_skeleton, load_tokenizer
from cats_llm.outputs import check_output, check_space, temporary_folder, write_folder

_BYTES = {"float32": 4}


@dataclass(frozen=True)
class Folder:
    """A model as an ordinary folder.

    Attributes:
        path: of the folder.
        source: what loads the model from it.
        temporary: it was made for this, and is gone afterwards.
    """

    path: Path
    source: ModelSource
    temporary: bool


def convert_gguf(name: str, out: Path, dtype: str = "auto", force: bool = False) -> Written:
    """Write the model of a GGUF file as an ordinary folder: weights dequantised, config, tokenizer, chat template.

    Args:
        name: the file, or any part of a split one.
        out: the folder to write.
        dtype: of the weights; "auto" is the file's own, bfloat16 if it is quantised.
        force: replace the folder, if it is there.

    Raises:
        CatsError: the file holds no model that can be read, the folder is there, or the disk has no room for it.
    """
    check_output(out, force)
    path = Path(name).expanduser()
    weights = sum(parameter.numel() for parameter in load_skeleton(name).parameters())
    check_space(out, weights * _BYTES.get(own_dtype(read_gguf(path)) if dtype == "auto" else dtype, 2))
    tokenizer = load_tokenizer(name)
    model = load_model(name, dtype, "cpu")
    with write_folder(out, force) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    files = read_folder(out).weights
    return Written({file: (out / file).stat().st_size for file in files}, False, {})


@contextmanager
def as_folder(source: ModelSource, out: Path) -> Iterator[Folder]:
    """The model's folder: its own, or, of a GGUF file, a temporary one beside ``out``, in the source's dtype.

    Raises:
        CatsError: as `convert_gguf`, or from downloading.
    """
    if gguf_file(source.model) is None:
        yield Folder(source.folder(), source, False)
        return
    with temporary_folder(out) as place:
        folder = place / "model"
        convert_gguf(source.model, folder, source.dtype)
        yield Folder(folder, replace(source, model=str(folder)), True)
