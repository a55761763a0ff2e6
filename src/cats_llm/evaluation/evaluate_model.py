"""A model evaluated from end to end, as `cats eval` does: from names and options to the content of a result file."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cats_llm import distributed
from cats_llm.calibration.calibrate import calibrate
from cats_llm.calibration.profile import Profile
from cats_llm.evaluation.cache import Cache, default_cache
from cats_llm.evaluation.config import EvaluationConfig
from cats_llm.evaluation.perplexity import PerplexityTask
from cats_llm.evaluation.run import Progress, run_evaluation
from cats_llm.evaluation.task import Task
from cats_llm.evaluation.tasks import build_tasks
from cats_llm.evaluation.variants import Variant, checkpoint_variant, make_variants, with_unique_names
from cats_llm.loading import ModelSource
from cats_llm.model.sparsify import thresholds
from cats_llm.progress import Track, untracked
from cats_llm.text import TextSource, batched, check_length, load_sequences

# sequences to calibrate on, where a text is given instead of a profile
_CALIBRATION_SAMPLES = 256


def evaluate_model(
    config: EvaluationConfig,
    *,
    progress: Callable[[Progress], None] | None = None,
    notify: Callable[[str], None] | None = None,
    track: Track = untracked,
    command: str = "",
) -> dict[str, Any]:
    """Load a model, calibrate it where thresholds are wanted, and measure its variants.

    Of several processes, as `accelerate launch` or `torchrun` start them, all call this, share the work, and get the
    same result.

    Args:
        config: what is compared on what.
        progress, notify, command: see `run_evaluation`.
        track: shows how much of the calibration is done.

    Returns:
        The content of a result file (docs/evaluation.md).

    Raises:
        CatsError: a text is the one that the thresholds come from; or from loading, calibrating and measuring.
    """
    source = replace(config.source, device=distributed.join(config.source.device))
    profile = Profile.load(config.profile) if config.profile is not None else None
    config.check_held_out(config.calibration or (profile.record.get("data") if profile is not None else None))
    tasks, means = _tasks(config)
    dense = source if config.against is None else replace(source, model=config.against, revision=None)
    base, tokenizer = dense.load(), dense.tokenizer()
    if config.text or config.calibration is not None:
        check_length(config.seq_length, base.config)
    batches = None
    if config.calibration is not None:
        text = TextSource(config.calibration, replace(config.rows, split="train"))
        sequences = load_sequences(text, tokenizer, config.seq_length, samples=_CALIBRATION_SAMPLES, seed=0)
        batches = list(batched(sequences, config.batch_size))
        share = list(distributed.share(batches))
        profile = calibrate(base, track(share, "calibrating", len(share)), data=text.path)
    methods = config.method if config.sparsity or config.method != ("cats",) else ()
    variants = make_variants(base, methods, config.sparsity, profile, config.coverage, batches, config.equal_bytes)
    variants += _checkpoints(config, source, base, alone=len(variants) == 1)
    return run_evaluation(
        base,
        tokenizer,
        with_unique_names(variants),
        tasks,
        name=source.model,
        batch_size=config.batch_size,
        cache=None if config.no_cache else Cache(config.cache or default_cache()),
        means=means,
        progress=progress,
        notify=notify,
        command=command,
    )


def _tasks(config: EvaluationConfig) -> tuple[list[Task], dict[str, list[str]]]:
    """Texts and tasks, and the sets of tasks whose mean is of interest."""
    texts: list[Task] = [
        PerplexityTask(
            TextSource(path, config.rows), name, config.seq_length, config.stride, config.samples, config.seed
        )
        for name, path in config.text_names().items()
    ]
    tasks, means = build_tasks(config.tasks, config.data_dir, config.task_options)
    return texts + tasks, means


def _checkpoints(config: EvaluationConfig, source: ModelSource, base: Any, alone: bool) -> list[Variant]:
    """The variants that are saved models: the base model, where nothing else is asked of it, and those beside it."""
    variants = []
    if config.against is None and alone and thresholds(base):
        variants.append(checkpoint_variant(base, source.model, config.coverage, base))
    for name in [*([source.model] if config.against is not None else []), *config.checkpoint]:
        beside = source if name == source.model else replace(source, model=name, revision=None)
        variants.append(checkpoint_variant(beside.load(), name, config.coverage, base))
    return variants
