"""What fine-tuning recovers: dense, CATS at several sparsities, and ReLU, with the same steps on the same text.

    PYTHONPATH=src python benchmarks/finetune.py --out results --data TEXT [TEXT ...]

chooses a learning rate for each method and trains it with this rate and with the paper's, on the bundled model. TEXT is
a .txt or .txt.xz file, documents separated by a line `<|endoftext|>`. It needs PyTorch, transformers, accelerate and
peft, nothing built.

Any other set of runs is named by --group: every combination of --methods, --parameters, --losses, --criteria, --rates
and --seeds is one. The group `search` is for learning rates, on sequences set aside from the training text; in other
groups the rate is, by default, the one that did best there. Each run is a file in OUT/runs; what is there already is
not run again, so that runs can be spread over processes (--only, --share), and each process goes on where it was
stopped. --summarise makes OUT/finetune.json, OUT/finetune.md and a figure of all that is there.

--prepare FILE makes token ids of all texts once, for --tokens FILE.
"""

import argparse
import json
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import transformers
from finetune_runs import SEARCH, Bench, Run
from finetune_summary import summarise
from finetune_tokens import add_options, prepare, read_tokens

from cats_llm import bundled
from cats_llm.errors import CatsError
from cats_llm.loading import default_device, load_tokenizer
from cats_llm.outputs import write_json
from cats_llm.training.config import LOSSES, PARAMETERS, SCHEDULES

METHODS = ("dense", "cats-0.5", "cats-0.7", "cats-0.9", "relu")
PAPER_RATE = 1e-5
CHOSEN = "chosen"


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--model", default=str(bundled.model_path()), help="a folder; default: the bundled model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base model")
    parser.add_argument("--tokens", type=Path, help="a file of --prepare. Default: it is made in OUT of --data")
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="only write the token ids")
    add_options(parser)
    which = parser.add_argument_group("which runs")
    which.add_argument("--group", help=f"{SEARCH!r}, or any other name. Default: the whole comparison, in three groups")
    which.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help="dense, cats-0.5, ..., relu")
    which.add_argument("--parameters", nargs="+", choices=PARAMETERS, default=["lora"])
    which.add_argument("--losses", nargs="+", choices=LOSSES, default=["cross-entropy"])
    which.add_argument("--criteria", nargs="+", default=["cats"], help="that CATS's thresholds come from")
    which.add_argument("--rates", nargs="+", help=f"learning rates, or {CHOSEN}, the default outside {SEARCH!r}")
    which.add_argument("--schedule", choices=SCHEDULES, default="constant", help="of the learning rate")
    which.add_argument("--warmup", type=float, default=0.0, help="share of the steps in which it rises")
    which.add_argument("--steps", type=int, default=80)
    which.add_argument("--minutes", type=float, help="in place of --steps: so many as fit into it, by timing a few")
    which.add_argument("--seeds", type=int, nargs="+", default=[0])
    which.add_argument("--only", nargs="+", metavar="PATTERN", help="of these runs those whose names fit, as '*relu*'")
    which.add_argument("--share", metavar="I/N", help="of these runs every N-th, from the I-th on (0/2, 1/2)")
    which.add_argument("--list", action="store_true", help="only print the names")
    which.add_argument("--summarise", action="store_true", help="only merge what is in OUT")
    how = parser.add_argument_group("how they are trained and measured")
    how.add_argument("--batch-size", type=int, default=6)
    how.add_argument("--micro-batch", type=int, help="default: the batch")
    how.add_argument("--rank", type=int, default=4, help="of LoRA; alpha is a quarter of it, as in the paper")
    how.add_argument("--weight-decay", type=float, default=0.01)
    how.add_argument("--eval-every", type=int, help="default: an eighth of the steps")
    how.add_argument("--curve", metavar="NAME", help="the text measured at intervals. Default: the first")
    how.add_argument("--heldout-samples", type=int, default=48, help="sequences of it that are")
    how.add_argument("--eval-batch", type=int, default=16, help="sequences measured at a time")
    how.add_argument("--keep", action="store_true", help="keep the trained models in OUT/models")
    return parser.parse_args()


class Comparison:
    """All runs that were asked for, and their files."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.perf_counter()
        self.folder = args.out / "runs"
        self.folder.mkdir(parents=True, exist_ok=True)
        # results are for others: no path of this machine
        self.command = shlex.join(["python", *(Path(a).name if Path(a).exists() else a for a in sys.argv)])

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{time.perf_counter() - self.start:7.1f} s] {text}", flush=True)

    def everything(self) -> None:
        """Run what is not there yet, then merge."""
        groups = list(self.groups())
        if self.args.list:
            print("\n".join(run.name for group in groups for run in self.chosen_of(group)))
            return
        bench = None
        for group in groups:
            for run in self.chosen_of(group):
                if self.file(run).exists():
                    self.say(f"{run.name} is there")
                    continue
                bench = bench or self.bench()
                self.one(bench, run)
        if not self.args.share and not self.args.only:  # others may still be running
            summarise(self.args.out)

    def bench(self) -> Bench:
        """The model and the texts, and the dense model measured, if no other process has done it."""
        args = self.args
        file = args.tokens or args.out / "tokens.safetensors"
        if not file.exists() and args.tokens is None:
            prepare(file, args, load_tokenizer(args.model))
        tokens = read_tokens(file)
        args.curve = args.curve or next(iter(tokens.texts))
        if args.curve not in tokens.texts:
            raise CatsError(f"--curve {args.curve}: the texts are {', '.join(tokens.texts)}.")
        bench = Bench(args, tokens)
        self.say(f"{Path(args.model).name}, {tokens.record['tokens']} tokens")
        base = args.out / "base.json"
        if not base.exists():
            record = {"model": Path(args.model).name, "dtype": args.dtype, "data": tokens.record}
            write_json(base, record | bench.base(), force=True)
        return bench

    def one(self, bench: Bench, run: Run) -> None:
        """Run it, write its file and say what came out."""
        began = time.perf_counter()
        log = bench.run(run, self.args.out / "models" if self.args.keep else None)
        log |= {"model": Path(self.args.model).name, "command": self.command}
        write_json(self.file(run), log, force=True)
        ends = {"validation": log["validation"]} | log.get("after", {})
        ended = ", ".join(f"{name} {value['perplexity'] or float('inf'):.3f}" for name, value in ends.items())
        self.say(
            f"{run.name}: {log['settings']['steps']} steps in {log['training_seconds']:.1f} s "
            f"({log['tokens_per_second']:,} tokens a second), {time.perf_counter() - began:.0f} s in all; "
            f"perplexity: {ended}"
        )

    def file(self, run: Run) -> Path:
        """Where its results are kept."""
        return self.folder / f"{run.name}.json"

    def groups(self) -> Iterator[list[Run]]:
        """What was asked for, each part when the ones before it are done."""
        args = self.args
        if args.group is not None:
            yield list(self.runs(args.group, args.rates, args.steps))
            return
        short = max(1, args.steps // 4)
        yield list(self.runs(SEARCH, args.rates, short))
        yield list(self.runs("chosen rate", [CHOSEN], args.steps))
        # so small a rate moves nothing in so few steps; a quarter of them shows it
        yield list(self.runs("paper's rate", [PAPER_RATE], short))

    def runs(self, group: str, rates: list[Any] | None, steps: int) -> Iterator[Run]:
        """Every combination; the best learning rates are found when a run is due."""
        args = self.args
        rates = rates or ([3e-4, 1e-3, 3e-3, 1e-2] if group == SEARCH else [CHOSEN])
        timed = {"steps": None, "minutes": args.minutes} if args.minutes else {"steps": steps, "minutes": None}
        for method, parameters, loss, criterion, rate, seed in product(
            args.methods, args.parameters, args.losses, args.criteria, rates, args.seeds
        ):
            kind, _, k = method.partition("-")
            if kind not in ("dense", "cats", "relu") or (kind == "cats") != bool(k):
                raise CatsError(f"--methods {method}: it is dense, relu, or cats with a sparsity, as cats-0.5.")
            if kind != "cats" and criterion != args.criteria[0]:
                continue
            yield Run(
                group=group,
                method=kind,
                sparsity=float(k) if k else None,
                parameters=parameters,
                loss=loss,
                criterion=criterion if kind == "cats" else "cats",
                learning_rate=0.0 if rate == CHOSEN else float(rate),
                schedule=args.schedule,
                warmup=args.warmup,
                seed=seed,
                **timed,
            )

    def chosen_of(self, group: list[Run]) -> Iterator[Run]:
        """Those of a group that --only and --share leave, with their learning rates."""
        args = self.args
        first, number = map(int, args.share.split("/")) if args.share else (0, 1)
        for run in group[first::number]:
            settled = run if run.learning_rate else replace(run, learning_rate=self.best_rate(run))
            if not args.only or any(fnmatchcase(settled.name, pattern) for pattern in args.only):
                yield settled

    def best_rate(self, run: Run) -> float:
        """The learning rate that did best for such a run in the group of searching.

        Raises:
            CatsError: none was tried.
        """
        tried: dict[float, list[float]] = {}
        for file in sorted(self.folder.glob(f"{SEARCH}--*.json")):
            log = json.loads(file.read_text(encoding="utf-8"))
            other = Run(**log["run"])
            fields = ("method", "sparsity", "parameters", "loss", "criterion")
            if all(getattr(other, field) == getattr(run, field) for field in fields):
                perplexity = log["validation"]["perplexity"]
                tried.setdefault(other.learning_rate, []).append(
                    float("inf") if perplexity is None else float(perplexity)
                )
        if not tried:
            raise CatsError(
                f"no learning rate was tried for {run.title}, {run.parameters}, {run.loss}; run --group {SEARCH} "
                "first, or pass --rates."
            )
        return min(tried, key=lambda rate: sum(tried[rate]) / len(tried[rate]))


def main() -> None:
    """What was asked for."""
    args = options()
    if args.prepare:
        args.prepare.resolve().parent.mkdir(parents=True, exist_ok=True)
        print(prepare(args.prepare, args, load_tokenizer(args.model)).record)
    elif args.summarise:
        summarise(args.out)
    else:
        Comparison(args).everything()


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of names that transformers 5.23 changed
    try:
        main()
    except CatsError as error:
        sys.exit(f"error: {error}")
