"""What methods keep of a model's quality: perplexity and tasks, at equal gate sparsity and at equal bytes.

    PYTHONPATH=src python benchmarks/quality.py --calibration books.txt --out results

Every cell of the comparison (a method at a sparsity, learned from one draw of one calibration text) is fitted and
measured by itself, so `--workers N` does N at a time, on all GPUs there are. What is fitted is kept in OUT/configs and
what is measured in OUT/cache, so the same command goes on where a stopped one ended, and a run with other tasks starts
from the configs. The result is OUT/quality.json, in the format of `cats eval`, with the comparisons to plain CATS;
`python benchmarks/quality_table.py OUT/quality.json` makes a table and a figure of it, `cats report` a page.
"""

import argparse
import multiprocessing
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quality_cells import Cell, Fits, plan

from cats_llm import bundled
from cats_llm.benchmark import machine
from cats_llm.calibration.criteria.distill import Distillation
from cats_llm.errors import CatsError, first_line
from cats_llm.evaluation.cache import Cache
from cats_llm.evaluation.perplexity import PerplexityTask
from cats_llm.evaluation.run import run_evaluation
from cats_llm.evaluation.task import Measurement, Task, TaskOptions
from cats_llm.evaluation.tasks import build_tasks
from cats_llm.evaluation.variants import Variant
from cats_llm.loading import load_model, load_tokenizer
from cats_llm.outputs import write_json

RESULT = "quality.json"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(bundled.model_path()), help="default: the bundled one")
    add("--dtype", default="float32", help="of fitting and measuring")
    add("--calibration", action="append", required=True, metavar="[NAME=]FILE[,FILE]", help="text that sequences are "
        "drawn from, of several files as many from each; repeatable, criteria are then fitted to each")  # fmt: skip
    add("--text", action="append", default=[], metavar="NAME=FILE", help="default: the held-out books")
    add("--tasks", default="", help="of lm-eval, separated by commas")
    add("--data-dir", type=Path, help="the tasks' data")
    add("--limit", type=int, help="at most so many documents a task")
    add("--out", type=Path, required=True)
    add("--device", default="cpu")
    add("--workers", type=int, default=1, help="processes; with CUDA they are dealt out to the GPUs")
    add("--sparsity", default="0.5,0.7,0.9")
    add("--draws", default="0,1,2", help="of calibration text: their seeds")
    add("--samples", type=int, default=256, help="sequences a draw")
    add("--seq-length", type=int, default=512, help="tokens a sequence of calibration")
    add("--window", type=int, help="tokens a window of the texts; default: those of a sequence of calibration")
    add("--batch-size", type=int, default=4, help="sequences a batch of calibration")
    add("--eval-batch-size", type=int, default=16, help="windows of a text at a time")
    add("--task-batch-size", type=int, help="sequences of a task at a time; default: that of the windows")
    add("--windows", type=int, help="of each text; default: all")
    add("--distill-steps", type=int, default=Distillation().steps)
    add("--criteria", help="these in every draw, separated by commas; '' for none. Default: all, few in later draws")
    add("--baselines", "--rivals", default="relu,teal,teal-greedy,wina", help="others' methods; '' for none")
    add("--equal", default="bytes", help="what baselines that skip inputs have in common with CATS: bytes, share, or "
        "both as bytes,share")  # fmt: skip
    add("--int8", action="store_true", help="the dense model with weights rounded to int8, simulated")
    add("--assemble", action="store_true", help="measure nothing, put together what is measured")
    return parser.parse_args(words)


class Text(PerplexityTask):
    """Perplexity of a text that is read once, however often it is measured."""

    def prepare(self, model: Any, tokenizer: Any) -> None:
        """Cut the text into windows."""
        if not hasattr(self, "windows"):
            super().prepare(model, tokenizer)


class Lab:
    """The model, the texts and the tasks of one process."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self.args = args
        self.model = load_model(args.model, args.dtype, device)
        self.tokenizer = load_tokenizer(args.model)
        self.fits = Fits(args, self.model, self.tokenizer)
        given = dict(pair.split("=", 1) for pair in args.text) or {"held-out books": str(bundled.heldout_text())}
        self.texts: list[Task] = [
            Text(file, name, args.window or args.seq_length, samples=args.windows) for name, file in given.items()
        ]
        names = args.tasks.split(",") if args.tasks else []
        self.tasks, self.means = build_tasks(names, args.data_dir, TaskOptions(args.limit))
        if len(names) > 1:
            self.means = self.means | {f"mean of {len(names)} tasks": [task.name for task in self.tasks]}

    def evaluate(self, variants: list[Variant], tasks: list[Task], cache: Cache, batch_size: int = 1) -> dict[str, Any]:
        """See `run_evaluation`."""
        return run_evaluation(
            self.model,
            self.tokenizer,
            variants,
            tasks,
            name="bundled" if self.args.model == str(bundled.model_path()) else Path(self.args.model).name,
            batch_size=batch_size,
            cache=cache,
            means=self.means,
            command=shlex.join(["python", *sys.argv]),
        )

    def fit(self, cells: list[Cell]) -> str:
        """Learn what the cells need, which ends up in OUT/configs."""
        for cell in cells:
            self.fits.variant(cell)
        return ", ".join(cell.name for cell in cells)

    def measure(self, cell: Cell) -> str:
        """Fill the cache."""
        begun = time.perf_counter()
        variant, cache, size = self.fits.variant(cell), Cache(self.args.out / "cache"), self.args.eval_batch_size
        for tasks, batch_size in ((self.texts, size), (self.tasks, self.args.task_batch_size or size)):
            if tasks:
                self.evaluate([variant], tasks, cache, batch_size)
        return f"{cell.name} in {time.perf_counter() - begun:.0f} s"

    def compare(self, cell: Cell, plain: Cell | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The result of a cell beside the dense model, and the paired differences to a cell of plain CATS."""
        cache, tasks = Complete(self.args.out / "cache"), [*self.texts, *self.tasks]
        variant = self.fits.variant(cell)
        others = [variant] if cell.method == "dense" else [Variant("dense"), variant]
        result = self.evaluate(others, tasks, cache)
        rows: list[dict[str, Any]] = []
        if plain is not None:
            # differences are taken to the variant of this name
            against = self.evaluate([replace(self.fits.variant(plain), name="dense"), variant], tasks, cache)
            keys = ("variant", "task", "metric", "value", "n", "difference")
            rows = [
                {"k": cell.k, "draw": cell.draw, "source": cell.source} | {key: row[key] for key in keys}
                for row in against["results"]
                if row["difference"]
            ]
        return result, rows


class Complete(Cache):
    """A cache that holds everything already."""

    def load(self, key: dict[str, Any]) -> Measurement:
        """The measurement with this key.

        Raises:
            CatsError: there is none.
        """
        found = super().load(key)
        if found is None:
            raise CatsError(
                f"{self.folder} lacks a measurement; run the same command without --assemble, on the same kind of "
                "device with the same versions."
            )
        return found


def call(name: str, *values: Any) -> Any:
    """A method of this process's lab."""
    return getattr(_lab[0], name)(*values)


_lab: list[Lab] = []


def _start(args: argparse.Namespace, counter: Any) -> None:
    """Begin a worker: its number says which GPU it takes."""
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.workers))
    device = args.device
    if device == "cuda":
        device = f"cuda:{number % torch.cuda.device_count()}"
        torch.cuda.set_device(device)  # Triton launches on the current one
    _lab[:] = [Lab(args, device)]


class _Here(Executor):
    """Does what is submitted at once, in this process."""

    def submit(self, function: Callable[..., Any], /, *values: Any, **named: Any) -> Future[Any]:
        """See `Executor`."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*values, **named))
        except Exception as error:
            future.set_exception(error)
        return future


def workers(args: argparse.Namespace) -> Executor:
    """Where labs are: this process, or several others."""
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    if args.workers > 1:
        return ProcessPoolExecutor(args.workers, context, _start, (args, counter))
    _start(args, counter)
    return _Here()


def measure_all(executor: Executor, cells: list[Cell]) -> None:
    """Fit and measure every cell, first what takes long to fit. What fails is told, and does not stop the others."""
    begun = time.perf_counter()
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    longest = sorted(groups.values(), key=lambda group: -group[0].effort)
    fitting = {executor.submit(call, "fit", group): group for group in longest}
    measuring: dict[Future[Any], Cell] = {}
    done = 0
    while fitting or measuring:
        for future in wait([*fitting, *measuring], return_when=FIRST_COMPLETED).done:
            group = fitting.pop(future, [])
            measured = [] if group else [measuring.pop(future)]
            if error := future.exception():
                text = f"FAILED {', '.join(cell.name for cell in group or measured)}: {first_line(error)}"
                traceback.print_exception(error)
                measured = measured or group
            else:
                text = future.result()
                measuring |= {executor.submit(call, "measure", cell): cell for cell in group}
            done += len(measured)
            print(f"[{time.perf_counter() - begun:.0f} s] {done}/{len(cells)} {text}", flush=True)


def assemble(executor: Executor, cells: list[Cell]) -> tuple[dict[str, Any], list[str]]:
    """One result of all cells that are measured, and what is wrong with the others."""
    plain = {(c.k, c.source, c.draw): c for c in cells if c.method == "cats"}
    futures = {}
    for cell in cells:
        beside = plain.get((cell.gate_sparsity, cell.source, cell.draw))
        futures[cell] = executor.submit(call, "compare", cell, None if beside is cell else beside)
    result: dict[str, Any] = dict(futures[cells[0]].result()[0])
    result["variants"], result["results"], result["against_cats"] = [], [], []
    wrong = []
    for cell, future in futures.items():
        if error := future.exception():
            wrong.append(f"{cell.name}: {first_line(error)}")
            continue
        part, against = future.result()
        facts = {"source": cell.source, "draw": cell.draw, "rounded": cell.method == "int8"}
        result["variants"].append(part["variants"][-1] | facts)
        result["results"] += [row for row in part["results"] if row["variant"] == cell.name]
        result["against_cats"] += against
    result["machine"] = machine.facts()
    for task in result["tasks"]:
        task["data"] = Path(task["data"]).name  # results are for others: no path of this machine
    return result, wrong


def main(words: list[str] | None = None) -> None:
    """Fit, measure, assemble."""
    args = arguments(words)
    args.out.mkdir(parents=True, exist_ok=True)
    cells = plan(args)
    with workers(args) as executor:
        if not args.assemble:
            measure_all(executor, cells)
        result, wrong = assemble(executor, cells)
    result["command"] = shlex.join(["python", *sys.argv])
    write_json(args.out / RESULT, result, force=True)
    for row in result["results"]:
        if row["metric"] == "perplexity" and row["difference"]:
            cost = row["value"] / (row["value"] - row["difference"]["value"]) - 1
            print(f"{row['variant']:55s} {row['task']:16s} {cost:+8.2%} {row['sparsity']['model']:.4f} of weights")
    if wrong:
        raise SystemExit("error: without these:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
