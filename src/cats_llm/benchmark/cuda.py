"""Time on a CUDA GPU: by its own events, launches captured in a graph, beside what its memory can do."""

from collections.abc import Callable
from typing import Any

import torch

from cats_llm.benchmark.timing import Quartiles

Work = Callable[[], object]

_COPIED = 2**30  # float32 numbers: 4 GiB


def title(device: str, memory: dict[str, float]) -> str:
    """The GPU and what `bandwidths` found, in words."""
    return f"{torch.cuda.get_device_name(device)}, copy {memory['copy'] / 1e12:.2f} TB/s"


def captured(work: Callable[[], Any]) -> Callable[[], None]:
    """The work's launches as one CUDA graph; calling the result replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and allocates, which a capture must not
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Callable[[], None] = graph.replay
    return replay


def mark() -> Any:
    """A point in the GPU's current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(start: Any, end: Any) -> float:
    """Seconds between two marks; waits until the GPU has passed the second."""
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3


def eager(work: Work, parts: int = 1) -> Callable[[int], float]:
    """A candidate of `interleave`: seconds of one of the work's equal parts, launched one by one by Python."""

    def run(turn: int) -> float:
        torch.cuda.synchronize()
        start = mark()
        work()
        return elapsed(start, mark()) / parts

    return run


def replayed(work: Work, parts: int = 1) -> Callable[[int], float]:
    """A candidate of `interleave`: seconds of one of the work's equal parts, replayed as a graph."""
    replay = captured(work)

    def run(turn: int) -> float:
        replay()  # keeps the GPU busy while the replay that counts is launched
        start = mark()
        replay()
        return elapsed(start, mark()) / parts

    return run


def bandwidths(device: str, numbers: int = _COPIED, rounds: int = 11) -> dict[str, float]:
    """Bytes a second that the GPU's memory reaches, medians.

    ``copy`` counts the bytes read and written. It is no graph: a copy node of a graph is slower than a copy by far.
    """
    source = torch.ones(numbers, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    works: dict[str, tuple[Work, int]] = {
        "copy": (lambda: target.copy_(source), 2 * size),
        "read": (lambda: source.sum(), size),
    }
    rates = {}
    for name, (work, moved) in works.items():
        run = eager(work)
        seconds = [run(turn) for turn in range(rounds + 2)]
        rates[name] = moved / Quartiles.of(seconds[2:]).median  # the first ones warm up
    return rates


def kernel_times(work: Work) -> dict[str, float]:
    """Seconds that the GPU spends in each kernel of the work, by name, longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in recorded.events() or ():
        if event.device_type.name == "CUDA":  # not the calls that launched it
            spent[event.name] = spent.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6
    return dict(sorted(spent.items(), key=lambda item: -item[1]))
