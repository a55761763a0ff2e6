"""TEAL (arXiv 2408.14690): inputs x_i of a linear layer are skipped where |x_i| is below a threshold of that layer.

The threshold is a quantile of the |x_i| of the calibration tokens in the dense model. Here in every linear layer of the
decoder layers, the same share in each (TEAL's uniform allocation); `teal_greedy` allocates. Ours: quantiles are exact,
where TEAL takes them from a coarser histogram.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from cats_llm.calibration.batches import Inputs, padding_mask, rows_of, run_decoder
from cats_llm.calibration.distribution import GateHistogram, MagnitudeDistribution
from cats_llm.checkpoint.config import check_sparsity
from cats_llm.errors import CatsError
from cats_llm.evaluation.baselines.input_mask import InputConfig, Keep, decoder_linears
from cats_llm.evaluation.method_data import MethodData
from cats_llm.kernels.definition import keep_mask
from cats_llm.model.sparsify import as_dense
from cats_llm.model.structure import eval_mode, execution_device

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


def teal(model: nn.Module, data: MethodData, sparsity: float) -> InputConfig:
    """Thresholds of the same share for every linear layer.

    Raises:
        CatsError: there is no calibration text, or activations are NaN or infinite.
    """
    learned = distributions("teal", model, data)
    return threshold_config(data, sparsity, learned, dict.fromkeys(learned, sparsity))


def keep_large(config: InputConfig, name: str, linear: nn.Linear) -> Keep:
    """The rule: what is not smaller than the layer's threshold in magnitude is kept."""
    return not_below(config.thresholds[name])


def not_below(threshold: float) -> Keep:
    """Keep what is not smaller than the threshold in magnitude. NaN is kept, and so shows."""
    limit = torch.tensor(threshold, dtype=torch.float32, device="cpu")  # compares with tensors anywhere
    return lambda x: keep_mask(x, limit)


def threshold_config(
    data: MethodData,
    sparsity: float,
    learned: Mapping[str, MagnitudeDistribution],
    shares: Mapping[str, float],
) -> InputConfig:
    """Thresholds for the share of inputs that each linear layer is to skip."""
    chosen = {name: learned[name].threshold(share) for name, share in shares.items()}
    return InputConfig(
        check_sparsity(sparsity),
        {name: share for name, (_, share) in chosen.items()},
        {name: threshold for name, (threshold, _) in chosen.items()},
        calibration=data.profile.record if data.profile is not None else {},
    )


@torch.no_grad()
def distributions(method: str, model: nn.Module, data: MethodData) -> dict[str, MagnitudeDistribution]:
    """Of the |x_i| of every linear layer's input, by its path; learned once. 8 MiB a layer and distinct input.

    Args:
        method: for the error.
        model: dense, or taken as the dense model it came from.
        data: needs text. Padding does not count.

    Raises:
        CatsError: there is no calibration text, or activations are NaN or infinite.
    """
    if "inputs" in data.learned:
        known: dict[str, MagnitudeDistribution] = data.learned["inputs"]
        return known
    batches = data.text(method)
    linears = {name: linear for layer in decoder_linears(model).values() for name, linear in layer.items()}
    leaders = _leaders(model, linears, batches[0])
    histograms = {name: GateHistogram(execution_device(linears[name])) for name in dict.fromkeys(leaders.values())}
    mask: Tensor | None = None

    def hook(histogram: GateHistogram) -> Hook:
        def count(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            histogram.add(rows_of(args[0], mask))

        return count

    with ExitStack() as stack, eval_mode(model), as_dense(model):
        for name, histogram in histograms.items():
            stack.callback(linears[name].register_forward_pre_hook(hook(histogram)).remove)
        for batch in batches:
            mask = padding_mask(batch)
            run_decoder(model, batch)
    for name, histogram in histograms.items():
        if histogram.not_finite:
            raise CatsError(
                f"the inputs of {name} are NaN or infinite; the weights are damaged or the dtype overflows: try "
                "--dtype float32."
            )
    magnitudes = {name: histogram.distribution(nn.Identity()) for name, histogram in histograms.items()}
    data.learned["inputs"] = {name: magnitudes[leader] for name, leader in leaders.items()}
    return dict(data.learned["inputs"])


def _leaders(model: nn.Module, linears: Mapping[str, nn.Linear], batch: Inputs) -> dict[str, str]:
    """For every linear layer that text runs through, the first one with the same input (q_proj for k_proj)."""
    seen: list[tuple[Tensor, str]] = []
    leaders: dict[str, str] = {}

    def hook(name: str) -> Hook:
        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            leaders[name] = next((leader for x, leader in seen if x is args[0]), name)
            if leaders[name] == name:
                seen.append((args[0], name))  # held, so that no other tensor is taken for it

        return note

    with ExitStack() as stack, eval_mode(model), as_dense(model):
        for name, linear in linears.items():
            stack.callback(linear.register_forward_pre_hook(hook(name)).remove)
        run_decoder(model, {"input_ids": batch["input_ids"][:1, :2]})
    return {name: leaders[name] for name in linears if name in leaders}
