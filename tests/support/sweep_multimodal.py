"""Which multimodal families of the installed transformers go through CATS on text.

    python tests/support/sweep_multimodal.py [TYPE ...]

A script and no test: it builds a tiny random model of each family, which takes a minute or two in all.
"""

import os
import sys
import warnings
from collections import defaultdict

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
import transformers
from transformers.models.auto import modeling_auto

import cats_llm
import tiny
from cats_llm import bundled
from cats_llm.continuation import Decoding, continue_prompt
from cats_llm.errors import CatsError
from cats_llm.loading import load_tokenizer
from cats_llm.model.architecture import build_skeleton

_LARGEST = 40e6  # parameters: what was not made small by tiny.py


def families() -> list[str]:
    """Model types that transformers takes images or sound with, beside text."""
    mappings = (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    return sorted({name for mapping in mappings for name in mapping})


def build(model_type: str, mrope: bool) -> torch.nn.Module:
    """A tiny model; ``mrope`` divides the rotary features among time, height and width, as some families must."""
    config = tiny.tiny_config(model_type)
    if mrope:
        text = config.get_text_config()
        text.rope_parameters = dict(text.rope_parameters) | {"mrope_section": [2, 3, 3]}
    with torch.device("meta"):
        if sum(p.numel() for p in build_skeleton(config).parameters()) > _LARGEST:
            raise RuntimeError("too large")
    return tiny.tiny_model(config)


def outcome(model_type: str, tokenizer: object) -> tuple[str, str]:
    """What became of the family: sparse, refused (and why), or not tried (no tiny model of it could be built)."""
    reason = ""
    for mrope in (False, True):
        try:
            model = build(model_type, mrope)
            with torch.no_grad():
                model(input_ids=torch.randint(3, 4000, (2, 24)))
                model.generate(torch.randint(3, 4000, (1, 5)), Decoding(max_new_tokens=2))
        except Exception as error:  # the model's own: either it cannot be made small, or text is not enough for it
            reason = reason or f"{type(error).__name__}: {error}".splitlines()[0][:100]
            continue
        try:
            profile = cats_llm.calibrate(model, torch.randint(3, 4000, (2, 24)))
            cats_llm.sparsify(model, profile.config(0.5))
            continue_prompt(model, tokenizer, "The king", Decoding(max_new_tokens=3))
        except CatsError as error:
            return "refused", str(error)
        return "sparse", f"dense layers: {profile.not_run}" if profile.not_run else ""
    return "not tried", reason


def main(names: list[str]) -> None:
    """Print one line a family, and the counts."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    tokenizer = load_tokenizer(str(bundled.model_path()))
    found: dict[str, list[str]] = defaultdict(list)
    for name in names or families():
        result, reason = outcome(name, tokenizer)
        found[result].append(name)
        print(f"{name}: {result} {reason}".strip(), flush=True)
    for result, members in found.items():
        print(f"\n{len(members)} {result}: {', '.join(members)}")


if __name__ == "__main__":
    main(sys.argv[1:])
