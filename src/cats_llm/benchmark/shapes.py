"""The shapes of known models, for benchmarks with random weights."""

from dataclasses import dataclass

from cats_llm.errors import CatsError


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. ``intermediate_size`` neurons in each of ``layers`` layers."""

    name: str
    hidden_size: int
    intermediate_size: int
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 32000


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama2-7b", 4096, 11008, kv_heads=32),
        Shape("mistral-7b", 4096, 14336),
        Shape("llama3-8b", 4096, 14336, vocab_size=128256),
        Shape("qwen3-8b", 4096, 12288, layers=36, vocab_size=151936),
    )
}


def parse_shape(text: str) -> Shape:
    """A named shape, or D,F.

    Raises:
        CatsError: it is neither.
    """
    if text in SHAPES:
        return SHAPES[text]
    try:
        d, f = (int(part) for part in text.split(","))
    except ValueError:
        d = f = 0
    if d < 1 or f < 1:
        raise CatsError(f"{text!r} is no shape; use {', '.join(SHAPES)} or D,F (hidden and intermediate size).")
    heads = max(1, d // 128)
    return Shape(text, d, f, heads=heads, kv_heads=heads, head_dim=d // heads)
