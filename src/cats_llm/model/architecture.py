"""Which class of transformers a checkpoint is of, and what a model can be asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from cats_llm.errors import CatsError, first_line
from cats_llm.model.structure import unwrap

# tried in this order where a checkpoint names no class that this transformers has
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModel",
)


def model_class(config: Any, trust_remote_code: bool = False) -> Any:
    """The class that builds the model of a config.

    That is the one in ``architectures`` of config.json, so that a checkpoint without a head, or with another one than
    a language model's, gets no random lm_head. Code that comes with the checkpoint, if it is trusted, goes before it;
    the auto classes come after it.

    Args:
        config: a `PreTrainedConfig`.
        trust_remote_code: the user allowed code of the checkpoint.

    Returns:
        A subclass of `PreTrainedModel`, or an auto class, which has the same ``from_pretrained``.

    Raises:
        CatsError: transformers has no class for it.
    """
    import transformers

    remote = getattr(config, "auto_map", None) or {}
    autos = [getattr(transformers, name) for name in _AUTO_CLASSES if hasattr(transformers, name)]
    if trust_remote_code:
        for auto in autos:
            if auto.__name__ in remote:
                return auto
    names = getattr(config, "architectures", None) or []
    for name in [names] if isinstance(names, str) else names:
        named = getattr(transformers, str(name), None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            config_class = getattr(named, "config_class", None)
            if isinstance(config_class, type) and isinstance(config, config_class):
                return named
    for auto in autos:
        if type(config) in auto._model_mapping:
            return auto
    if any(auto.__name__ in remote for auto in autos):
        raise CatsError("the model's code comes with the checkpoint; pass --trust-remote-code to run it.")
    raise CatsError(
        f"transformers has no model of text for the type {getattr(config, 'model_type', None)!r} "
        f"({', '.join(map(str, names)) or 'no architectures named'})."
    )


def build_skeleton(config: Any, trust_remote_code: bool = False) -> Any:
    """The model of a config, with weights as they happen to be."""
    chosen = model_class(config, trust_remote_code)
    if hasattr(chosen, "from_config"):
        return chosen.from_config(config, trust_remote_code=trust_remote_code)
    return chosen._from_config(config)


def check_reads_text(model: nn.Module) -> None:
    """Make sure that the model's decoder runs on text alone.

    Raises:
        CatsError: it has an encoder, without whose input its decoder computes nothing.
    """
    base: Any = unwrap(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise CatsError(
            f"{type(base).__name__} is an encoder-decoder: what its decoder computes depends on another text, so CATS "
            "has nothing to calibrate or measure on; it works on models that read one text."
        )


@contextmanager
def text_alone(model: nn.Module) -> Iterator[None]:
    """Call the model inside with nothing but tokens.

    Raises:
        CatsError: it needs other inputs too (images, sound), without which its forward raises.
    """
    try:
        yield
    except CatsError:
        raise
    except (TypeError, ValueError) as error:  # how models miss an input
        raise CatsError(f"{type(unwrap(model)).__name__} does not run on text alone ({first_line(error)}).") from error


def check_predicts_tokens(model: nn.Module, task: str) -> None:
    """Make sure that the model reads a text and predicts how it goes on.

    Args:
        task: what needs it, as the sentence's subject.

    Raises:
        CatsError: it has no language-model head, or has an encoder too.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    check_reads_text(model)
    base: Any = unwrap(model)
    if not hasattr(base, "get_output_embeddings"):
        return  # not of transformers; nobody but the caller knows
    kind = type(base).__name__
    has_head = base.get_output_embeddings() is not None or base.can_generate()
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() or not has_head:
        raise CatsError(
            f"{task} has no meaning for {kind}, which predicts no next token; it needs a model with a language-model "
            "head."
        )
