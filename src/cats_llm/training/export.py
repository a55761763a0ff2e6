"""From trained adapters to a model that is used: merged into its weights, or kept beside a base that needs them."""

from pathlib import Path
from typing import Any

from cats_llm.loading import BASE, attach_adapters
from cats_llm.outputs import write_folder, write_json

LOG = "finetune.json"
"""The log, in the folder of the result."""


def export(
    base: Any, adapters: Path, tokenizer: Any, out: Path, log: dict[str, Any], merge: bool, force: bool = False
) -> None:
    """Write a fine-tuned model as a folder, with the log of its training.

    Merged, it is an ordinary checkpoint, CATS unless the method is dense. Otherwise the folder holds the adapters, and
    the model that they were trained on in the folder ``base`` inside it, so that a program that knows nothing of
    adapters finds no model rather than half of one.

    Args:
        base: the model as it was before training, on the CPU, brought into the form of the method.
        adapters: a PEFT folder.

    Raises:
        CatsError: the adapters are not for this model, or ``out`` cannot be written.
    """
    model = attach_adapters(base, adapters)
    with write_folder(out, force) as folder:
        if merge:
            model = model.merge_and_unload()
            model.save_pretrained(folder)
        else:
            model.peft_config["default"].base_model_name_or_path = str(out.resolve() / BASE)
            model.save_pretrained(folder, save_embedding_layers=False)
            model.unload().save_pretrained(folder / BASE)
            tokenizer.save_pretrained(folder / BASE)
        tokenizer.save_pretrained(folder)
        write_json(folder / LOG, log)
