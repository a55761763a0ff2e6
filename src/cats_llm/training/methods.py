"""What is trained: the model in the form of a method (cats, relu, dense), and its thresholds."""

from typing import Any

from cats_llm import distributed
from cats_llm.calibration.criteria.search import find_config
from cats_llm.calibration.criteria.target import SparsityTarget
from cats_llm.calibration.profile import Profile
from cats_llm.checkpoint.config import QUANT_METHOD, CatsConfig
from cats_llm.errors import CatsError
from cats_llm.model.decode_linear import use_decode_linears
from cats_llm.model.relufy import relu_config, relufy
from cats_llm.model.sparsify import densify, set_config, sparse_mlps, sparsify
from cats_llm.model.structure import quantization_of
from cats_llm.training.data import Data


def thresholds_config(model: Any) -> CatsConfig | None:
    """What a model's config says of its thresholds; None for a dense one."""
    config, _ = quantization_of(model)
    return config if isinstance(config, CatsConfig) else None


def check_base(config: Any, name: str) -> None:
    """Refuse a base model whose weights are quantised.

    Raises:
        CatsError: they are.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = values.get("quant_method")
    if method != QUANT_METHOD:
        raise CatsError(
            f"{name} is quantised with {getattr(method, 'value', method)}, and adapters cannot be merged into such "
            "weights; start from the unquantised model."
        )


def apply_method(model: Any, method: str, config: CatsConfig | None = None) -> None:
    """Bring a loaded model, dense or CATS, into the form that is trained: the method's function, plain weights.

    Args:
        config: the thresholds, for the method cats; for relu what `final_config` says, if it is known yet.

    Raises:
        CatsError: the model cannot be made sparse, or cannot be ReLUfied.
    """
    if method == "dense":
        densify(model)
    elif method == "relu":
        relufy(model)
        if config is not None:
            set_config(model, config)
    else:
        assert config is not None
        if config.coverage.dense_prefill:
            raise CatsError(
                "with dense_prefill no token of a training text is sparse, so training would not see the thresholds; "
                "make the CATS model without --dense-prefill."
            )
        sparsify(model, config)
    # what decodes fastest is not what trains fastest, nor what FSDP can shard
    for mlp in sparse_mlps(model).values():
        mlp.store_neuron_major(False)
    use_decode_linears(model, False)


def choose_thresholds(
    model: Any, data: Data, sparsity: float | None, profile: Profile | None, batch_size: int
) -> CatsConfig:
    """Thresholds of the model as it is: given by a profile, kept, or calibrated on the examples set aside.

    Raises:
        CatsError: the profile is of another model, or there is neither a sparsity nor a CATS model to keep.
    """
    if sparsity is None:
        config = thresholds_config(model)
        if config is None:
            raise CatsError("the model is dense, so the method cats needs a sparsity; pass --sparsity 0.5.")
        return config
    target = SparsityTarget(sparsity=sparsity)
    if profile is not None:
        return find_config(model, profile, target).config
    batches = list(distributed.share(data.calibration_batches(batch_size)))
    return find_config(model, batches, target, data=str(data.record["calibration"])).config


def resumed_config(history: list[dict[str, Any]], model: Any) -> CatsConfig | None:
    """The thresholds that held when a checkpoint was written.

    Args:
        model: the base model as it is loaded; vectors, which a log has no room for, are its own.

    Raises:
        CatsError: the run was begun with other vectors than the model has now.
    """
    noted = [entry["thresholds"] for entry in history if "thresholds" in entry]
    if not noted:
        return None
    config = CatsConfig(**noted[-1])
    if config.vectors_are_loaded:
        return config
    loaded = thresholds_config(model)
    if loaded is None or loaded != config:
        raise CatsError("the model has other thresholds than when the run was begun; begin again with --force.")
    return loaded


def final_config(log: dict[str, Any], model: Any) -> CatsConfig | None:
    """What a finished run's checkpoint says: the thresholds that it ended with.

    Args:
        model: the base model; of a ReLUfied one the sparsity that was measured goes into the config.
    """
    if log["method"] != "relu":
        return resumed_config(log["thresholds"], model)
    ended = relu_config(model)
    ended.layer_sparsity = log["evaluations"][-1]["layer_sparsity"]
    ended.calibration = {"model": log.get("model"), "data": log["data"]["heldout"], "versions": log["versions"]}
    return ended
