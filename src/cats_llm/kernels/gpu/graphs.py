"""CUDA graphs: work captured once and replayed, and how long a replay takes."""

import statistics
from collections.abc import Callable
from typing import Any

import torch


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


def median_us(call: Callable[[], Any], rounds: int = 15) -> float:
    """Microseconds of a call as a CUDA graph, the median of replays."""
    replay = captured(call)
    times = []
    for _ in range(rounds + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(1e3 * float(begin.elapsed_time(end)))
    return statistics.median(times[2:])
