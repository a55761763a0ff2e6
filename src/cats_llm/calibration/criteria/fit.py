"""Fit a criterion to a model: thresholds, and what makes up for them, from calibration text."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cats_llm.calibration.batches import CalibrationData, CalibrationText, read_batches, rows_of, run_decoder
from cats_llm.calibration.calibrate import calibrating, record_of, tell_not_run
from cats_llm.calibration.criteria.allocation import allocate
from cats_llm.calibration.criteria.criterion import Criterion
from cats_llm.calibration.criteria.distill import Distillation, distill
from cats_llm.calibration.criteria.scores import OF_GRADIENTS, SCORES
from cats_llm.calibration.criteria.sequential import run_layer_by_layer
from cats_llm.calibration.criteria.statistics import LayerStatistics, down_weight, hidden_parts, statistics_of
from cats_llm.calibration.distribution import GateHistogram
from cats_llm.checkpoint.config import CatsConfig, check_sparsity
from cats_llm.checkpoint.layer_tensors import LayerTensors
from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.distributed import gather, sum_over_processes
from cats_llm.kernels.definition import gate_activation, keep_mask
from cats_llm.model.architecture import check_predicts_tokens
from cats_llm.model.sparsify import restoring, sparse_mlps, swap_mlps
from cats_llm.model.structure import GatedMLP, find_gated_mlps, observe_inputs
from cats_llm.model.token_mask import set_token_mask

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class FittedLayer:
    """What was decided for a layer.

    Attributes:
        weights: of the score, float32 (f,).
        tau: the score's threshold.
        achieved: the gate sparsity on the calibration tokens.
        compensation: float32 (d,), or None.
    """

    weights: Tensor
    tau: float
    achieved: float
    compensation: Tensor | None = None

    @property
    def threshold(self) -> Tensor:
        """float32: (), or (f,) if neurons differ."""
        if bool((self.weights == 1).all()):
            return torch.tensor(self.tau, dtype=torch.float32, device=self.weights.device)
        return (self.tau / self.weights).clamp(max=_LARGEST)

    def tensors(self) -> LayerTensors:
        """The tensors that a config holds beside the one threshold."""
        return LayerTensors(self.threshold if self.threshold.dim() else None, self.compensation)


def fit(
    model: nn.Module,
    batches: CalibrationData,
    sparsity: float,
    criterion: Criterion,
    *,
    coverage: TokenPolicy | None = None,
    data: str | None = None,
    distillation: Distillation | None = None,
    notify: Callable[[str], None] | None = None,
    tokenizer: Any = None,
) -> CatsConfig:
    """Thresholds and vectors of a model for a gate sparsity.

    The model is at the end what it was before. Under torch.distributed each process passes its share of the batches,
    and all get the same config.

    Args:
        model: a model of text with gated MLPs, dense or CATS (then its dense function is calibrated). Layers that text
            does not reach stay dense.
        batches: calibration text, see `read_batches`; it is read several times, so it is kept.
        sparsity: k, in [0, 1); with ``criterion.allocate``, the average over the MLPs' weights.
        criterion: what to decide by.
        coverage: which tokens will be sparse. First tokens that stay dense are left out of the statistics.
        data: what the text is, for the record.
        distillation: how the compensation is learned, with ``criterion.distill``.
        notify: told in a few words what is being done.
        tokenizer: needed where the text comes as strings.

    Raises:
        CatsError: as `calibrate`; a sparsity out of range; or the criterion needs predictions that the model does not
            make.
    """
    check_sparsity(sparsity)
    if criterion.allocate or criterion.distill or criterion.score in OF_GRADIENTS:
        check_predicts_tokens(model, f"the criterion {criterion}")
    say = notify or (lambda _: None)
    coverage = coverage or TokenPolicy()
    with calibrating(model), restoring(model):
        read = read_batches(model, batches, tokenizer)
        text = CalibrationText(read, TokenPolicy(dense_first_tokens=coverage.dense_first_tokens))
        swap_mlps(find_gated_mlps(model))
        for module in sparse_mlps(model).values():
            module.sparse = False  # it computes the dense function
        swapped = find_gated_mlps(model)
        reached = _reached(model, swapped, text)
        not_run = tell_not_run(swapped, reached)
        mlps = [mlp for mlp in swapped if mlp.layer in reached]
        shares, weights = _by_dense_model(model, mlps, text, criterion, sparsity, say)
        say("fitting thresholds")
        layers = _through_layers(model, mlps, text, shares, criterion, weights)
        settings: dict[str, Any] = {}
        if criterion.distill and sparsity > 0:
            distillation = distillation or Distillation()
            settings["distillation"] = asdict(distillation)
            for part in range(distillation.rounds):
                say(f"learning the compensation ({part + 1} of {distillation.rounds})")
                compensation = distill(model, mlps, text, distillation, part)
                # what the layers receive has changed, so their thresholds follow
                weights = {layer: fitted.weights for layer, fitted in layers.items()}
                layers = _through_layers(model, mlps, text, shares, criterion, weights, compensation)
    return CatsConfig(
        thresholds={layer: fitted.tau for layer, fitted in layers.items()} | dict.fromkeys(not_run, 0.0),
        sparsity=sparsity,
        layer_sparsity={layer: fitted.achieved for layer, fitted in layers.items()} | dict.fromkeys(not_run, 0.0),
        calibration=record_of(model, text.totals, data, not_run),
        criterion=criterion.to_dict() | settings,
        vectors={layer: fitted.tensors() for layer, fitted in layers.items()},
    ).with_coverage(coverage)


def _by_dense_model(
    model: nn.Module,
    mlps: list[GatedMLP],
    text: CalibrationText,
    criterion: Criterion,
    sparsity: float,
    say: Callable[[str], None],
) -> tuple[dict[int, float], dict[int, Tensor] | None]:
    """What the dense model decides: the share of every layer, and a score's weights if they come from gradients.

    The statistics, which are large, are gone afterwards.
    """
    shares = dict.fromkeys((mlp.layer for mlp in mlps), sparsity)
    gradients, allocates = criterion.score in OF_GRADIENTS, criterion.allocate and sparsity > 0
    if not gradients and not allocates:
        return shares, None
    say("gathering statistics")
    statistics = statistics_of(model, mlps, text, gradients)
    if allocates:
        say("measuring the error of every layer")
        shares = allocate(model, mlps, text, criterion, sparsity, statistics)
    if not gradients:
        return shares, None
    score = SCORES[criterion.score]
    return shares, {layer: score(statistics[layer], share) for layer, share in shares.items()}


@torch.no_grad()
def _reached(model: nn.Module, mlps: list[GatedMLP], text: CalibrationText) -> set[int]:
    """The layers whose MLPs text runs through: two tokens show it."""
    reached: set[int] = set()
    with observe_inputs(mlps, lambda mlp, _: reached.add(mlp.layer)):
        for inputs in text.inputs[:1]:
            run_decoder(model, {"input_ids": inputs["input_ids"][:1, :2]})
    return set().union(*gather(reached))


@torch.no_grad()
def _through_layers(
    model: nn.Module,
    mlps: list[GatedMLP],
    text: CalibrationText,
    shares: Mapping[int, float],
    criterion: Criterion,
    weights: Mapping[int, Tensor] | None = None,
    compensation: Mapping[int, Tensor] | None = None,
) -> dict[int, FittedLayer]:
    """Decide layer by layer, and leave the model sparse by what was decided.

    Args:
        weights: of the score; None finds them from what each layer receives.
        compensation: is taken as it is; None finds it, if the criterion has one.
    """
    layers: dict[int, FittedLayer] = {}
    token_mask = set_token_mask(model, text.coverage)
    by_layer = sparse_mlps(model)
    modules = [by_layer[mlp.layer] for mlp in mlps]
    for module in modules:
        module.token_mask, module.sparse = token_mask, False

    def decide(place: int, inputs: list[Tensor]) -> None:
        mlp, module = mlps[place], modules[place]
        rows = [rows_of(x, counted) for x, counted in zip(inputs, text.counted, strict=True)]
        share = shares[mlp.layer]
        weight = _score_weights(mlp, rows, criterion, share) if weights is None else weights[mlp.layer]
        fitted = FittedLayer(weight, *_threshold(mlp, rows, weight, share), (compensation or {}).get(mlp.layer))
        if criterion.compensate and compensation is None:
            fitted = replace(fitted, compensation=_dropped_mean(mlp, rows, fitted.threshold))
        layers[mlp.layer] = fitted
        module.set_tensors(fitted.threshold, fitted.compensation, score=fitted.tau)
        module.sparse = criterion.sequential

    calls = [partial(run_decoder, model, inputs) for inputs in text.inputs]
    run_layer_by_layer(modules, calls, decide, token_mask)
    for module in modules:
        module.sparse = True
    return layers


def _score_weights(mlp: GatedMLP, rows: list[Tensor], criterion: Criterion, sparsity: float) -> Tensor:
    """The weights of the criterion's score, float32 (f,), from the inputs of an MLP, (n, d) a batch."""
    statistics = LayerStatistics(mlp)
    for x in rows:
        statistics.add(*hidden_parts(mlp, x))
    sum_over_processes(statistics.tensors())
    return SCORES[criterion.score](statistics, sparsity)


def _threshold(mlp: GatedMLP, rows: list[Tensor], weights: Tensor, sparsity: float) -> tuple[float, float]:
    """The score's threshold that gives the sparsity, and the sparsity that it gives."""
    # where all weigh the same, the gate is counted, which separates what its activation brings together
    same = bool((weights == 1).all())
    histogram = GateHistogram(weights.device)
    for x in rows:
        gate, _ = mlp.roles.gate_and_up(mlp.module, x)
        histogram.add(gate if same else gate_activation(gate, mlp.activation).abs() * weights)
    sum_over_processes(histogram.tensors())
    histogram.check(mlp.layer)
    return histogram.distribution(mlp.activation if same else lambda score: score).threshold(sparsity)


def _dropped_mean(mlp: GatedMLP, rows: list[Tensor], threshold: Tensor) -> Tensor:
    """E[((1 - m) a u)] W_down: the mean of what is dropped, (d,)."""
    w_down = down_weight(mlp)
    dropped = torch.zeros(w_down.shape[1], dtype=torch.float64, device=w_down.device)
    tokens = torch.zeros((), dtype=torch.int64, device=w_down.device)
    for x in rows:
        a, u = hidden_parts(mlp, x)
        dropped += torch.where(keep_mask(a, threshold), 0.0, a.double() * u.double()).sum(0)
        tokens += len(x)
    sum_over_processes([dropped, tokens])
    return (w_down @ (dropped / tokens)).float()
