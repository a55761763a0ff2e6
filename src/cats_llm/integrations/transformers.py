"""Registers the checkpoint format with transformers, so that `from_pretrained` builds a CATS model by itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.hub import cached_file

from cats_llm.checkpoint.config import QUANT_METHOD, CatsConfig
from cats_llm.checkpoint.layer_tensors import FILE
from cats_llm.errors import CatsError
from cats_llm.model.sparsify import check_layers, densify, lay_out_for_decode, set_config, swap_mlps
from cats_llm.model.structure import check_function, find_gated_mlps


class CatsQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is not typed
    """Makes a model sparse while transformers loads it. It quantises nothing: weights stay as they are."""

    requires_calibration = False
    is_trainable = True  # gradients flow through the thresholded activation
    is_compileable = True
    quantization_config: CatsConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        load_vectors(self.quantization_config, model.config.name_or_path, folder)
        mlps = find_gated_mlps(model)
        check_layers(mlps, self.quantization_config)
        if not self.pre_quantized:
            self._mlps = mlps
        swap_mlps(mlps)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # non-persistent buffers come out of loading uninitialised
        set_config(model, self.quantization_config)
        _unmark_quantized(model)
        if not self.pre_quantized:
            # a dense checkpoint with a config given by hand: nobody has compared the functions yet
            for mlp in self.__dict__.pop("_mlps"):
                check_function(mlp)
        lay_out_for_decode(model, self.quantization_config)
        return model

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        return densify(model)

    def is_serializable(self) -> bool:
        """A CATS model can be saved."""
        return True


def load_vectors(config: CatsConfig, name: str, folder: Path | None = None, revision: str | None = None) -> None:
    """Read the vectors that a config from JSON names, from the model's folder or the hub; else there is nothing to do.

    Args:
        config: of the model.
        name: the model's folder or name on the hub.
        folder: where its weights lie, if they are there already; of the hub, a folder of its cache.
        revision: of the hub, where the folder does not say it.

    Raises:
        CatsError: the file is missing, damaged, or of another model.
    """
    if config.vectors_are_loaded:
        return
    path = (folder or Path(name)) / FILE
    if not path.is_file() and not Path(name).is_dir():
        place: dict[str, Any] = {"revision": revision}
        if folder is not None and "snapshots" in folder.parts:  # <cache>/models--<name>/snapshots/<commit>/<subfolder>
            snapshots = len(folder.parts) - folder.parts[::-1].index("snapshots") - 1
            place = {
                "cache_dir": str(Path(*folder.parts[: snapshots - 1])),
                "revision": folder.parts[snapshots + 1],
                "subfolder": str(Path(*folder.parts[snapshots + 2 :])) if folder.parts[snapshots + 2 :] else "",
            }
        try:
            path = Path(str(cached_file(name, FILE, **place)))
        except OSError as error:
            raise CatsError(
                f"{name} lacks {FILE}, which its config names, or it cannot be downloaded; it belongs to the "
                "checkpoint, so put it beside the weights."
            ) from error
    config.load_vectors(path)


def _unmark_quantized(model: nn.Module) -> None:
    """Take back the marks that forbid casting and training: the weights of a CATS model are ordinary ones."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)
    for attribute in ("is_quantized", "quantization_method"):
        vars(model).pop(attribute, None)


def register() -> None:
    """Register the method "cats". Safe to call twice."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(CatsConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(CatsQuantizer)
