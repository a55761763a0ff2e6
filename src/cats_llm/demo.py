"""The whole job on the bundled model, or another, and real text: `cats demo`, and an example of the package in use."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cats_llm import bundled
from cats_llm.calibration.calibrate import calibrate
from cats_llm.calibration.sampling import Sampling
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.write import check_source, write_checkpoint
from cats_llm.continuation import Decoding, continue_prompt
from cats_llm.conversion import Folder, as_folder
from cats_llm.errors import CatsError
from cats_llm.evaluation.perplexity import PerplexityTask
from cats_llm.evaluation.run import Progress, run_evaluation
from cats_llm.evaluation.variants import Variant, make_variants
from cats_llm.loading import (
    ModelSource,
    default_device,
    device_option,
    parse_dtype,
    remote_code_option,
    revision_option,
)
from cats_llm.model.architecture import check_predicts_tokens
from cats_llm.model.sparsify import densify, sparsify
from cats_llm.model.structure import find_gated_mlps, quantization_of
from cats_llm.model.weight_traffic import sparsity_of
from cats_llm.number_format import percent
from cats_llm.options import Panel, option
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
_SAMPLES = 64
_SAMPLES_ON_CPU = 16  # of a model of 135 million parameters, a few minutes on two cores


@dataclass(frozen=True)
class DemoConfig:
    """Which model, how much `cats demo` computes, and where."""

    model: str | None = option(
        None,
        help="Any model of text with gated MLPs: a folder, a GGUF file, or a name on the hub. Default: the bundled.",
        panel=Panel.DATA,
    )
    revision: str | None = revision_option()
    trust_remote_code: bool = remote_code_option()
    device: str | None = device_option()
    dtype: str | None = option(
        None,
        help="As elsewhere. Default: float32 on a CPU and for the bundled model, else the model's own.",
        parse=parse_dtype,
        panel=Panel.DATA,
    )
    samples: int | None = option(
        None,
        help="Sequences of 512 tokens to calibrate and to evaluate on. "
        f"Default: {_SAMPLES}, of another than the bundled model {_SAMPLES_ON_CPU} on a CPU.",
        minimum=1,
    )
    max_new_tokens: int = option(60, help="Length of the continuations.", minimum=1)

    def settled(self) -> "DemoConfig":
        """With what was left open."""
        device = self.device or default_device()
        slow = self.model is not None and device == "cpu"
        dtype = "float32" if self.model is None or device == "cpu" else "auto"
        samples = _SAMPLES_ON_CPU if slow else _SAMPLES
        return replace(self, device=device, dtype=self.dtype or dtype, samples=self.samples or samples)


def run_demo(
    out: Path,
    config: DemoConfig = DemoConfig(),
    *,
    force: bool = False,
    command: str = "",
    track: Track = untracked,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Calibrate, evaluate, save, reload and generate with a model at several sparsities, and write a report.

    Args:
        out: the folder to write: the profile, a CATS checkpoint a sparsity, results.json and report.html. The weights
            of the checkpoints are hard links to each other, and to those of a model's folder, where the disk links;
            the bundled model's are copied.
        config: which model, how much is computed, and where.
        force: replace a folder that exists.
        command: what made the result, for the record.
        track: shows how much of the calibration is done.
        progress: called after each measurement of `run_evaluation`.

    Returns:
        The content of results.json: that of `run_evaluation`, with the model's ``architecture`` in words and
        ``continuations``, by prompt and variant.

    Raises:
        CatsError: the folder exists or cannot be written, matplotlib or jinja2 is not installed, the model cannot be
            made sparse or predicts no tokens, or a reloaded checkpoint computes something else than the model it was
            saved from.
    """
    check_output(out, force)
    require_extra()
    own_dtype = config.dtype or "auto"
    config = config.settled()
    with _folder(config, own_dtype, out) as folder:
        dense, tokenizer = folder.source.load(), folder.source.tokenizer()
        name = config.model or _NAME
        text = str(bundled.calibration_text())
        # a seed, so that all of the books are drawn from
        sampling = Sampling(config.samples or _SAMPLES, _SEQ_LENGTH, _BATCH_SIZE, seed=0)
        profile = calibrate(dense, sampling.batches(text, tokenizer, dense, track), text, tokenizer)
        profile = replace(profile, record=profile.record | {"model": name})
        variants = make_variants(dense, ["cats"], SPARSITIES, profile)
        task = PerplexityTask(str(bundled.heldout_text()), "held-out books", _SEQ_LENGTH, samples=config.samples)
        result = run_evaluation(
            dense, tokenizer, variants, [task], name=name, batch_size=_BATCH_SIZE, progress=progress, command=command
        )
        result["architecture"] = _architecture(dense, list(profile.layers))
        job = _Job(tokenizer, Decoding(config.max_new_tokens), task.windows[:1], variants)
        job.dense(dense)
        del dense  # a large one would not fit beside those that are reloaded
        with write_folder(out, force) as new:
            profile.save(new / "profile.safetensors")
            job.checkpoints(folder, new, link=config.model is not None)
            result["continuations"] = job.continuations
            write_json(new / "results.json", result)
            page = render_page(read_files([new / "results.json", new / "profile.safetensors"]))
            with write_file(new / "report.html") as temporary:
                temporary.write_text(page, encoding="utf-8")
    return result


@contextmanager
def _folder(config: DemoConfig, own_dtype: str, out: Path) -> Iterator[Folder]:
    """The model's folder, and what loads the model from it.

    Raises:
        CatsError: the model cannot be made sparse, or predicts no tokens; before its weights are read.
    """
    dtype = config.dtype or "auto"
    if config.model is None:
        own = bundled.model_path()
        yield Folder(own, ModelSource(str(own), device=config.device, dtype=dtype), False)
        return
    source = ModelSource(config.model, config.revision, config.trust_remote_code, config.device, own_dtype)
    skeleton = source.skeleton()
    check_predicts_tokens(skeleton, "the demo")
    find_gated_mlps(skeleton)
    if quantization_of(skeleton)[0] is not None:
        raise CatsError(f"{config.model} is sparse or quantised already; the demo begins with the dense model.")
    with as_folder(source, out) as folder:
        check_source(folder.path, out, with_weights=False)
        yield replace(folder, source=replace(folder.source, dtype=dtype))


class _Job:
    """What is done with every variant of the model: logits of a text, and continuations.

    Args:
        tokenizer: of the model.
        decoding: how prompts are continued.
        ids: input_ids (1, T) to compare checkpoints on.
        variants: the dense one, and those with a config.
    """

    def __init__(self, tokenizer: Any, decoding: Decoding, ids: torch.Tensor, variants: list[Variant]) -> None:
        self.tokenizer, self.decoding, self.ids = tokenizer, decoding, ids
        self.configs = {v.name: v.config for v in variants if isinstance(v.config, CatsConfig)}
        self.folders = {v.name: f"cats-{100 * (v.sparsity or 0):.0f}" for v in variants}
        self.expected: dict[str, torch.Tensor] = {}
        self.continuations: dict[str, dict[str, str]] = {prompt: {} for prompt in PROMPTS}

    def dense(self, model: Any) -> None:
        """Note the logits that the model in memory gives, made sparse by each config, and the dense continuations."""
        for name, config in self.configs.items():
            self.expected[name] = self._logits(sparsify(model, config))
            densify(model)
        self._continue("dense", model)

    def checkpoints(self, folder: Folder, out: Path, link: bool) -> None:
        """Write a checkpoint a config, load it again, compare its logits, and continue the prompts.

        Raises:
            CatsError: the logits differ.
        """
        before = folder.path
        for name, config in self.configs.items():
            checkpoint = out / self.folders[name]
            write_checkpoint(before, checkpoint, config, link=link)
            before = checkpoint if link else before  # where the disk does not link to the model's, it links to this
            model = replace(folder.source, model=str(checkpoint)).load()
            if not torch.equal(self._logits(model), self.expected[name]):
                raise CatsError(
                    "the reloaded checkpoint gives other logits than the model it was saved from; please report it."
                )
            self._continue(name, model)
            del model

    @torch.no_grad()
    def _logits(self, model: Any) -> torch.Tensor:
        logits: torch.Tensor = model(self.ids.to(model.device)).logits
        return logits.cpu()

    def _continue(self, name: str, model: Any) -> None:
        for prompt, texts in self.continuations.items():
            texts[name] = str(continue_prompt(model, self.tokenizer, prompt, self.decoding)["text"])


def _architecture(model: Any, layers: list[int]) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # of an MLP without any neuron two thirds are skipped
    in_mlps = sparsity_of(model, dict.fromkeys(layers, 1.0)).model * 1.5
    size = f"{parameters / 1e6:.2f} million" if parameters < 1e9 else f"{parameters / 1e9:.2f} billion"
    size += " parameters"
    return f"{type(model).__name__}, {size}, {percent(in_mlps, 1)} of the linear weights in MLPs"
