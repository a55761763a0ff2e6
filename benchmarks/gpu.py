"""Correctness and speed on one NVIDIA GPU, in one run: kernels, MLP, prefill and whole tokens.

    PYTHONPATH=src python benchmarks/gpu.py --out results

It needs PyTorch, Triton and transformers, nothing built; pytest and matplotlib are used if they are there. Everything
measured is in OUT/gpu.json after each section, so that a run that is cut short keeps what it has.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_llm.benchmark import cuda, machine
from cats_llm.benchmark.config import DecodeBench, MLPBench
from cats_llm.benchmark.cuda_decode import MODES, bench_cuda_decode
from cats_llm.benchmark.mlp import DENSE, bench_cuda_mlp, kernel_of
from cats_llm.benchmark.models import SHAPES, MLPs, Shape, random_model, thresholds_for
from cats_llm.benchmark.tables import CUDA_DECODE, CUDA_MLP, Table, table
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.dtypes import dtype_name
from cats_llm.kernels.definition import ACTIVATIONS, gate_activation, gated_mlp, keep_mask
from cats_llm.model.sparsify import sparsify
from cats_llm.model.structure import find_gated_mlps
from cats_llm.outputs import write_json

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("check", "mlp", "prefill", "decode", "tests")
KS = [0.0, 0.5, 0.7, 0.9]
DEVICE = "cuda"
UNDECIDED = 1e-5  # an activation so near the threshold may fall on either side, by the order of a sum


class Run:
    """The results so far, on disk after each step."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.perf_counter()
        self.file = args.out / "gpu.json"
        self.results: dict[str, Any] = {"benchmark": "gpu", "machine": machine.facts(), "seconds": {}, "errors": {}}

    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.start

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{self.seconds():6.1f} s] {text}", flush=True)

    def save(self, **more: Any) -> None:
        """Add results and write the file."""
        self.results.update(more)
        write_json(self.file, self.results, force=True)

    def step(self, name: str, work: Callable[[], None]) -> None:
        """Run it; if it fails, note why and go on."""
        self.say(name)
        begun = time.perf_counter()
        try:
            work()
        except Exception as error:  # whatever a section raises, the others still count
            traceback.print_exc()
            self.results["errors"][name] = f"{type(error).__name__}: {error}"
        torch.cuda.empty_cache()
        self.results["seconds"][name] = time.perf_counter() - begun
        self.save()


def shapes_once() -> tuple[list[Shape], dict[str, str]]:
    """The shapes with different MLPs, and which of the others have the same."""
    seen: dict[tuple[int, int], Shape] = {}
    same = {}
    for shape in sorted(SHAPES.values(), key=lambda shape: shape.name != "mistral-7b"):
        first = seen.setdefault((shape.hidden_size, shape.intermediate_size), shape)
        if first is not shape:
            same[shape.name] = first.name
    return list(seen.values()), same


def tune(run: Run) -> None:
    """Find the best configs for all MLPs that are measured. They are kept in the file of tuned configs."""
    from cats_llm.benchmark import autotune

    tuned = []
    for shape, dtype, tokens in mlp_cases(run):
        for k in KS:
            _, best, default = autotune.tune(shape.hidden_size, shape.intermediate_size, dtype, tokens, k)
            tuned.append(
                {"shape": shape.name, "dtype": str(dtype), "tokens": tokens, "k": k, "us": best, "was": default}
            )
            run.say(f"tuned {shape.name} {dtype} {tokens} tokens k = {k}: {best:.1f} us, by default {default:.1f}")
            run.save(tuned=tuned)


def mlp_cases(run: Run) -> list[tuple[Shape, torch.dtype, int]]:
    """Batch 1 for every shape in bfloat16; other dtypes and batches for Mistral."""
    shapes, _ = shapes_once()
    cases = [(shape, torch.bfloat16, 1) for shape in shapes]
    cases += [(shapes[0], dtype, 1) for dtype in (torch.float16, torch.float32)]
    cases += [(shapes[0], torch.bfloat16, tokens) for tokens in (2, 4, 8, 16)]
    return cases[:1] if run.args.quick else cases


def check(run: Run) -> None:
    """Against the definition in float64."""
    rows = []
    for shape, dtype in dict.fromkeys((shape, dtype) for shape, dtype, _ in mlp_cases(run)):
        for tokens in (1, 2, 16, 64):
            rows += check_mlp(shape, dtype, KS, tokens)
        run.save(check=rows)
    bad = [row for row in rows if not row["right"]]
    run.results["check_passed"] = not bad
    run.say(f"{len(rows)} checks against float64, {len(bad)} failed")


@torch.no_grad()
def check_mlp(shape: Shape, dtype: torch.dtype, sparsities: list[float], tokens: int) -> list[dict[str, Any]]:
    """Compare one sparse MLP of a shape with the definition in float64, the gate rounded to ``dtype`` as it says.

    Returns:
        A row for each sparsity. ``error`` and ``plain_error`` are those of the model's MLP and of the plain definition
        in ``dtype``, ``undecided`` what the neurons at the threshold are worth, all relative to the norm of the result.
        ``same_bits`` means in two runs and in a replayed graph whose input was changed after its capture. ``right``: no
        less exact than twice the plain definition and, if the kernel is ours, the same bits.
    """
    torch.manual_seed(0)
    model = MLPs(shape, 1, dtype, DEVICE)
    x = torch.randn(tokens, shape.hidden_size, device=DEVICE).to(dtype)
    mlp = find_gated_mlps(model)[0]
    module: Any = mlp.module
    gate, up, down = (linear.weight.clone() for linear in (module.gate_proj, module.up_proj, module.down_proj))
    thresholds, _ = thresholds_for(mlp.gate_linear(x), sparsities)
    rows = []
    for k, at in zip(sparsities, thresholds, strict=True):
        threshold = at * (1 - 1e-4)  # beside the activation that it was taken from
        sparsify(model, CatsConfig({0: float(threshold)}, sparsity=k, layer_sparsity={0: k}))

        truth = exact(x, gate, up, down, threshold)
        y = model(x)[0]
        held = torch.zeros_like(x)
        results: list[Tensor] = []
        replay = cuda.captured(lambda held=held, results=results: results.append(model(held)[0]))  # type: ignore[misc]
        held.copy_(x)
        replay()
        errors = {
            "error": y.double() - truth,
            "plain_error": gated_mlp(x, gate, up, down, threshold).double() - truth,
            "undecided": exact(x, gate, up, down, threshold - UNDECIDED)
            - exact(x, gate, up, down, threshold + UNDECIDED),
        }
        sizes = {name: float(error.norm() / truth.norm()) for name, error in errors.items()}
        bound = 2 * sizes["plain_error"] + sizes["undecided"] + torch.finfo(dtype).eps
        same = torch.equal(y, model(x)[0]) and torch.equal(y, results[-1])
        kernel = kernel_of(model, tokens, k)
        rows.append(
            {
                "shape": shape.name,
                "dtype": dtype_name(dtype),
                "tokens": tokens,
                "sparsity": k,
                "kernel": kernel,
                **sizes,
                "same_bits": same,
                "right": sizes["error"] <= bound and (same or kernel == DENSE),
            }
        )
    return rows


def exact(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, threshold: Tensor) -> Tensor:
    """The definition in float64; only the gate is rounded, since that decides which neurons are kept."""
    gate = F.linear(x.double(), w_gate.double()).to(x.dtype)
    a = gate_activation(gate, ACTIVATIONS["silu"])
    kept = torch.where(keep_mask(a, threshold), a, 0.0).double()
    return F.linear(kept * F.linear(x.double(), w_up.double()), w_down.double())


def tests(run: Run) -> None:
    """The kernels' own tests for a GPU, if pytest is there."""
    files = sorted(str(file) for file in (ROOT / "tests" / "kernels").glob("test_gpu_*.py"))
    if not files or importlib.util.find_spec("pytest") is None:
        run.say("no tests: pytest or tests/kernels is not there")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    lines = (done.stdout + done.stderr).strip().splitlines()
    run.save(tests={"returncode": done.returncode, "tail": lines[-15:]})
    run.say(f"pytest -m gpu: {lines[-1]}")
    if done.returncode:
        raise RuntimeError(f"pytest -m gpu ended with {done.returncode}: {lines[-1]}")


def mlp(run: Run) -> None:
    """One MLP at decode."""
    rows: list[dict[str, Any]] = []
    for shape, dtype, tokens in mlp_cases(run):
        rounds = 20 if run.args.quick else 40
        config = MLPBench(dtype_name(dtype), tuple(KS), device=DEVICE, shape=shape.name, rounds=rounds)
        rows += bench_cuda_mlp(config, run.results["bandwidth"]["copy"], tokens)
        run.save(mlp=rows, same_mlp=shapes_once()[1])


def prefill(run: Run) -> None:
    """The base model's MLP and the sparse one's for many tokens."""
    rows: list[dict[str, Any]] = []
    for shape in shapes_once()[0][: 1 if run.args.quick else None]:
        for tokens in (512, 2048):
            config = MLPBench("bfloat16", (0.5,), device=DEVICE, shape=shape.name, rounds=20)
            rows += bench_cuda_mlp(config, run.results["bandwidth"]["copy"], tokens)
            run.save(prefill=rows)


def decode(run: Run) -> None:
    """A Mistral-shaped model with random weights, one way to decode after the other."""
    args = run.args
    model = random_model(SHAPES["mistral-7b"], args.layers, torch.bfloat16, "cuda")
    ks, tokens, rounds = ((0.5,), 32, 2) if args.quick else ((0.5, 0.7, 0.9), 64, 3)
    config = DecodeBench("bfloat16", ks, device=DEVICE, shape="mistral-7b", tokens=tokens, rounds=rounds)
    rows: list[dict[str, Any]] = []
    kernels: dict[str, Any] = {}
    longest = 0.0
    for mode in args.modes:
        left = 60 * args.minutes - run.seconds()
        if left < longest:
            run.say(f"left out for time: {mode}")
            run.results.setdefault("left_out", []).append(f"decode: {mode}")
            continue
        begun = run.seconds()
        result = bench_cuda_decode(
            config,
            model,
            run.results["bandwidth"]["copy"],
            modes=(mode,),
            retune=args.retune,
            announce=run.say,
        )
        rows += [row | {"layers": args.layers, "dtype": "bfloat16", "shape": "mistral-7b"} for row in result["rows"]]
        kernels |= result["kernels"]
        longest = max(longest, run.seconds() - begun)
        run.save(decode=rows, decode_kernels=kernels, decode_tuned_for=result["tuned_for"])


def figures(run: Run) -> None:
    """One figure a table, if matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        run.say("no figures: matplotlib is not installed")
        return
    from cats_llm.report.bench_figures import write_figure

    for section, kind in (("mlp", "mlp"), ("prefill", "mlp"), ("decode", "decode")):
        if run.results.get(section):
            for ending in (".svg", ".png"):
                write_figure(kind, run.results[section], run.args.out / f"gpu-{section}{ending}", force=True)


def as_text(lines: Table) -> str:
    """A table for a terminal: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [[c.rjust(width) for c, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *right[1:]]) for line, right in zip(lines, padded, strict=True)
    )


def tables(run: Run) -> None:
    """What was measured, short."""
    results = run.results
    bandwidth = {name: f"{rate / 1e12:.2f} TB/s" for name, rate in results["bandwidth"].items()}
    print(f"\n{', '.join(results['machine']['gpus'])}; memory: {bandwidth}")
    print("x torch is the gain; x own k=0 is the part that sparsity has in it, the rest is engineering.")
    for section, columns in (("mlp", CUDA_MLP), ("prefill", CUDA_MLP), ("decode", CUDA_DECODE)):
        if results.get(section):
            print(f"\n{section}\n{as_text(table(results[section], columns))}")
    for name, other in results.get("same_mlp", {}).items():
        print(f"{name} has the MLP of {other}")
    for candidate, kernels in results.get("decode_kernels", {}).items():
        print(f"\nGPU microseconds in one step, {candidate} (sum {1e6 * sum(kernels.values()):.0f})")
        for kernel, seconds in list(kernels.items())[:12]:
            print(f"{1e6 * seconds:9.1f}  {kernel[:110]}")
    if results.get("check"):
        bad = [row for row in results["check"] if not row["right"]]
        print(f"\ncorrectness: {len(results['check'])} checks against float64, {len(bad)} failed")
        for row in bad[:10]:
            print(f"  wrong: {row}")
    if "tests" in results:
        print(f"pytest -m gpu: {results['tests']['tail'][-1]}")
    for name, error in results["errors"].items():
        print(f"\n{name} FAILED: {error}")


def main() -> int:
    """Run what the command line asks for. 1 if a section failed or a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for gpu.json and the figures")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="less of each section, to see that all works")
    parser.add_argument("--layers", type=int, default=32, help="of the decoding model")
    parser.add_argument("--modes", default=";".join(MODES), help="ways to decode, separated by semicolons")
    parser.add_argument(
        "--minutes", type=float, default=8, help="ways to decode are left out if they would take longer"
    )
    parser.add_argument("--tune", action="store_true", help="tune the kernels for all that is measured, first")
    parser.add_argument("--retune", action="store_true", help="compile once for each sparsity (see bench_cuda_decode)")
    args = parser.parse_args()
    args.modes = args.modes.split(";")
    sections = args.only.split(",")
    if not set(sections) <= set(SECTIONS) or not set(args.modes) <= set(MODES):
        parser.error(f"--only takes some of {', '.join(SECTIONS)}; --modes some of {'; '.join(MODES)}")
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA GPU here")
    args.out.mkdir(parents=True, exist_ok=True)
    import transformers

    transformers.logging.set_verbosity_error()
    run = Run(args)
    run.results["command"] = " ".join(sys.argv)
    run.results["bandwidth"] = cuda.bandwidths("cuda")
    run.save()
    functions = {"check": check, "mlp": mlp, "prefill": prefill, "decode": decode, "tests": tests}
    if args.tune:
        run.step("tune", lambda: tune(run))
    for section in SECTIONS:
        if section in sections:
            run.step(section, lambda section=section: functions[section](run))  # type: ignore[misc]
    run.results["bandwidth_after"] = cuda.bandwidths("cuda")
    run.step("figures", lambda: figures(run))
    tables(run)
    run.say(f"done; {run.file}")
    return 1 if run.results["errors"] or not run.results.get("check_passed", True) else 0


if __name__ == "__main__":
    sys.exit(main())
