"""Time the CPU kernel against dense PyTorch and against the machine's read bandwidth, in one run.

    python benchmarks/kernel_mlp.py --shape 4096,14336 --dtype bfloat16 --threads 1,2

Several layers are rotated so that no weight is still cached, and all contestants take turns, so that a machine that
slows down slows all of them. Reported: medians, and each one's GB/s as a share of the read loop's in the same round.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_llm.kernels import cpu
from cats_llm.kernels.definition import ACTIVATIONS, gate_activation


class Layer:
    """One random MLP, its weights stored as the kernel wants them, and its dense PyTorch twin on the same memory."""

    def __init__(self, d: int, f: int, dtype: torch.dtype, x: Tensor, sparsities: list[float]):
        self.gate, self.up, self.down = (torch.empty(f, d, dtype=dtype).normal_(std=d**-0.5) for _ in range(3))
        self.dense_down = torch.empty(d, f, dtype=dtype).normal_(std=f**-0.5)
        a = gate_activation(F.linear(x, self.gate), ACTIVATIONS["silu"]).abs().flatten().sort().values
        self.thresholds = [a[int(k * (len(a) - 1))] if k else torch.tensor(0.0) for k in sparsities]
        self.kept = [float((a >= t).float().mean()) for t in self.thresholds]


def bench(
    d: int, f: int, dtype: torch.dtype, tokens: int, sparsities: list[float], layers: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each contestant, one per round."""
    x = torch.randn(tokens, d).to(dtype)
    stack = [Layer(d, f, dtype, x, sparsities) for _ in range(layers)]

    def read(layer: Layer) -> object:
        return cpu.read(layer.gate), cpu.read(layer.up), cpu.read(layer.down)

    def dense(layer: Layer) -> object:
        return F.linear(F.silu(F.linear(x, layer.gate)) * F.linear(x, layer.up), layer.dense_down)

    def kernel(i: int) -> Callable[[Layer], object]:
        return lambda layer: cpu.gated_mlp(x, layer.gate, layer.up, layer.down.t(), layer.thresholds[i])

    contestants: dict[str, Callable[[Layer], object]] = {"read": read, "torch": dense}
    contestants |= {f"k={k}": kernel(i) for i, k in enumerate(sparsities)}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for r in range(rounds + 1):
        for i, (name, run) in enumerate(contestants.items()):
            layer = stack[(r * len(contestants) + i) % layers]
            start = time.perf_counter()
            run(layer)
            if r:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096,14336", help="d,f")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", default="1")
    parser.add_argument("--sparsity", default="0,0.5,0.7,0.9")
    parser.add_argument("--threads", default=str(torch.get_num_threads()))
    parser.add_argument("--isa", default=cpu.isa())
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    d, f = map(int, args.shape.split(","))
    dtype, sparsities = getattr(torch, args.dtype), [float(k) for k in args.sparsity.split(",")]
    torch.manual_seed(0)
    for isa in args.isa.split(","):
        cpu.set_isa(isa)
        for threads in map(int, args.threads.split(",")):
            torch.set_num_threads(threads)
            for tokens in map(int, args.tokens.split(",")):
                with torch.inference_mode():
                    times = bench(d, f, dtype, tokens, sparsities, args.layers, args.rounds)
                report(times, d * f * dtype.itemsize, tokens, f"{isa}, {threads} threads, {tokens} tokens")


def report(times: dict[str, list[float]], matrix: int, tokens: int, title: str) -> None:
    """A line per contestant: ms, GB/s, share of the read bandwidth, speed-up over torch."""
    print(f"\n{title}")
    for name, seconds in times.items():
        sparsity = float(name[2:]) if name[0] == "k" else 0.0
        bytes_read = matrix * (1 + 2 * (1 - sparsity**tokens))  # neurons that no token keeps, were tokens independent
        share = [bytes_read / t / (3 * matrix / r) for t, r in zip(seconds, times["read"], strict=True)]
        speedup = [p / t for t, p in zip(seconds, times["torch"], strict=True)]
        low, _, high = statistics.quantiles(share, n=4)
        t = statistics.median(seconds)
        print(
            f"{name:>6}: {t * 1e3:7.2f} ms (best {min(seconds) * 1e3:7.2f})  {bytes_read / t / 1e9:6.1f} GB/s"
            f"  {statistics.median(share):6.1%} of read ({low:.0%} to {high:.0%})"
            f"  {statistics.median(speedup):5.2f}x torch"
        )


if __name__ == "__main__":
    main()
