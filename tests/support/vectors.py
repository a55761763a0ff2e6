"""Thresholds a neuron and compensation for the models of `families`, and what a model with them must compute."""

from contextlib import ExitStack

import torch
import torch.nn.functional as F

import cats_llm
import families
from cats_llm.checkpoint.layer_tensors import LayerTensors


def make_vectors(case, parts=("thresholds", "compensation"), seed=0):
    """For each layer, as many of the parts as asked for; the thresholds keep about half of the neurons."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer, t in case.config.thresholds.items():
        vectors = {
            "thresholds": t * (0.25 + 1.5 * torch.rand(families.FFN, generator=generator)),
            "compensation": torch.randn(families.HIDDEN, generator=generator) / 4,
        }
        made[layer] = LayerTensors(**{part: vectors[part] for part in parts})
    return made


def vector_config(case, parts=("thresholds", "compensation"), seed=0, **changes):
    """The case's config with vectors."""
    values = case.config.to_dict() | {"criterion": {"name": "test", "seed": seed}} | changes
    return cats_llm.CatsConfig(**values, vectors=make_vectors(case, parts, seed))


def vector_model(case, *args, **kwargs):
    """A fresh model with vectors; it shares nothing with the case's."""
    return cats_llm.sparsify(case.dense_copy(), vector_config(case, *args, **kwargs))


class Reference:
    """While it lasts, hooks make a *dense* model compute thresholds and compensation, without the package's code.

    ``sparse``, bool (B, T), tells which tokens are sparse; None, all are.
    """

    def __init__(self, model, family, config, sparse=None):
        self.model, self.family, self.config, self.sparse = model, family, config, sparse

    def __enter__(self):
        self.stack = ExitStack()
        for layer, number in self.config.thresholds.items():
            vectors = (self.config.vectors or {}).get(layer) or LayerTensors()

            def hook(module, args, output, t=number, own=vectors):
                t = t if own.thresholds is None else own.thresholds
                y = families.reference_mlp(module, args[0], t, self.family.act, self.family.fused)
                if own.compensation is not None:
                    y = y + own.compensation.to(y.dtype)
                if self.sparse is None:
                    return y
                dense = families.reference_mlp(module, args[0], 0.0, self.family.act, self.family.fused)
                return torch.where(self.sparse[..., None], y, dense)

            mlp = self.model.get_submodule(self.family.mlp.format(layer))
            self.stack.callback(mlp.register_forward_hook(hook).remove)
        return self.model

    def __exit__(self, *args):
        self.stack.close()


def reference_logits(case, config, dtype=torch.float32, ids=None, sparse=None):
    """Logits of the case's model with the config, computed in `dtype` without the package's code."""
    with Reference(case.dense_copy().to(dtype), case.family, config, sparse) as model:
        return families.logits(model, case.ids if ids is None else ids)


def gated_mlp(module, x, threshold, compensation, activation=F.silu):
    """The formula in float64 for a module with gate_proj or gate_up_proj, from the gate as the module rounds it."""

    def linear(x, name):
        projection = getattr(module, name)
        bias = None if projection.bias is None else projection.bias.double()
        return F.linear(x, projection.weight.double(), bias)

    if hasattr(module, "gate_up_proj"):
        gate, up = linear(x.double(), "gate_up_proj").chunk(2, -1)
    else:
        gate, up = linear(x.double(), "gate_proj"), linear(x.double(), "up_proj")
    a = activation(gate.to(x.dtype).double())
    a = torch.where(a.abs() < threshold.double(), 0.0, a)
    y = linear(a * up, "down_proj")
    return y if compensation is None else y + compensation.double()
