"""What thresholds a neuron and a compensation add to the time of an MLP at decode, beside one threshold a layer.

    PYTHONPATH=src python benchmarks/vectors.py --device cuda --out vectors.json

Candidates share the weights but for down_proj's, skip the same number of neurons, and take turns; ratios are taken
round by round. On a GPU the layers are replayed as one CUDA graph.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cats_llm.benchmark import cuda, machine
from cats_llm.benchmark.mlp import kernel_of
from cats_llm.benchmark.models import SHAPES, MLPs, copy_sharing_weights, thresholds_for
from cats_llm.benchmark.timing import Quartiles, interleave, ratio
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.layer_tensors import LayerTensors
from cats_llm.dtypes import dtype_name
from cats_llm.model.sparsify import sparsify
from cats_llm.model.structure import find_gated_mlps
from cats_llm.outputs import write_json

_LAYERS = 8
_PARTS = {"plain": (), "thresholds": ("thresholds",), "both": ("thresholds", "compensation")}


@torch.no_grad()
def measure(shape: str, dtype: torch.dtype, k: float, tokens: int, rounds: int, device: str) -> dict[str, Any]:
    """One shape and sparsity: milliseconds of each, and the ratio to plain CATS."""
    torch.manual_seed(0)
    dense = MLPs(SHAPES[shape], _LAYERS, dtype, device)
    x = torch.randn(tokens, SHAPES[shape].hidden_size, device=device).to(dtype)
    thresholds = [float(thresholds_for(mlp.gate_linear(x), [k])[0][0]) for mlp in find_gated_mlps(dense)]
    model: Any = copy_sharing_weights(dense, but_down=True)
    works: dict[str, Callable[[int], float | None]] = {}
    models = []  # graphs do not keep what they read
    kernel = ""
    for name, parts in _PARTS.items():
        vectors = {}
        for layer, t in enumerate(thresholds):
            tensors = {
                # the same for all neurons, so that all candidates skip the same ones
                "thresholds": torch.full((SHAPES[shape].intermediate_size,), t),
                "compensation": torch.randn(SHAPES[shape].hidden_size),
            }
            vectors[layer] = LayerTensors(**{part: tensors[part] for part in parts})
        config = CatsConfig(
            dict(enumerate(thresholds)), k, dict.fromkeys(range(_LAYERS), k), vectors=vectors if parts else None
        )
        model = sparsify(copy_sharing_weights(model), config)
        kernel = kernel_of(model, tokens, k)
        models.append(model)
        works[name] = _candidate(model, x)
    seconds = interleave(works, rounds)
    return {
        "shape": shape,
        "dtype": dtype_name(dtype),
        "sparsity": k,
        "tokens": tokens,
        "rounds": rounds,
        "kernel": kernel,
        "ms": {name: vars(Quartiles.of(1e3 * s / _LAYERS for s in times)) for name, times in seconds.items()},
        "over_plain": {name: vars(ratio(times, seconds["plain"])) for name, times in seconds.items()},
    }


def _candidate(model: Any, x: torch.Tensor) -> Callable[[int], float | None]:
    if x.is_cuda:
        return cuda.replayed(lambda: model(x))

    def run(turn: int) -> None:
        model(x)

    return run


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", default="mistral-7b")
    parser.add_argument("--sparsity", default="0.5,0.7,0.9")
    parser.add_argument("--tokens", default="1")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for shape in args.shapes.split(","):
        for tokens in map(int, args.tokens.split(",")):
            for k in map(float, args.sparsity.split(",")):
                row = measure(shape, torch.bfloat16, k, tokens, args.rounds, args.device)
                rows.append(row)
                over = row["over_plain"]["both"]
                print(
                    f"{shape} k={k:g} tokens={tokens} {row['kernel']}: plain {row['ms']['plain']['median']:.4f} ms, "
                    f"with both {over['median']:.4f} of it ({over['low']:.4f} to {over['high']:.4f})",
                    flush=True,
                )
    on_gpu = args.device.startswith("cuda")
    device = torch.cuda.get_device_name(args.device) if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    result = {"benchmark": "vectors", "device": device, "machine": machine.facts(), "rows": rows}
    write_json(args.out, result | {"command": shlex.join(["python", *sys.argv])}, force=True)


if __name__ == "__main__":
    main()
