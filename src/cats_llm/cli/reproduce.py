"""`cats reproduce`: an experiment of the paper, and its numbers beside ours."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from cats_llm import bundled, recipes
from cats_llm.benchmark import machine
from cats_llm.benchmark.decode import bench_decode
from cats_llm.benchmark.mlp import bench_mlp
from cats_llm.benchmark.shapes import parse_shape
from cats_llm.calibration.calibrate import calibrate
from cats_llm.calibration.profile import Profile
from cats_llm.calibration.sampling import Sampling
from cats_llm.cli import options, report, reproduce_finetuning
from cats_llm.cli.output import notify, quiet_libraries, show, show_progress, table, track
from cats_llm.errors import CatsError
from cats_llm.evaluation.cache import Cache, default_cache
from cats_llm.evaluation.methods import method
from cats_llm.evaluation.run import run_evaluation
from cats_llm.evaluation.task import TaskOptions
from cats_llm.evaluation.tasks import TASK_SETS, build_tasks, expand
from cats_llm.evaluation.variants import make_variants
from cats_llm.kernels import cpu
from cats_llm.loading import load_model, load_skeleton, load_tokenizer
from cats_llm.model.structure import find_gated_mlps
from cats_llm.outputs import check_output, command_line, write_file, write_json
from cats_llm.recipes import BenchPlan, Comparison, EvaluationPlan, FinetuningPlan, Recipe, ThresholdPlan
from cats_llm.report import page
from cats_llm.report.extra import MissingExtraError, require_extra
from cats_llm.text import RowFormat, TextSource

if TYPE_CHECKING:
    from cats_llm.evaluation.task import Task


_PROFILE = "profile.safetensors"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(name="reproduce")(command)


def command(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A name, or the path of a YAML file. Without it: list the names.",
            show_default=False,
        ),
    ] = None,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Run all steps in a minute, on the bundled model and a few local documents."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", show_default=False, help="Keep the profile, the results and a report here."
        ),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="A profile of the model, in place of calibrating.", show_default=False)
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the tasks' data, where there is no hub: TASK.jsonl, or to fine-tune on, TASK-train.jsonl "
            "and TASK-validation.jsonl.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Fine-tuning: go on in --out, with what is finished there.")
    ] = False,
    batch_size: options.BatchSize = 4,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Measure everything again, and keep nothing.")] = False,
    device: options.Device = None,
    json: options.JsonFile = None,
    force: options.Force = False,
) -> None:
    """Run an experiment of the paper, and print the published numbers beside the measured ones.

    A recipe is calibration and evaluation, a benchmark, or fine-tuning by several methods, with the settings that were
    published, and the numbers to expect with their source. Models and data come from the hub; a stopped evaluation goes
    on where it was, stopped fine-tuning with --resume.

    Example: **cats reproduce quality-mistral-7b --out mistral**
    """
    if recipe is None:
        _list()
        return
    chosen = recipes.find(recipe)
    tuning = isinstance(chosen.plan, FinetuningPlan)
    if resume and not (tuning and out is not None):
        raise typer.BadParameter("--resume goes on with a recipe of fine-tuning, in its --out.")
    if tuning and out is None and not smoke:
        raise typer.BadParameter(f"{recipe} leaves fine-tuned models; say with --out where.")
    begun = resume and out is not None and reproduce_finetuning.is_begun(out)
    for path in (out, json):
        if path is not None and not (begun and path is out):
            check_output(path, force)
    check(chosen)
    if isinstance(chosen.plan, BenchPlan) and not cpu.available():
        raise CatsError("the CPU kernels are not built here; install cats-llm with a C++ compiler at hand.")
    quiet_libraries()
    ran = _smoked(chosen) if smoke else chosen
    with ExitStack() as stack:
        work = out
        if out is not None:
            if out.exists() and not out.is_dir():
                raise CatsError(f"{out} is a file; give the name of a folder.")
            out.mkdir(exist_ok=True)
        elif tuning:
            work = Path(stack.enter_context(TemporaryDirectory()))
        run = _Run(
            ran,
            profile,
            recipes.smoke_data() if smoke else data_dir,
            batch_size,
            "cpu" if smoke else device,
            smoke,
            None if smoke or no_cache else Cache(default_cache()),
            work,
            resume,
            force or out is None,
        )
        measured = run.measure()
    found = recipes.compare(run.recipe.expected, **measured)
    # labels as published, also where a smoke run is shorter
    found = [replace(item, expected=expected) for item, expected in zip(found, chosen.expected, strict=True)]
    summary = _summary(chosen, found, smoke)
    if out is not None:
        _write(out, chosen, measured, summary)
    if json is not None:
        write_json(json, summary, force)
    _show(chosen, found, smoke)
    if out is not None:
        show(f"Written to {out}.")


@dataclass(frozen=True)
class _Run:
    """A recipe and how to run it here."""

    recipe: Recipe
    given: Path | None
    data_dir: Path | None
    batch_size: int
    device: str | None
    smoke: bool
    cache: Cache | None
    out: Path | None
    resume: bool
    force: bool

    def measure(self) -> dict[str, Any]:
        """What `recipes.compare` takes: the result, thresholds, bench or training."""
        plan = self.recipe.plan
        if isinstance(plan, FinetuningPlan):
            return {"training": self._finetune(plan)}
        if isinstance(plan, BenchPlan) and plan.kind == "mlp":
            return {"bench": self._bench_mlp(plan)}
        # before gigabytes of weights are read
        find_gated_mlps(load_skeleton(str(self.recipe.model), self.recipe.revision, False))
        dtype, device = self.recipe.dtype, self.device
        if isinstance(plan, BenchPlan):
            dtype, device = plan.dtype, "cpu"
        tasks: list[Task] = []
        means: dict[str, list[str]] = {}
        if isinstance(plan, EvaluationPlan):
            tasks, means = build_tasks(plan.tasks, self.data_dir, TaskOptions(num_fewshot=plan.num_fewshot))
        model = load_model(str(self.recipe.model), dtype, device, self.recipe.revision)
        tokenizer = load_tokenizer(str(self.recipe.model), self.recipe.revision)
        profile = self._profile(model, tokenizer)
        if isinstance(plan, ThresholdPlan):
            return {"thresholds": profile.config(plan.sparsity).thresholds}
        if isinstance(plan, BenchPlan):
            return {"bench": self._bench_decode(plan, model, profile)}
        result = run_evaluation(
            model,
            tokenizer,
            make_variants(model, plan.methods, plan.sparsities, profile),
            tasks,
            means=means,
            name=self.recipe.model,
            batch_size=self.batch_size,
            cache=self.cache,
            progress=show_progress,
            notify=notify,
            command=command_line(),
        )
        return {"result": result}

    def _profile(self, model: Any, tokenizer: Any) -> Profile:
        calibration = self.recipe.calibration
        assert calibration is not None
        if self.given is not None:
            profile = Profile.load(self.given)
            profile.check_model(model)
        else:
            rows = RowFormat(calibration.text_column, calibration.dataset_config, calibration.split)
            sampling = Sampling(calibration.samples, calibration.seq_length, self.batch_size, calibration.seed)
            batches = sampling.batches(TextSource(calibration.data, rows), tokenizer, model)
            tracked = track(batches, "calibrating", sampling.most_batches())
            profile = calibrate(model, tracked, calibration.data, tokenizer)
        if self.out is not None:
            # now, and not after hours of evaluation
            profile.save(self.out / _PROFILE, force=True)
        return profile

    def _finetune(self, plan: FinetuningPlan) -> dict[str, Any]:
        assert self.out is not None
        reproduce_finetuning.begin(self.out, self.recipe, self.resume)
        profile = self.out / _PROFILE
        if "cats" in plan.methods and not (self.resume and profile.is_file()):
            name, revision = str(self.recipe.model), self.recipe.revision
            find_gated_mlps(load_skeleton(name, revision, False))
            model = load_model(name, self.recipe.dtype, self.device, revision)
            self._profile(model, load_tokenizer(name, revision))
            del model  # before training loads its own
        return reproduce_finetuning.finetune_all(
            self.recipe,
            plan,
            self.out,
            profile=profile,
            data_dir=self.data_dir,
            micro_batch=self.batch_size,
            device=self.device,
            resume=self.resume,
            force=self.force,
            command=command_line(),
        )

    def _bench_mlp(self, plan: BenchPlan) -> dict[str, Any]:
        shape = parse_shape("64,96" if self.smoke else str(plan.shape))
        rows = bench_mlp(
            shape, _dtype(plan), list(plan.sparsities), plan.batch, plan.rounds, working_set=0 if self.smoke else None
        )
        return {"benchmark": "mlp", "machine": machine.facts(), "rows": rows}

    def _bench_decode(self, plan: BenchPlan, model: Any, profile: Profile) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for tokens in plan.tokens:
            found = bench_decode(model, list(plan.sparsities), profile, plan.batch, tokens, plan.rounds)["rows"]
            rows += [row | {"model": self.recipe.model, "dtype": plan.dtype} for row in found]
        return {"benchmark": "decode", "machine": machine.facts(), "rows": rows}


def _dtype(plan: BenchPlan) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, plan.dtype)
    return dtype


def _smoked(recipe: Recipe) -> Recipe:
    """The same steps on what the package brings along."""
    plan, calibration = recipe.plan, recipe.calibration
    if isinstance(plan, EvaluationPlan):
        missing = [task for task in expand(plan.tasks)[0] if not (recipes.smoke_data() / f"{task}.jsonl").is_file()]
        if missing:
            raise CatsError(
                f"--smoke has no documents for {', '.join(missing)}; it can run recipes whose tasks are among "
                f"{', '.join(TASK_SETS['paper8'])}."
            )
    expected = recipe.expected
    if isinstance(plan, BenchPlan):
        short = {tokens: 3 + i for i, tokens in enumerate(plan.tokens)}
        plan = replace(plan, rounds=1, tokens=tuple(short.values()))
        expected = tuple(replace(e, tokens=e.tokens and short[e.tokens]) for e in expected)
    if isinstance(plan, FinetuningPlan):
        text = str(bundled.calibration_text()) if plan.instructions is None else None
        plan = replace(
            plan, data=text, text_column="text", dataset_config=None, steps=2, epochs=None, learning_rate=1e-3,
            seq_length=64, batch_size=4, eval_every=1, heldout_samples=8,
        )  # fmt: skip
    if calibration is not None:
        calibration = recipes.Calibration(str(bundled.calibration_text()), samples=8, seq_length=128, seed=0)
    model = None if recipe.model is None else str(bundled.model_path())
    return replace(
        recipe,
        plan=plan,
        model=model,
        revision=None,
        dtype="float32",
        calibration=calibration,
        expected=expected,
    )


def check(recipe: Recipe) -> None:
    """Refuse, before any work, numbers that the recipe will not measure.

    Raises:
        CatsError: an unknown method, or an expected number of a variant or task that is not run.
    """
    plan = recipe.plan
    if isinstance(plan, FinetuningPlan):
        reproduce_finetuning.check(recipe.name, plan)
    if not isinstance(plan, EvaluationPlan):
        return
    for name in plan.methods:
        try:
            method(name)
        except CatsError as error:
            raise CatsError(f"the recipe {recipe.name}: {error}") from error
    variants = {"dense"}
    for name in plan.methods:
        variants |= {f"{name} k={k:g}" for k in plan.sparsities} if method(name).takes_sparsity else {name}
    tasks = {*expand(plan.tasks)[0], *expand(plan.tasks)[1]}
    for item in recipe.expected:
        for what, value, known in (("variant", item.variant, variants), ("task", item.task, tasks)):
            if value not in known:
                raise CatsError(
                    f"the recipe {recipe.name} expects a number of the {what} {value}, which it does not run; it has "
                    f"{', '.join(sorted(known))}."
                )


def _summary(recipe: Recipe, found: list[Comparison], smoke: bool) -> dict[str, Any]:
    return {
        "recipe": recipe.name,
        "title": recipe.title,
        "model": recipe.model,
        "smoke": smoke,
        "machine": machine.facts(),
        "numbers": [
            {
                "what": item.expected.label,
                "expected": item.expected.value,
                "measured": item.measured,
                "stderr": item.stderr,
                # of another model's number it would mean nothing
                "difference": None if smoke else item.difference,
                "source": item.expected.source,
            }
            for item in found
        ],
    }


def _write(out: Path, recipe: Recipe, measured: dict[str, Any], summary: dict[str, Any]) -> None:
    """The comparison, the results in full, and a report of them if what draws it is installed."""
    write_json(out / "comparison.json", summary, force=True)
    files = [out / _PROFILE] if (out / _PROFILE).is_file() else []
    for name in ("result", "bench", "training"):
        if name in measured:
            write_json(out / f"{name}.json", measured[name], force=True)
            files.append(out / f"{name}.json")
    try:
        require_extra()
    except MissingExtraError as error:
        show(f"No report.html: {error}")
        return
    with write_file(out / "report.html", force=True) as temporary:
        temporary.write_text(page.render_page(report.read(files)), encoding="utf-8")


def _list() -> None:
    rows = table("recipe", "what it reproduces")
    rows.columns[1].justify = "left"
    for name in recipes.names():
        rows.add_row(name, recipes.find(name).title)
    show(rows)


def _show(recipe: Recipe, found: list[Comparison], smoke: bool) -> None:
    show(f"{recipe.title}\n{recipe.about}\n")
    if smoke:
        what = "a tiny MLP" if recipe.model is None else f"the bundled model and a few documents, not {recipe.model}"
        show(f"Smoke run on {what}: the numbers only show that every step runs, and are not to be compared.\n")
    rows = table("number", "published", "measured", "± stderr", "difference")
    for item in found:
        difference = None if smoke else item.difference
        rows.add_row(
            item.expected.label,
            _number(item.expected.value),
            _number(item.measured),
            _number(item.stderr),
            "-" if difference is None else f"{difference:+.4g}",
        )
    show(rows)
    for source in dict.fromkeys(item.expected.source for item in found):
        show(f"published: {source}")
    facts = machine.facts()
    # benchmarks run on the CPU
    place = facts["gpus"][0] if facts["gpus"] and not isinstance(recipe.plan, BenchPlan) else facts["cpu"]
    show(f"measured: on {place}, cats-llm {facts['versions']['cats-llm']}")


def _number(value: float | tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    parts = value if isinstance(value, tuple) else (value,)
    return " to ".join(f"{part:.4f}" if abs(part) < 1 else f"{part:.4g}" for part in parts)
