"""What fine-tuning recovers: dense, CATS at 50, 70 and 90 %, and ReLU, with the same steps on the same text.

    PYTHONPATH=src python benchmarks/finetune.py --out results --data TEXT [TEXT ...]

TEXT is a .txt or .txt.xz file, documents separated by a line `<|endoftext|>`. It needs PyTorch, transformers,
accelerate and peft, nothing built. Everything measured is in OUT/finetune.json after each run, and in OUT/finetune.md;
a figure is drawn if matplotlib is there.

The learning rate is chosen for each method from the same few, by the perplexity after a quarter of the steps on the
first of the held-out books; results are reported on the others. No model has seen any of them. Every method also runs a
quarter of the steps with the paper's rate.
"""

import argparse
import copy
import lzma
import math
import random
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers

from cats_llm import bundled, formats
from cats_llm.benchmark import machine
from cats_llm.calibration.calibrate import calibrate
from cats_llm.calibration.profile import Profile
from cats_llm.errors import CatsError
from cats_llm.evaluation.paired import paired_difference
from cats_llm.evaluation.scoring import exp, score_sequences
from cats_llm.evaluation.task import Metric
from cats_llm.loading import default_device, load_model, load_tokenizer
from cats_llm.outputs import write_file, write_json
from cats_llm.report.training import Point, TrainingRun, curves, read_training
from cats_llm.text import batched, load_sequences, read_documents, shuffled, token_sequences
from cats_llm.training.config import TrainingConfig
from cats_llm.training.data import Data, Example
from cats_llm.training.methods import apply_method
from cats_llm.training.trainer import train, trainer_arguments

VARIANTS: tuple[tuple[str, float | None], ...] = (
    ("dense", None), ("cats", 0.5), ("cats", 0.7), ("cats", 0.9), ("relu", None),
)  # fmt: skip
PAPER_RATE = 1e-5
# characters of a document that stay together: many books in few steps
_PIECE = 8_000
# words in a row that two texts may not share
_RUN = 13


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="training texts, .txt or .txt.xz")
    parser.add_argument("--model", default=str(bundled.model_path()))
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--micro-batch", type=int, help="default: the batch")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--eval-every", type=int, help="default: an eighth of the steps")
    parser.add_argument("--heldout-samples", type=int, default=48, help="sequences measured at intervals")
    parser.add_argument("--final-samples", type=int, default=192, help="sequences measured at the end, for the tests")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2], help="learning rates to try"
    )
    parser.add_argument("--rank", type=int, default=4, help="of LoRA; alpha is a quarter of it, as in the paper")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def documents(files: list[Path]) -> Iterator[str]:
    """The documents of all files."""
    for path in files:
        if path.suffix != ".xz":
            yield from read_documents(str(path))
            continue
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / path.stem
            text.write_bytes(lzma.decompress(path.read_bytes()))
            yield from read_documents(str(text))


def word_runs(text: str) -> set[int]:
    """The runs of so many words, by hash."""
    words = text.lower().split()
    return {hash(tuple(words[i : i + _RUN])) for i in range(len(words) - _RUN + 1)}


def pieces(document: str) -> Iterator[str]:
    """Parts of a document, ending where a paragraph does."""
    part: list[str] = []
    for paragraph in document.splitlines():
        part.append(paragraph)
        if sum(map(len, part)) >= _PIECE:
            yield "\n".join(part)
            part = []
    if part:
        yield "\n".join(part)


class Texts:
    """Sequences for training, for choosing a rate, and for reporting, which share no document."""

    def __init__(self, args: argparse.Namespace, tokenizer: Any) -> None:
        books = list(read_documents(str(bundled.heldout_text())))
        known = word_runs(" ".join(books))
        training: list[str] = []
        self.left_out = self.documents = 0
        for document in documents(args.data):
            if known & word_runs(document):
                self.left_out += 1
                continue
            self.documents += 1
            training += pieces(document)
        random.Random(args.seed).shuffle(training)
        length, needed = args.seq_length, args.steps * args.batch_size

        def sequences(texts: list[str], count: int, seed: int | None = None) -> list[Example]:
            cut: Iterable[torch.Tensor] = token_sequences(texts, tokenizer, length)
            drawn = islice(cut if seed is None else shuffled(cut, seed), count)
            return [{"input_ids": ids, "labels": ids} for ids in drawn]

        self.train = sequences(training, needed)
        self.validation = sequences(books[:1], args.heldout_samples, args.seed)
        self.final = sequences(books[1:], args.final_samples, args.seed)
        self.heldout = self.final[: args.heldout_samples]
        if len(self.train) < needed:
            raise CatsError(f"the training texts hold {len(self.train)} sequences of the {needed} that the steps need.")

    def record(self) -> dict[str, Any]:
        """What was used, for the result file."""
        tokens = {
            name: sum(len(e["input_ids"]) for e in getattr(self, name)) for name in ("train", "validation", "final")
        }
        return {
            "documents": self.documents,
            f"documents left out, since they share {_RUN} words in a row with the held-out text": self.left_out,
            "tokens": tokens,
        }


class Benchmark:
    """All runs, and the result file after each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.perf_counter()
        args.out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = load_tokenizer(args.model)
        self.model = load_model(args.model, "float32", args.device)
        self.texts = Texts(args, self.tokenizer)
        sequences = load_sequences(
            str(bundled.calibration_text()), self.tokenizer, args.seq_length, samples=256, seed=0
        )
        profile = calibrate(self.model, batched(sequences, 8), "bundled calibration.txt")
        # results are for others: no path of this machine
        self.profile = Profile(profile.layers, profile.record | {"model": Path(args.model).name})
        self.scores: dict[tuple[str, str], list[float]] = {}
        self.results: dict[str, Any] = {
            "format": formats.FINETUNING_RUNS,
            "version": formats.FINETUNING_VERSION,
            "model": Path(args.model).name,
            "command": shlex.join(["python", *(Path(a).name if Path(a).exists() else a for a in sys.argv)]),
            "machine": machine.facts(),
            "data": self.texts.record(),
            "search": [],
            "runs": [],
        }
        self.say(f"{self.texts.documents} documents, {self.texts.left_out} left out")

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{time.perf_counter() - self.start:7.1f} s] {text}", flush=True)

    def run(self, method: str, k: float | None, rate: float, steps: int, group: str | None) -> dict[str, Any]:
        """One run. Without a group it is measured on the validation text, at its end."""
        args = self.args
        model = copy.deepcopy(self.model)
        apply_method(model, method, None if k is None else self.profile.config(k))
        config = TrainingConfig(
            method=method,
            steps=steps,
            learning_rate=rate,
            batch_size=args.batch_size,
            micro_batch=args.micro_batch or args.batch_size,
            rank=args.rank,
            alpha=max(1, args.rank // 4),
            seed=args.seed,
            eval_every=(args.eval_every or max(1, args.steps // 8)) if group else steps,
        )
        record = {
            "train": "the training texts",
            "heldout": f"bundled heldout.txt, {'all but the' if group else 'the'} first book",
        }
        measured = self.texts.heldout if group else self.texts.validation
        with tempfile.TemporaryDirectory() as folder:
            arguments = trainer_arguments(config, Path(folder), args.device)
            arguments.eval_on_start = group is not None
            log = train(model, Data(self.texts.train, measured, [], record), config, arguments)
        if group:
            log["group"] = group
            model.eval()
            windows = torch.stack([example["input_ids"] for example in self.texts.final])
            scored = [score_sequences(model, part) for part in windows.split(16)]
            nll = torch.cat([s.nll / s.tokens for s in scored]).tolist()
            self.scores[group, log["name"]] = nll
            log["final"] = {"perplexity": exp(sum(nll) / len(nll)), "sequences": len(nll)}
        end = log["evaluations"][-1]["perplexity"]
        self.say(f"{log['name']}, rate {rate:g}, {steps} steps in {log['seconds']:.0f} s: perplexity {end}")
        return log

    def everything(self) -> None:
        """Search, then the runs; the result file is written after each."""
        args = self.args
        short = max(1, args.steps // 4)
        for method, k in VARIANTS:
            tried = {}
            for rate in args.rates:
                log = self.run(method, k, rate, short, None)
                perplexity = log["evaluations"][-1]["perplexity"]
                tried[rate] = math.inf if perplexity is None else perplexity
                self.results["search"].append(
                    {"name": log["name"], "learning_rate": rate, "steps": short, "validation_perplexity": perplexity}
                )
                if len(self.results["search"]) == 1:
                    steps = len(VARIANTS) * (len(args.rates) * short + args.steps + short)
                    self.say(
                        f"about {steps * log['seconds'] / short / 60:.0f} minutes for {steps} steps, if all go on so"
                    )
            best = min(tried, key=lambda rate: tried[rate])
            # so small a rate moves nothing in so few steps; a quarter of them shows it
            for group, rate, steps in (("chosen rate", best, args.steps), ("paper's rate", PAPER_RATE, short)):
                self.results["runs"].append(self.run(method, k, rate, steps, group))
                self.save()
        self.results["comparisons"] = self.comparisons()
        self.results["seconds"] = round(time.perf_counter() - self.start)
        self.save()

    def comparisons(self) -> list[dict[str, Any]]:
        """Each method's final perplexity beside ReLU's and the dense model's, paired by sequence."""
        comparisons = []
        for (group, name), scores in self.scores.items():
            for other in ("relu", "dense"):
                if name != other:
                    difference = paired_difference(_metric(scores), _metric(self.scores[group, other]))
                    test = vars(difference) if difference else {}
                    comparisons.append({"group": group, "name": name, "to": other, **test})
        return comparisons

    def save(self) -> None:
        """Write the result, the table and, if it can be drawn, the figure."""
        out = self.args.out
        write_json(out / "finetune.json", self.results, force=True)
        with write_file(out / "finetune.md", force=True) as file:
            file.write_text(table(self.results), encoding="utf-8")
        try:
            from cats_llm.report.style import style
        except ImportError:
            return
        with style(), write_file(out / "finetune.svg", force=True) as file:
            curves(read_training(self.results, out / "finetune.json")).savefig(file, metadata={"Date": None})


def _metric(scores: list[float]) -> Metric:
    value = exp(sum(scores) / len(scores))
    weights = [1.0] * len(scores)
    return Metric(
        "perplexity", value if math.isfinite(value) else None, None, False, len(scores), "perplexity", scores, weights
    )


def _steps_to(run: TrainingRun, perplexity: float | None) -> str:
    """The first measurement at which a run is as good as that."""
    reached = [p.step for p in run.points if None not in (p.perplexity, perplexity) and p.perplexity <= perplexity]
    return str(reached[0]) if reached else "never"


def table(results: dict[str, Any]) -> str:
    """The ends of all runs, in Markdown."""
    runs = read_training(results, Path("finetune.json"))
    tests = {(c["group"], c["name"]): c for c in results.get("comparisons", []) if c["to"] == "relu"}
    logs = {(log["group"], log["name"]): log for log in results["runs"]}
    lines = [
        "| setting | learning rate | gate sparsity after | perplexity before | after | after, on more text "
        "| its difference to ReLU, 95 % interval | steps to where ReLU ends |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for run in runs:
        relu = next((r for r in runs if r.group == run.group and r.name == "relu"), None)
        first, last = run.points[0], run.points[-1]
        test = tests.get((run.group, run.name), {})
        difference = f"{test['value']:+.3f} ({test['low']:+.3f} to {test['high']:+.3f})" if "value" in test else "–"
        final = logs[run.group, run.name]["final"]["perplexity"]
        lines.append(
            f"| {run.name}, {run.group} | {run.learning_rate:g} | {_percent(last)} | {_number(first.perplexity)} "
            f"| {_number(last.perplexity)} | {_number(final)} | {difference} "
            f"| {'–' if relu is None else _steps_to(run, relu.points[-1].perplexity)} |"
        )
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _percent(point: Point) -> str:
    return "–" if point.gate is None else f"{100 * point.gate:.1f} %"


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of names that transformers 5.23 changed
    try:
        Benchmark(options()).everything()
    except CatsError as error:
        sys.exit(f"error: {error}")
