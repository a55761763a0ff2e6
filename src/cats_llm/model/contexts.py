"""What a model is while a context lasts."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from cats_llm.checkpoint.config import CatsConfig
from cats_llm.model.sparsify import densify, sparse_mlps, sparsify
from cats_llm.model.structure import unwrap


@contextmanager
def as_dense(model: nn.Module) -> Iterator[None]:
    """Let a sparse model compute the dense function while the context lasts. A dense model is left alone."""
    mlps = list(sparse_mlps(model).values())
    before = [mlp.sparse for mlp in mlps]
    try:
        for mlp in mlps:
            mlp.sparse = False
        yield
    finally:
        for mlp, sparse in zip(mlps, before, strict=True):
            mlp.sparse = sparse


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Leave the model as it was found, dense or with its own thresholds, whatever is done to it in between."""
    config = getattr(unwrap(model), "config", None)
    config = getattr(config, "quantization_config", None) if sparse_mlps(model) else None
    before = {module: module.sparse for module in sparse_mlps(model).values()}
    try:
        yield
    finally:
        for module, sparse in before.items():
            module.sparse = sparse
        if isinstance(config, CatsConfig):
            sparsify(model, config)
        else:
            densify(model)
