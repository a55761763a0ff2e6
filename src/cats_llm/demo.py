"""The whole job on the bundled model and real text: what `cats demo` runs, and an example of the package in use."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cats_llm import bundled
from cats_llm.calibration.calibrate import calibrate
from cats_llm.calibration.sampling import Sampling
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.write import write_checkpoint
from cats_llm.continuation import Decoding, continue_prompt
from cats_llm.errors import CatsError
from cats_llm.evaluation.perplexity import PerplexityTask
from cats_llm.evaluation.run import Progress, run_evaluation
from cats_llm.evaluation.variants import make_variants
from cats_llm.loading import Placement, load_model, load_tokenizer
from cats_llm.model.sparsify import densify, sparsify
from cats_llm.model.weight_traffic import sparsity_of
from cats_llm.number_format import percent
from cats_llm.options import option
from cats_llm.outputs import check_output, write_file, write_folder, write_json
from cats_llm.progress import Track, untracked
from cats_llm.report import read_files, render_page, require_extra

SPARSITIES = (0.5, 0.7, 0.9)
PROMPTS = (
    "Once upon a time there was a little girl who",
    "The king looked at the fox and said,",
    "It was a cold winter night, and the wind",
)
_NAME = "the bundled model"
_SEQ_LENGTH = 512
_BATCH_SIZE = 8


@dataclass(frozen=True)
class DemoConfig:
    """How much `cats demo` computes, and where."""

    place: Placement = Placement(dtype="float32")
    samples: int = option(64, help="Sequences of 512 tokens to calibrate and to evaluate on.", minimum=1)
    max_new_tokens: int = option(60, help="Length of the continuations.", minimum=1)


def run_demo(
    out: Path,
    config: DemoConfig = DemoConfig(),
    *,
    force: bool = False,
    command: str = "",
    track: Track = untracked,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Calibrate, evaluate, save, reload and generate with the bundled model at several sparsities, and write a report.

    Args:
        out: the folder to write: the profile, a CATS checkpoint a sparsity, results.json and report.html.
        config: how much is computed, and where.
        force: replace a folder that exists.
        command: what made the result, for the record.
        track: shows how much of the calibration is done.
        progress: called after each measurement of `run_evaluation`.

    Returns:
        The content of results.json: that of `run_evaluation`, with the model's ``architecture`` in words and
        ``continuations``, by prompt and variant.

    Raises:
        CatsError: the folder exists or cannot be written, matplotlib or jinja2 is not installed, or a reloaded
            checkpoint computes something else than the model it was saved from.
    """
    check_output(out, force)
    require_extra()
    source = bundled.model_path()
    dense = load_model(str(source), config.place.dtype, config.place.device)
    tokenizer = load_tokenizer(str(source))
    text = str(bundled.calibration_text())
    # a seed, so that all of the books are drawn from
    sampling = Sampling(config.samples, _SEQ_LENGTH, _BATCH_SIZE, seed=0)
    profile = calibrate(dense, sampling.batches(text, tokenizer, dense, track), text, tokenizer)
    profile = replace(profile, record=profile.record | {"model": _NAME})
    variants = make_variants(dense, ["cats"], SPARSITIES, profile)
    task = PerplexityTask(str(bundled.heldout_text()), "held-out books", _SEQ_LENGTH, samples=config.samples)
    result = run_evaluation(
        dense, tokenizer, variants, [task], name=_NAME, batch_size=_BATCH_SIZE, progress=progress, command=command
    )
    decoding = Decoding(config.max_new_tokens)
    continuations: dict[str, dict[str, str]] = {prompt: {} for prompt in PROMPTS}
    with write_folder(out, force) as folder:
        profile.save(folder / "profile.safetensors")
        for variant in variants:
            model = dense
            if isinstance(variant.config, CatsConfig):
                checkpoint = folder / f"cats-{100 * (variant.sparsity or 0):.0f}"
                write_checkpoint(source, checkpoint, variant.config)
                model = load_model(str(checkpoint), config.place.dtype, config.place.device)
                _check_reloaded(model, dense, variant.config, task.windows[:1])
            for prompt, texts in continuations.items():
                texts[variant.name] = str(continue_prompt(model, tokenizer, prompt, decoding)["text"])
        result |= {"architecture": _architecture(dense, list(profile.layers)), "continuations": continuations}
        write_json(folder / "results.json", result)
        page = render_page(read_files([folder / "results.json", folder / "profile.safetensors"]))
        with write_file(folder / "report.html") as temporary:
            temporary.write_text(page, encoding="utf-8")
    return result


@torch.no_grad()
def _check_reloaded(reloaded: Any, dense: Any, config: CatsConfig, ids: torch.Tensor) -> None:
    """Compare a checkpoint with the model in memory, made sparse by the same config, on input_ids (1, T)."""
    ids = ids.to(dense.device)
    expected = sparsify(dense, config)(ids).logits
    densify(dense)
    if not torch.equal(reloaded(ids).logits, expected):
        raise CatsError(
            "the reloaded checkpoint gives other logits than the model it was saved from; please report it."
        )


def _architecture(model: Any, layers: list[int]) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # of an MLP without any neuron two thirds are skipped
    in_mlps = sparsity_of(model, dict.fromkeys(layers, 1.0)).model * 1.5
    size = f"{parameters / 1e6:.2f} million parameters"
    return f"{type(model).__name__}, {size}, {percent(in_mlps, 1)} of the linear weights in MLPs"
