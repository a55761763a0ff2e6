"""Whole-token decode on a GPU: stock transformers and CATS on the same weights, in each way to generate."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cats_llm.benchmark import cuda
from cats_llm.benchmark.config import DecodeBench
from cats_llm.benchmark.decode import decode_row, generate, prompt_and_profile, read_shares
from cats_llm.benchmark.models import copy_sharing_weights
from cats_llm.benchmark.timing import Quartiles, interleave
from cats_llm.calibration.profile import Profile
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.integrations.generation import graph_decode
from cats_llm.model.decode_linear import use_decode_linears
from cats_llm.model.sparsify import set_thresholds, sparsify

_PROMPT = 32  # more tokens than decode kernels serve

MODES = {
    "generate, compiled": "",
    "graph_decode": ", graph_decode",
    "generate, eager": ", eager",
    "one step": ", one step",
}
"""Ways to decode, and what the candidates' names have of them.

`generate` with ``cache_implementation="static"``, which compiles; the same with our loop `graph_decode`; `generate` as
it comes; and the compiled model without any of `generate`, whose time is what the loops add to.
"""


@dataclass(frozen=True)
class _Candidate:
    """A model in a mode. ``part``: "stock", "all" that we do, or only the "MLP"s; ``k`` is None for stock."""

    mode: str
    part: str
    k: float | None

    @property
    def name(self) -> str:
        """What tables call it."""
        what = "stock" if self.k is None else f"k = {self.k}" + ", MLP only" * (self.part == "MLP")
        return what + MODES[self.mode]

    @property
    def references(self) -> dict[str, str]:
        """What it is compared with, by the name of the row's entry."""
        part = "all" if self.k is None else self.part
        return {
            "speedup_over_stock": _Candidate(self.mode, "stock", None).name,
            "speedup_over_own_dense": _Candidate(self.mode, part, 0.0).name,
        }


@torch.no_grad()
def bench_cuda_decode(
    config: DecodeBench,
    model: Any,
    copy_bandwidth: float,
    profile: Profile | None = None,
    batch: int = 1,
    modes: tuple[str, ...] = tuple(MODES),
    retune: bool = False,
    announce: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time decoding on random prompts. The model is left as it is.

    Args:
        config: what to measure, but for batches. Sparsity 0, our own dense path, is always among them.
        model: dense, on a GPU. The sparse copy shares its weights but for down_proj.
        copy_bandwidth: of the GPU's memory, bytes a second.
        profile: thresholds come from it; without one, from random tokens.
        batch: sequences at a time.
        modes: some of `MODES`.
        retune: let each sparsity choose its own kernels. It costs a compilation each; otherwise all take those of the
            first sparsity above 0, and only the thresholds differ.
        announce: is told what begins.

    Returns:
        ``rows``, one for each candidate; ``kernels``, seconds a step of each GPU kernel in the bare step of stock and
        of ours; ``tuned_for``, the sparsity whose kernels all take, or None.
    """
    tokens = config.tokens or 128
    if profile is None:
        announce("calibrating on random tokens")
    prompt, profile = prompt_and_profile(model, batch, _PROMPT, profile)
    ks = list(dict.fromkeys([0.0, *config.sparsities]))
    configs = {k: profile.config(k) for k in ks}
    typical = next((k for k in ks if k > 0), 0.0)
    models = _sparse_copies(model, configs, None if retune else typical)
    shares = {k: read_shares(models["all", k], configs[k], prompt, min(tokens, 16)) for k in ks}
    steps: dict[Any, _Step] = {}  # by model
    if "one step" in modes:
        steps = {m: _Step(m, prompt, tokens) for m in (model, *(models["all", k] for k in ks))}

    def prepared(part: str, k: float | None) -> Any:
        if k is None:
            return model
        set_thresholds(models[part, k], configs[k].thresholds, configs[k].vectors)
        return models[part, k]

    def run(candidate: _Candidate, turn: int) -> float:
        if turn < len(candidates):
            announce(f"preparing {candidate.name}")  # this is where it is compiled
        used = prepared(candidate.part, candidate.k)
        if candidate.mode == "one step":
            return steps[used].seconds()
        return _seconds_a_token(used, prompt, tokens, candidate.mode)

    candidates = {c.name: c for c in _candidates(ks, typical, modes)}
    # one code object serves all these models; none may get a form that is more general than it would be alone
    alone = {"recompile_limit": 64, "automatic_dynamic_shapes": False, "specialize_float": True}
    with torch._dynamo.config.patch(alone):
        seconds = interleave({name: partial(run, c) for name, c in candidates.items()}, config.rounds)
        kernels = {}
        if steps:
            announce("listing the kernels of a step")
            for name, k in {"stock": None, "k = 0.0": 0.0, f"k = {typical}": typical}.items():
                kernels[name] = steps[prepared("all", k)].kernels()
    rows = []
    for name, candidate in candidates.items():
        used, read = (None, {}) if candidate.k is None else (configs[candidate.k], shares[candidate.k])
        row = decode_row(model, seconds, name, batch, used, read, candidate.references)
        row |= {
            "device": torch.cuda.get_device_name(model.device),
            "mode": candidate.mode,
            "part": candidate.part,
            "tokens": tokens,
            "floor_ms": 1e3 * row["bytes"] / copy_bandwidth,
            "share_of_copy_bandwidth": 1e9 * row["gb_per_s"] / copy_bandwidth,
        }
        rows.append(row)
    return {"rows": rows, "kernels": kernels, "tuned_for": None if retune else typical}


def _candidates(ks: list[float], typical: float, modes: tuple[str, ...]) -> list[_Candidate]:
    candidates = []
    for mode in modes:
        candidates.append(_Candidate(mode, "stock", None))
        # eager decoding waits for Python: one sparsity says it all
        candidates += [_Candidate(mode, "all", k) for k in ks if mode != "generate, eager" or k in (0.0, typical)]
        if mode == "generate, compiled":
            candidates += [_Candidate(mode, "MLP", k) for k in ks]
    return candidates


def _sparse_copies(
    model: nn.Module, configs: dict[float, CatsConfig], tuned_for: float | None
) -> dict[tuple[str, float], Any]:
    """Sparse models by part and sparsity; one a part serves all sparsities if ``tuned_for`` names its kernels' one."""
    models: dict[tuple[str, float], Any] = {}
    last = copy_sharing_weights(model, but_down=True)
    for k, config in configs.items():
        if tuned_for is None or not models:
            last = sparsify(copy_sharing_weights(last), config if tuned_for is None else configs[tuned_for])
            alone = copy_sharing_weights(last)
            use_decode_linears(alone, False)
        models["all", k], models["MLP", k] = last, alone
    return models


def _marking(marks: list[Any]) -> Any:
    """A logits processor that changes nothing and marks when a step is done. A streamer would wait for each token."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Marks(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            marks.append(cuda.mark())
            return scores

    return LogitsProcessorList([Marks()])


def _seconds_a_token(model: Any, prompt: Tensor, tokens: int, mode: str) -> float:
    """Median seconds between two tokens of `generate`, without the prefill."""
    marks: list[Any] = []
    static = {} if mode == "generate, eager" else {"cache_implementation": "static"}
    loop = {"custom_generate": graph_decode} if mode == "graph_decode" else {}
    generate(model, prompt, tokens, logits_processor=_marking(marks), **static, **loop)
    return _median(marks)


def _median(marks: list[Any]) -> float:
    return Quartiles.of(cuda.elapsed(a, b) for a, b in itertools.pairwise(marks)).median


class _Step:
    """The compiled model and a greedy choice, without `generate` around them."""

    def __init__(self, model: Any, prompt: Tensor, tokens: int) -> None:
        from transformers import StaticCache

        self.model, self.prompt, self.tokens = model, prompt, tokens
        length = prompt.shape[1] + tokens
        self.cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
        self.compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    def seconds(self) -> float:
        """Median seconds between two tokens."""
        marks: list[Any] = []
        self._decode(self._prefill(), self.tokens, lambda: marks.append(cuda.mark()))
        return _median(marks)

    def kernels(self) -> dict[str, float]:
        """Seconds a step of each GPU kernel, longest first."""
        few = min(self.tokens, 8)
        token = self._prefill()
        times = cuda.kernel_times(lambda: self._decode(token, few, lambda: None))
        return {name: time / few for name, time in times.items()}

    def _prefill(self) -> Tensor:
        self.cache.reset()
        return self._choose(self.model(input_ids=self.prompt, past_key_values=self.cache, use_cache=True))

    def _decode(self, token: Tensor, steps: int, after: Callable[[], object]) -> None:
        for _ in range(steps):
            token = self._choose(self.compiled(input_ids=token, past_key_values=self.cache, use_cache=True))
            after()

    @staticmethod
    def _choose(output: Any) -> Tensor:
        chosen: Tensor = output.logits[:, -1:].argmax(-1)
        return chosen
