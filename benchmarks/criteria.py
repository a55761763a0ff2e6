"""What criteria keep of a model's quality at equal sparsity: perplexity and tasks, several draws of calibration text.

    PYTHONPATH=src python benchmarks/criteria.py --calibration books.txt --out results

Every config that is fitted is kept in OUT/configs, and a second run with other tasks starts from them. Results are in
OUT/criteria.json, in the format of `cats eval`, after each draw: `cats report OUT/criteria.json` draws them.
"""

import argparse
import json
import random
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cats_llm import bundled
from cats_llm.benchmark import machine
from cats_llm.calibration.calibrate import calibrate
from cats_llm.calibration.criteria.distill import Distillation
from cats_llm.calibration.criteria.search import find_config
from cats_llm.calibration.criteria.target import SparsityTarget
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.layer_tensors import FILE, write_layer_tensors
from cats_llm.evaluation.cache import Cache
from cats_llm.evaluation.perplexity import PerplexityTask
from cats_llm.evaluation.run import run_evaluation
from cats_llm.evaluation.task import TaskOptions
from cats_llm.evaluation.variants import Variant, make_variants
from cats_llm.loading import load_model, load_tokenizer
from cats_llm.outputs import write_json
from cats_llm.text import batched, load_sequences

# what every draw of calibration text is used for, and what only draw 0 is
ALWAYS = (
    "cats",
    "moment+compensate+sequential",
    "moment+compensate+sequential+allocate",
    "moment+sequential+allocate+distill",
)
ONCE = ("chess", "norm", "moment", "cats+compensate", "cats+compensate+sequential", "norm+compensate+sequential")
BASELINES = ("relu", "teal", "teal-greedy", "wina")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(bundled.model_path()), help="default: the bundled one")
    parser.add_argument("--calibration", required=True, help="text that sequences are drawn from")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="default: the held-out books")
    parser.add_argument("--tasks", default="", help="of lm-eval, separated by commas")
    parser.add_argument("--data-dir", type=Path, help="the tasks' data")
    parser.add_argument("--limit", type=int, help="at most so many documents a task")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sparsity", default="0.5,0.7,0.9")
    parser.add_argument("--draws", default="0,1,2", help="of calibration text: their seeds")
    parser.add_argument("--samples", type=int, default=256, help="sequences a draw")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences a batch of calibration")
    parser.add_argument("--eval-batch-size", type=int, default=16)
    parser.add_argument("--windows", type=int, help="of each text; default: all")
    parser.add_argument("--distill-steps", type=int, default=Distillation().steps)
    parser.add_argument("--criteria", help="only these, separated by commas")
    parser.add_argument("--baselines", "--rivals", default=",".join(BASELINES), help="others' methods; '' for none")
    return parser.parse_args()


class Fits:
    """Configs by method, sparsity and draw, from OUT/configs or made."""

    def __init__(self, args: argparse.Namespace, model: Any, sequences: list[torch.Tensor]) -> None:
        self.args, self.model, self.sequences = args, model, sequences
        self.profiles: dict[int, Any] = {}

    def batches(self, draw: int) -> list[torch.Tensor]:
        """The sequences of a draw."""
        drawn = random.Random(draw).sample(self.sequences, self.args.samples)
        return list(batched(drawn, self.args.batch_size))

    def config(self, name: str, k: float, draw: int) -> CatsConfig:
        """Of a criterion; seconds of fitting go into its record."""
        folder = self.args.out / "configs" / f"{name}-{k:g}-{draw}"
        if folder.is_dir():
            config = CatsConfig.from_dict(json.loads((folder / "config.json").read_text()))
            config.load_vectors(folder / FILE)
            return config
        begun = time.perf_counter()
        target = SparsityTarget(sparsity=k, criterion=name, distill_steps=self.args.distill_steps)
        data = f"{self.args.samples} sequences, draw {draw}"
        if target.profile_is_enough and draw not in self.profiles:
            self.profiles[draw] = calibrate(self.model, self.batches(draw), data=data)
        calibration = self.profiles[draw] if target.profile_is_enough else self.batches(draw)
        config = find_config(self.model, calibration, target, data=data).config
        # results are for others: no path of this machine
        facts = {"model": Path(self.args.model).name, "seconds": round(time.perf_counter() - begun, 1)}
        config.calibration = config.calibration | facts
        folder.mkdir(parents=True)
        write_json(folder / "config.json", config.to_dict())
        if config.vectors is not None:
            write_layer_tensors(folder, config.vectors)
        print(f"fitted {name} at {k:g}, draw {draw}: {config.calibration['seconds']} s", flush=True)
        return config


def against_cats(
    measure: Callable[[list[Variant]], dict[str, Any]], variants: list[Variant], k: float, draw: int
) -> list[dict[str, Any]]:
    """Paired differences to plain CATS at the same sparsity and draw, from what is measured already."""
    ending = f" k={k:g}{_of(draw)}"
    same = [v for v in variants if v.name.removesuffix(" (equal bytes)").endswith(ending)]
    plain = next((v for v in same if v.method == "cats"), None)
    if plain is None:
        return []
    others = [v for v in same if v is not plain]
    # differences are taken to the variant of this name
    result = measure([replace(plain, name="dense"), *others])
    keys = ("variant", "task", "metric", "value", "n", "difference")
    return [{"k": k, "draw": draw} | {key: row[key] for key in keys} for row in result["results"] if row["difference"]]


def _of(draw: int) -> str:
    return "" if draw == 0 else f", draw {draw}"


def main() -> None:
    """Fit, measure, and write after each draw."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_model(args.model, "float32", args.device)
    tokenizer = load_tokenizer(args.model)
    sequences = list(load_sequences(args.calibration, tokenizer, args.seq_length))
    print(f"{len(sequences)} sequences to draw from", flush=True)
    fits = Fits(args, model, sequences)
    texts = dict(pair.split("=", 1) for pair in args.text) or {"held-out books": str(bundled.heldout_text())}
    tasks: list[Any] = [
        PerplexityTask(source, name, args.seq_length, samples=args.windows) for name, source in texts.items()
    ]
    means: dict[str, Any] = {}
    if args.tasks:
        from cats_llm.evaluation.tasks import build_tasks

        lm_eval_tasks, means = build_tasks(args.tasks.split(","), args.data_dir, TaskOptions(args.limit))
        tasks += lm_eval_tasks
    ks = [float(k) for k in args.sparsity.split(",")]
    variants = [Variant("dense")]
    draws = [int(draw) for draw in args.draws.split(",")]
    for place, draw in enumerate(draws):
        names = ALWAYS if draw else (*ALWAYS[:1], *ONCE, *ALWAYS[1:])
        for name in args.criteria.split(",") if args.criteria else names:
            variants += [Variant(f"{name} k={k:g}{_of(draw)}", name, fits.config(name, k, draw)) for k in ks]
        if draw == 0 and args.baselines:
            baselines = make_variants(model, args.baselines.split(","), ks, batches=fits.batches(0), equal_bytes=True)
            variants += [v for v in baselines if v.name != "dense"]
            print("calibrated the baselines", flush=True)
        begun = time.perf_counter()

        def measure(variants: list[Variant]) -> dict[str, Any]:
            return run_evaluation(
                model,
                tokenizer,
                variants,
                tasks,
                name="bundled" if args.model == str(bundled.model_path()) else args.model,
                batch_size=args.eval_batch_size,
                cache=Cache(args.out / "cache"),
                means=means,
                command=shlex.join(["python", *sys.argv]),
            )

        result = measure(variants)
        measured = draws[: place + 1]
        result["against_cats"] = [row for d in measured for k in ks for row in against_cats(measure, variants, k, d)]
        result["machine"] = machine.facts()
        for task in result["tasks"]:
            task["data"] = Path(task["data"]).name
        write_json(args.out / "criteria.json", result, force=True)
        print(f"measured draw {draw}: {time.perf_counter() - begun:.0f} s", flush=True)
        for row in result["results"]:
            if row["metric"] == "perplexity" and row["difference"]:
                cost = row["value"] / (row["value"] - row["difference"]["value"]) - 1
                share = f"{row['sparsity']['model']:.4f} of linear weights skipped"
                print(f"{row['variant']:55s} {row['task']:16s} {cost:+8.2%} {share}")


if __name__ == "__main__":
    main()
