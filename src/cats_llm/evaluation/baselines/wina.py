"""WINA (arXiv 2505.19427): of every token the inputs with the smallest |x_i| ||W[:, i]|| are skipped.

Here in every linear layer of the decoder layers, the same share in each.
"""

import torch
from torch import Tensor, nn

from cats_llm.checkpoint.config import check_sparsity
from cats_llm.errors import CatsError
from cats_llm.evaluation.baselines.input_mask import InputConfig, Keep, decoder_linears
from cats_llm.evaluation.method_data import MethodData


def wina(model: nn.Module, data: MethodData, sparsity: float) -> InputConfig:
    """The same share in every linear layer; nothing is learned from data."""
    names = [name for linears in decoder_linears(model).values() for name in linears]
    return InputConfig(check_sparsity(sparsity), dict.fromkeys(names, sparsity))


def keep_largest(config: InputConfig, name: str, linear: nn.Linear) -> Keep:
    """The rule: of each token the inputs with the largest ``|x_i| ||W[:, i]||`` are kept. NaN counts as large."""
    norms = column_norms(name, linear)
    kept = len(norms) - round(config.linear_sparsity[name] * len(norms))

    def keep(x: Tensor) -> Tensor:
        score = x.abs() * norms.to(x.device)
        mask = torch.zeros(score.shape, dtype=torch.bool, device=x.device)
        return mask.scatter_(-1, score.topk(kept, dim=-1, sorted=False).indices, True)

    return keep


@torch.no_grad()
def column_norms(name: str, linear: nn.Linear) -> Tensor:
    """The Euclidean norm of every column of the weight, float32 (in_features,).

    Raises:
        CatsError: the weight is not in memory.
    """
    if linear.weight.is_meta:
        raise CatsError(f"wina needs the norms of {name}, which is offloaded; use a smaller --dtype or more memory.")
    norms: Tensor = torch.linalg.vector_norm(linear.weight.float(), dim=0)
    return norms
