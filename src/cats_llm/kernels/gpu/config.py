"""Launch configs, how kernels are divided into programs: the defaults, measured on an H200, and what tuning tries."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: what a program of it holds, and how it runs.

    Attributes:
        rows: weight rows a program holds at a time.
        columns: elements of each of these rows that it holds at a time; 0 for whole rows.
        warps: of 32 threads.
        stages: depth of the software pipeline; 1 loads and computes in turn.
        programs: programs a multiprocessor, for the kernels that share out the active neurons.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int = 0


@dataclass(frozen=True)
class GemvConfig:
    """Tiles of a sparse MLP for one token: up and down in one kernel, by whole rows."""

    gate: Tile
    up_down: Tile


@dataclass(frozen=True)
class SmallBatchConfig:
    """Tiles of a sparse MLP for several tokens, on tensor cores."""

    gate: Tile
    up: Tile
    down: Tile


Config = GemvConfig | SmallBatchConfig

# whole rows of more elements than this do not fit a program's registers
_LONGEST_ROW = 32768


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def default(tokens: int, d: int, itemsize: int, sparsity: float, shared_memory: int) -> Config:
    """The config when nothing was tuned.

    Args:
        tokens: 1 to 16.
        d: hidden size.
        itemsize: bytes of an element.
        sparsity: expected share of neurons that are active for no token.
        shared_memory: bytes that a program may have on this GPU.
    """
    if tokens == 1 and d <= _LONGEST_ROW:
        return GemvConfig(Tile(16, min(256, power_of_two(d)), 4, 1), _whole_rows(d, itemsize, shared_memory))
    k = 64 * 2 // itemsize
    if sparsity < 0.3:
        up, down = Tile(32, k, 2, 4, programs=4), Tile(64, 256, 8, 2, programs=4)
    elif sparsity < 0.8:
        up, down = Tile(16, 2 * k, 2, 4, programs=4), Tile(32, 256, 8, 4, programs=4)
    else:
        up, down = Tile(16, 2 * k, 2, 4, programs=2), Tile(32, 128, 4, 4, programs=4)
    return SmallBatchConfig(Tile(32, k, 2, 6), up, down)


def _whole_rows(d: int, itemsize: int, shared_memory: int, rows: int = 4, stages: int = 3) -> Tile:
    """Four rows three deep, or as many as registers and shared memory hold."""
    row = power_of_two(d)
    while rows > 1 and (rows * row > 64 * 256 or _pipeline_bytes(rows, row, itemsize, stages) > 0.6 * shared_memory):
        rows //= 2
    while stages > 1 and _pipeline_bytes(rows, row, itemsize, stages) > 0.6 * shared_memory:
        stages -= 1
    warps = max(1, min(16 if rows * row > 64 * 256 else 8, rows * row // 512))
    return Tile(rows, 0, warps, stages, programs=1)


def _pipeline_bytes(rows: int, row: int, itemsize: int, stages: int) -> int:
    return 2 * rows * row * itemsize * (stages - 1)


def smaller(config: Config) -> Config | None:
    """A config that needs less of a multiprocessor, after one that did not fit; None if there is none."""
    tiles = vars(config)
    less = {name: replace(t, stages=max(1, t.stages - 1)) for name, t in tiles.items()}
    if less == tiles:
        less = {name: replace(t, rows=max(1 if name == "up_down" else 16, t.rows // 2)) for name, t in tiles.items()}
    return None if less == tiles else type(config)(**less)


def candidates(tokens: int, d: int, itemsize: int, sparsity: float, shared_memory: int) -> Iterator[Config]:
    """What tuning tries, the default first: one kernel's tile varied at a time around the default."""
    start = default(tokens, d, itemsize, sparsity, shared_memory)
    yield start
    if isinstance(start, GemvConfig):
        for columns, warps in ((128, 2), (128, 4), (256, 8), (512, 4), (512, 8)):
            yield replace(start, gate=Tile(16, min(columns, power_of_two(d)), warps, 1))
        for rows, stages, programs in itertools.product((1, 2, 4), (1, 2, 3), (1, 2, 3)):
            tile = _whole_rows(d, itemsize, shared_memory // programs, rows, stages)
            yield replace(start, up_down=replace(tile, programs=programs))
        return
    k = start.gate.columns
    for rows, columns, warps, stages in itertools.product((32, 64), (k, 2 * k), (2, 4), (3, 5)):
        yield replace(start, gate=Tile(rows, columns, warps, stages))
    for rows, columns, warps, programs in itertools.product((16, 32), (k, 2 * k, 4 * k), (2, 4), (2, 4)):
        yield replace(start, up=Tile(rows, columns, warps, 4, programs))
    for rows, columns, warps, programs in itertools.product((16, 32, 64), (128, 256), (4, 8), (2, 4)):
        yield replace(start, down=Tile(rows, columns, warps, 2 if rows == 64 else 4, programs))


def linear_tile(d: int) -> Tile:
    """The tile of a linear layer for one token."""
    columns = min(2048, power_of_two(d))
    return Tile(1, columns, max(1, min(8, columns // 256)), 1)
