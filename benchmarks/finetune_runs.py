"""One run of fine-tuning: what it is, and how it is trained and measured."""

import copy
import gc
import math
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from finetune_tokens import Tokens, Windows

from cats_llm.benchmark import machine
from cats_llm.calibration.criteria.search import find_config
from cats_llm.calibration.criteria.target import SparsityTarget
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.evaluation.scoring import exp, score_sequences
from cats_llm.loading import load_model, load_tokenizer
from cats_llm.outputs import write_folder
from cats_llm.training.config import TrainingConfig
from cats_llm.training.data import Data
from cats_llm.training.methods import apply_method
from cats_llm.training.parameters import make_teacher, trained_model
from cats_llm.training.trainer import train, trainer_arguments

SEARCH = "search"
"""The group of runs that learning rates are chosen by; they see no text that is reported on."""
# steps that warm the machine up, and that are timed
_WARM, _TIMED = 4, 12
# entries of the log of steps, and places of nats, that are kept
_ENTRIES, _PLACES = 400, 4


@dataclass(frozen=True)
class Run:
    """What is trained how.

    Attributes:
        group: what runs are shown together under.
        criterion: that thresholds come from.
        warmup: share of the steps in which the learning rate rises.
        steps, minutes: one of the two.
    """

    group: str
    method: str
    sparsity: float | None
    parameters: str
    loss: str
    criterion: str
    learning_rate: float
    schedule: str
    warmup: float
    steps: int | None
    minutes: float | None
    seed: int

    @property
    def title(self) -> str:
        """The method and its sparsity."""
        return self.method if self.sparsity is None else f"{self.method} k={self.sparsity:g}"

    @property
    def name(self) -> str:
        """Of its file."""
        words = [
            self.group.replace(" ", "_").replace("'", ""),
            self.method if self.sparsity is None else f"{self.method}{self.sparsity:g}",
            *([self.criterion] if self.method == "cats" and self.criterion != "cats" else []),
            self.parameters,
            self.loss,
            f"lr{self.learning_rate:g}",
            self.schedule,
            *([f"warmup{self.warmup:g}"] if self.warmup else []),
            f"{self.steps}steps" if self.minutes is None else f"{self.minutes:g}min",
            f"seed{self.seed}",
        ]
        return "--".join(words)


class Bench:
    """The model and the texts that all runs share."""

    def __init__(self, args: Any, tokens: Tokens) -> None:
        self.args, self.tokens = args, tokens
        self.bf16 = args.dtype == "bfloat16"
        self.model = load_model(args.model, args.dtype, args.device)
        self.tokenizer = load_tokenizer(args.model)
        self.configs: dict[tuple[str, float], CatsConfig] = {}
        self.measured: dict[tuple[Any, ...], dict[str, Any]] = {}

    def base(self) -> dict[str, Any]:
        """The dense model before any step."""
        return {"texts": self.measure(self.model), "machine": machine.facts()}

    def run(self, run: Run, models: Path | None = None) -> dict[str, Any]:
        """Train and measure.

        Args:
            run: what.
            models: a folder that the trained model is kept in.

        Returns:
            The log of the training, and what was measured before and after.
        """
        searching = run.group == SEARCH
        measured = self.tokens.validation if searching else self.curve
        before = None if searching else self.before(run)
        config = self.settings(run, run.steps if run.steps is not None else self.steps_in(run))
        with tempfile.TemporaryDirectory() as folder:
            log = self.train(run, config, Path(folder), measured, evaluates=not searching)
            model = trained_model(self.form(run), config, Path(folder))
        if config.parameters == "lora":
            model = model.merge_and_unload()
        model.eval()
        log |= {"name": run.title, "group": run.group, "run": asdict(run)}
        log["validation"] = self.perplexity(model, self.tokens.validation)
        if not searching:
            log |= {"before": before, "after": self.measure(model)}
        if models is not None:
            models.mkdir(parents=True, exist_ok=True)
            with write_folder(models / run.name, force=True) as place:
                model.save_pretrained(place)
                self.tokenizer.save_pretrained(place)
        del model
        gc.collect()
        return log

    def train(
        self, run: Run, config: TrainingConfig, folder: Path, measured: Windows, evaluates: bool
    ) -> dict[str, Any]:
        """The log of a training; what was trained is in the folder."""
        model = copy.deepcopy(self.model)
        teacher = make_teacher(model, config) if config.loss == "distillation" else None
        apply_method(model, run.method, self.thresholds(run))
        arguments = trainer_arguments(config, folder, self.args.device)
        arguments.eval_on_start = evaluates
        record = {"train": ", ".join(self.tokens.record["train"]), "heldout": self.heldout(run)}
        log = train(model, Data(self.tokens.train, measured, [], record), config, arguments, teacher=teacher)
        tokens = config.steps * config.batch_size * self.tokens.length
        log["device"] = self.args.device
        log["tokens"] = tokens
        log["tokens_per_second"] = round(tokens / log["training_seconds"])
        log["machine"] = machine.facts()
        every = math.ceil(len(log["steps"]) / _ENTRIES)
        log["steps"] = log["steps"][every - 1 :: every]
        return log

    def settings(self, run: Run, steps: int) -> TrainingConfig:
        """Of a run of so many steps."""
        args = self.args
        return TrainingConfig(
            method=run.method,
            loss=run.loss,
            parameters=run.parameters,
            steps=steps,
            learning_rate=run.learning_rate,
            schedule=run.schedule,
            warmup_steps=round(run.warmup * steps),
            weight_decay=args.weight_decay,
            batch_size=args.batch_size,
            micro_batch=min(args.micro_batch or args.batch_size, args.batch_size),
            rank=args.rank,
            alpha=max(1, args.rank // 4),
            seed=run.seed,
            eval_every=steps if run.group == SEARCH else args.eval_every or max(1, steps // 8),
            bf16=self.bf16,
        )

    def steps_in(self, run: Run) -> int:
        """How many steps fit into a run's minutes, by timing some that are thrown away."""
        one = Windows(self.tokens.validation.ids[:1])
        for steps in (_WARM, _TIMED):
            config = replace(self.settings(run, steps), eval_every=steps)
            with tempfile.TemporaryDirectory() as folder:
                log = self.train(run, config, Path(folder), one, evaluates=False)
        assert run.minutes is not None
        return max(1, int(run.minutes * 60 / (log["training_seconds"] / _TIMED)))

    def before(self, run: Run) -> dict[str, Any]:
        """What `measure` says before any step, once for all runs that begin alike."""
        key = (run.method, run.sparsity, run.criterion)
        if key not in self.measured:
            self.measured[key] = self.measure(self.form(run))
        return self.measured[key]

    def form(self, run: Run) -> Any:
        """A copy of the model in the form of a run's method, in eval mode."""
        model = copy.deepcopy(self.model)
        apply_method(model, run.method, self.thresholds(run))
        return model.eval()

    def thresholds(self, run: Run) -> CatsConfig | None:
        """Fitted to what was set aside, once."""
        if run.method != "cats":
            return None
        assert run.sparsity is not None
        key = (run.criterion, run.sparsity)
        if key not in self.configs:
            target = SparsityTarget(sparsity=run.sparsity, criterion=run.criterion)
            text = [part.long() for part in self.tokens.calibration.ids.split(4)]
            config = find_config(self.model, text, target, data="set aside from the training text").config
            # results are for others: no path of this machine
            config.calibration["model"] = Path(self.args.model).name
            self.configs[key] = config
        return self.configs[key]

    @property
    def curve(self) -> Windows:
        """What is measured at intervals."""
        return self.tokens.texts[self.args.curve].spread(self.args.heldout_samples)

    def heldout(self, run: Run) -> str:
        """What that is called."""
        return "set aside from the training text" if run.group == SEARCH else self.args.curve

    def measure(self, model: Any) -> dict[str, Any]:
        """The perplexity on each text, with the nats a token of each window, for paired tests."""
        return {name: self.perplexity(model, windows) for name, windows in self.tokens.texts.items()}

    def perplexity(self, model: Any, windows: Windows) -> dict[str, Any]:
        """On some windows."""
        scored = [score_sequences(model, part.long()) for part in windows.ids.split(self.args.eval_batch)]
        nll = torch.cat([s.nll / s.tokens for s in scored]).tolist()
        mean = sum(nll) / len(nll)
        return {
            "perplexity": exp(mean) if math.isfinite(exp(mean)) else None,
            "nll": [round(value, _PLACES) if math.isfinite(value) else None for value in nll],
        }
