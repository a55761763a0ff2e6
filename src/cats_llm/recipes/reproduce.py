"""A recipe run from end to end: its numbers beside ours."""

import gc
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cats_llm import bundled, formats
from cats_llm.benchmark import machine
from cats_llm.benchmark.bench import bench_decode, bench_mlp, check_cpu_kernels
from cats_llm.benchmark.config import DecodeBench, MLPBench
from cats_llm.calibration.calibrate import calibrate
from cats_llm.calibration.profile import Profile
from cats_llm.calibration.sampling import Sampling
from cats_llm.errors import CatsError
from cats_llm.evaluation.cache import Cache, default_cache
from cats_llm.evaluation.methods import method
from cats_llm.evaluation.run import Progress, run_evaluation
from cats_llm.evaluation.tasks import TASK_SETS, build_tasks, expand
from cats_llm.evaluation.variants import make_variants
from cats_llm.loading import ModelSource
from cats_llm.model.structure import find_gated_mlps
from cats_llm.outputs import check_output, write_json
from cats_llm.progress import Track, untracked
from cats_llm.recipes.load import smoke_data
from cats_llm.recipes.recipe import (
    BenchPlan,
    CalibrationSection,
    Comparison,
    EvaluationPlan,
    FinetuningPlan,
    Recipe,
    ReproduceConfig,
    Results,
    ThresholdPlan,
)
from cats_llm.text import TextSource
from cats_llm.training.classification_data import write_instructions
from cats_llm.training.config import LOG, DataConfig, FinetuneConfig

_PROFILE, _RECIPE_FILE = "profile.safetensors", "recipe.json"
REPORTED = (_PROFILE, "result.json", "bench.json", "training.json")
"""What the folder of a reproduction may hold for `cats report`."""


@dataclass(frozen=True)
class Reproduction:
    """What a recipe's numbers came to here.

    Attributes:
        recipe: as published, also where a smoke run did less.
        comparisons: one for each number of the recipe.
    """

    recipe: Recipe
    smoke: bool
    comparisons: tuple[Comparison, ...]
    results: Results

    def write(self, out: Path) -> None:
        """The comparison and the results in full, into a folder."""
        write_json(out / "comparison.json", self.to_dict(), force=True)
        for name in self.results.keys() & {"result", "bench", "training"}:
            write_json(out / f"{name}.json", self.results[name], force=True)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "recipe": self.recipe.name,
            "title": self.recipe.title,
            "model": self.recipe.model,
            "smoke": self.smoke,
            "machine": machine.facts(),
            "numbers": [
                {
                    "what": number.expected.of.label,
                    "expected": number.expected.value,
                    "measured": number.measured,
                    "stderr": number.stderr,
                    # of another model's number it would mean nothing
                    "difference": None if self.smoke else number.difference,
                    "source": number.expected.source,
                }
                for number in self.comparisons
            ],
        }


def reproduce(
    recipe: Recipe,
    config: ReproduceConfig,
    *,
    force: bool = False,
    notify: Callable[[str], None] = lambda _: None,
    progress: Callable[[Progress], None] = lambda _: None,
    track: Track = untracked,
    command: str = "",
) -> Reproduction:
    """Run an experiment of the paper, and compare its numbers with the published ones.

    With ``config.out`` the profile, the results and the comparison (comparison.json) are kept there.

    Args:
        force: replace what is there.
        notify: told in words what goes on.
        progress: told of every measurement of an evaluation.
        track: shows how much of the calibration is done.
        command: what started it, for the record.

    Raises:
        CatsError: the recipe and the options do not go together, an output is in the way, or a step cannot be done.
    """
    config.check_usage(recipe)
    if config.out is not None and not (config.resume and (config.out / _RECIPE_FILE).is_file()):
        check_output(config.out, force)
    check(recipe)
    if isinstance(recipe.plan, BenchPlan):
        check_cpu_kernels()
    run, here = recipe, config
    if config.smoke:
        run = _smoked(recipe)
        here = replace(config, data_dir=smoke_data(), device="cpu", no_cache=True)
    with ExitStack() as stack:
        if config.out is not None:
            if config.out.exists() and not config.out.is_dir():
                raise CatsError(f"{config.out} is a file; give the name of a folder.")
            config.out.mkdir(exist_ok=True)
        elif isinstance(recipe.plan, FinetuningPlan):
            here = replace(here, out=Path(stack.enter_context(TemporaryDirectory())))
        results = _Run(run, here, force or config.out is None, notify, progress, track, command).measure()
    comparisons = tuple(
        # labels as published, also where a smoke run is shorter
        Comparison(published, *run.plan.measured(number.of, results))
        for number, published in zip(run.expected, recipe.expected, strict=True)
    )
    reproduction = Reproduction(recipe, config.smoke, comparisons, results)
    if config.out is not None:
        reproduction.write(config.out)
    return reproduction


@dataclass(frozen=True)
class _Run:
    """A recipe, how to run it here, and whom to tell."""

    recipe: Recipe
    config: ReproduceConfig
    force: bool
    notify: Callable[[str], None]
    progress: Callable[[Progress], None]
    track: Track
    command: str

    def measure(self) -> Results:
        """What the plan measures."""
        plan = self.recipe.plan
        if isinstance(plan, FinetuningPlan):
            return {"training": self._finetune(plan)}
        if isinstance(plan, BenchPlan):
            return {"bench": self._bench_mlp(plan) if plan.kind == "mlp" else self._bench_decode(plan)}
        if isinstance(plan, ThresholdPlan):
            _, _, profile = self._calibrated(self._source())
            return {"thresholds": profile.config(plan.sparsity).thresholds}
        tasks, means = build_tasks(plan.tasks, self.config.data_dir, plan.task_options)
        model, tokenizer, profile = self._calibrated(self._source())
        result = run_evaluation(
            model,
            tokenizer,
            make_variants(model, plan.methods, plan.sparsities, profile),
            tasks,
            means=means,
            name=self.recipe.model,
            batch_size=self.config.batch_size,
            cache=None if self.config.no_cache else Cache(default_cache()),
            progress=self.progress,
            notify=self.notify,
            command=self.command,
        )
        return {"result": result}

    def _source(self) -> ModelSource:
        return ModelSource(
            str(self.recipe.model), self.recipe.revision, device=self.config.device, dtype=self.recipe.dtype
        )

    def _calibrated(self, source: ModelSource) -> tuple[Any, Any, Profile]:
        """The model, its tokenizer and its profile, which is kept at once and not after hours of measuring."""
        find_gated_mlps(source.skeleton())  # before gigabytes of weights are read
        model, tokenizer = source.load(), source.tokenizer()
        text = self.recipe.calibration
        assert text is not None
        if self.config.profile is not None:
            profile = Profile.load(self.config.profile)
            profile.check_model(model)
        else:
            sampling = replace(text.sampling, batch_size=self.config.batch_size)
            batches = sampling.batches(TextSource(text.data, text.rows), tokenizer, model, self.track)
            profile = calibrate(model, batches, text.data, tokenizer)
        if self.config.out is not None:
            profile.save(self.config.out / _PROFILE, force=True)
        return model, tokenizer, profile

    def _finetune(self, plan: FinetuningPlan) -> dict[str, Any]:
        """The logs of all runs. Each leaves its model in a folder, and is not repeated when resumed."""
        from cats_llm.training.finetune import finetune  # it imports much

        config, source = self.config, self._source()
        out = config.out
        assert out is not None
        begin(out, self.recipe, config.resume)
        profile = out / _PROFILE
        if "cats" in plan.methods and not (config.resume and profile.is_file()):
            self._calibrated(source)
        data, reading = plan.data, plan.reading
        if plan.instructions is not None:
            data, heldout = (self._instructions(plan.instructions, split, out) for split in ("train", "validation"))
            reading = replace(reading, heldout=reading.heldout or heldout)
        logs = []
        for name, (training, sparsity) in plan.runs.items():
            folder = out / name.replace(" ", "-").replace("=", "")
            if not (config.resume and (folder / LOG).is_file()):
                self.notify(f"{name}:")
                run = FinetuneConfig(
                    source=source,
                    out=folder,
                    data=str(data),
                    reading=reading,
                    sparsity=sparsity,
                    profile=profile if training.method == "cats" else None,
                    training=replace(training, micro_batch=config.batch_size),
                    resume=config.resume,
                )
                finetune(run, force=self.force, notify=self.notify, command=self.command)
                gc.collect()  # models have cycles, and the next one needs the memory
            logs.append(json.loads((folder / LOG).read_text(encoding="utf-8")))
        return {
            "format": formats.FINETUNING_RUNS,
            "version": formats.FINETUNING_VERSION,
            "model": source.model,
            "command": self.command,
            "runs": logs,
        }

    def _instructions(self, task: str, split: str, out: Path) -> str:
        file = out / f"{task}-{split}.jsonl"
        if not (self.config.resume and file.is_file()):
            rows = self.config.data_dir / file.name if self.config.data_dir is not None else None
            write_instructions(task, split, file, rows, force=True)
        return str(file)

    def _bench_mlp(self, plan: BenchPlan) -> dict[str, Any]:
        smoke = self.config.smoke
        shape = "64,96" if smoke else str(plan.shape)
        config = MLPBench(plan.dtype, plan.sparsities, (plan.batch,), shape=shape, rounds=plan.rounds)
        return bench_mlp(config, working_set=0 if smoke else None).record

    def _bench_decode(self, plan: BenchPlan) -> dict[str, Any]:
        model, _, profile = self._calibrated(replace(self._source(), device="cpu", dtype=plan.dtype))
        rows: list[dict[str, Any]] = []
        for tokens in plan.lengths:
            config = DecodeBench(
                plan.dtype, plan.sparsities, (plan.batch,), model=self.recipe.model, tokens=tokens, rounds=plan.rounds
            )
            rows += bench_decode(config, model=model, profile=profile).record["rows"]
        return {"benchmark": "decode", "machine": machine.facts(), "rows": rows}


def _smoked(recipe: Recipe) -> Recipe:
    """The same steps on what the package brings along."""
    plan, expected = recipe.plan, recipe.expected
    text = str(bundled.calibration_text())
    if isinstance(plan, EvaluationPlan):
        missing = [task for task in expand(plan.tasks)[0] if not (smoke_data() / f"{task}.jsonl").is_file()]
        if missing:
            raise CatsError(
                f"--smoke has no documents for {', '.join(missing)}; it can run recipes whose tasks are among "
                f"{', '.join(TASK_SETS['paper8'])}."
            )
    if isinstance(plan, BenchPlan):
        short = {tokens: 3 + i for i, tokens in enumerate(plan.lengths)}
        plan = replace(plan, rounds=1, tokens=tuple(short.values()))
        expected = tuple(replace(e, of=replace(e.of, tokens=e.of.tokens and short[e.of.tokens])) for e in expected)
    if isinstance(plan, FinetuningPlan):
        plan = replace(
            plan,
            data=text if plan.instructions is None else None,
            reading=DataConfig(seq_length=64, heldout_samples=8),
            training=replace(plan.training, steps=2, epochs=None, learning_rate=1e-3, batch_size=4, eval_every=1),
        )
    return replace(
        recipe,
        plan=plan,
        model=None if recipe.model is None else str(bundled.model_path()),
        revision=None,
        dtype="float32",
        calibration=recipe.calibration and CalibrationSection(text, Sampling(8, 128, seed=0)),
        expected=expected,
    )


def begin(out: Path, recipe: Recipe, resume: bool) -> None:
    """Note which recipe the folder is of, or make sure that it is of this one.

    Raises:
        CatsError: it is of another recipe.
    """
    facts = json.loads(json.dumps(asdict(recipe)))
    file = out / _RECIPE_FILE
    if not (resume and file.is_file()):
        write_json(file, facts, force=True)
    elif json.loads(file.read_text(encoding="utf-8")) != facts:
        raise CatsError(f"{out} was begun with another recipe; choose another --out, or begin again with --force.")


def check(recipe: Recipe) -> None:
    """Refuse, before any work, numbers that the recipe will not measure.

    Raises:
        CatsError: an unknown method, or an expected number of a variant or task that is not run.
    """
    plan = recipe.plan
    if not isinstance(plan, EvaluationPlan):
        return
    variants = {"dense"}
    for name in plan.methods:
        try:
            takes_sparsity = method(name).takes_sparsity
        except CatsError as error:
            raise CatsError(f"the recipe {recipe.name}: {error}") from error
        variants |= {f"{name} k={k:g}" for k in plan.sparsities} if takes_sparsity else {name}
    tasks = {name for names in expand(plan.tasks) for name in names}
    for number in recipe.expected:
        for what, value, known in (("variant", number.of.variant, variants), ("task", number.of.task, tasks)):
            if value not in known:
                raise CatsError(
                    f"the recipe {recipe.name} expects a number of the {what} {value}, which it does not run; it has "
                    f"{', '.join(sorted(known))}."
                )
