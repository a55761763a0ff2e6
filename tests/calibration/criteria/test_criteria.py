"""Criteria: what is known of neurons, the scores, and what fitting them to a model gives."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

import cats_llm
import families
import vectors
from cats_llm.calibration.batches import CalibrationText
from cats_llm.calibration.criteria.allocation import least_cost
from cats_llm.calibration.criteria.criterion import CANDIDATES, PARTS, Criterion
from cats_llm.calibration.criteria.distill import Distillation
from cats_llm.calibration.criteria.divergence import log_perplexity, logits_of, mean_divergence
from cats_llm.calibration.criteria.fit import fit
from cats_llm.calibration.criteria.scores import SCORES
from cats_llm.calibration.criteria.search import find_config, split
from cats_llm.calibration.criteria.statistics import BINS, LayerStatistics, statistics_of
from cats_llm.calibration.criteria.target import AUTO, SparsityTarget, sparsity_for_bytes
from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.errors import CatsError
from cats_llm.evaluation.methods import method
from cats_llm.evaluation.variants import make_variants
from cats_llm.model.structure import find_gated_mlps
from cats_llm.model.weight_traffic import bytes_per_token

pytestmark = pytest.mark.usefixtures("one_thread")

D, F_ = families.HIDDEN, families.FFN
TEXT = [families.ids(4, 40, seed) for seed in range(3)]
FULL = "moment+compensate+sequential"


@pytest.fixture
def mlp(llama):
    return find_gated_mlps(llama.dense)[0]


@pytest.fixture
def sample():
    """Hidden activations of 600 tokens: skewed, with u that depends on the gate."""
    generator = torch.Generator().manual_seed(3)
    gate = torch.randn(600, F_, generator=generator) * torch.linspace(0.2, 3, F_)
    a = torch.nn.functional.silu(gate)
    u = torch.randn(600, F_, generator=generator) * torch.linspace(3, 0.1, F_) + 0.3 * a
    return a, u


def gradients(a, u):
    """The gradient by h that these tests take: other neurons and other tokens matter than those that are large."""
    return (2 - a.tanh()) * torch.linspace(0.1, 2, F_, dtype=a.dtype) / (1 + u.abs())


def counted(mlp, a, u, parts=1):
    statistics = LayerStatistics(mlp, gradients=True)
    for a_part, u_part in zip(a.chunk(parts), u.chunk(parts), strict=True):
        statistics.add(a_part, u_part, gradients(a_part, u_part))
    return statistics


def dropped_cost(a, u, weight, thresholds):
    """Weighted squared error of h with independent neurons and compensated means, in float64, from the definition."""
    h = torch.where(a.abs() < thresholds, a * u, torch.zeros_like(a)).double()
    return float(((h - h.mean(0)).square() * weight).sum())


# --- statistics ---


def test_statistics_are_sums_over_tokens(mlp, sample):
    a, u = (t.double() for t in sample)
    s = counted(mlp, *sample)
    assert int(s.tokens) == 600
    torch.testing.assert_close(s.up, u.abs().sum(0))
    torch.testing.assert_close(s.up_squared, u.square().sum(0))
    torch.testing.assert_close(s.hidden.sum(1), (a * u).sum(0))
    torch.testing.assert_close(s.hidden_squared.sum(1), (a * u).square().sum(0))
    torch.testing.assert_close(s.down_norm, mlp.down_linear.weight.double().norm(dim=0))
    edges = [*s.edges.double().tolist(), math.inf]
    for neuron, b in itertools.product((0, 17, F_ - 1), range(BINS)):
        inside = (a[:, neuron].abs() >= edges[b]) & (a[:, neuron].abs() < edges[b + 1])
        assert int(s.counts[neuron, b]) == int(inside.sum()), (neuron, b)
        torch.testing.assert_close(s.hidden[neuron, b], (a * u)[inside, neuron].sum())
        squared = gradients(*sample)[inside, neuron].double().square()
        h = (a * u)[inside, neuron]
        torch.testing.assert_close(s.sensitivity[neuron, b], squared.sum())
        torch.testing.assert_close(s.sensitivity_hidden[neuron, b], (squared * h).sum())
        torch.testing.assert_close(s.sensitivity_hidden_squared[neuron, b], (squared * h.square()).sum())


def test_statistics_do_not_depend_on_the_split_and_merge(mlp, sample):
    whole, parts = counted(mlp, *sample), counted(mlp, *sample, parts=7)
    merged = counted(mlp, *(t[:200] for t in sample))
    for mine, other in zip(merged.tensors(), counted(mlp, *(t[200:] for t in sample)).tensors(), strict=True):
        mine += other
    for one in (parts, merged):
        for mine, other in zip(one.tensors(), whole.tensors(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-9)
        for score in SCORES.values():
            assert torch.equal(score(one, 0.6), score(whole, 0.6))


def test_extreme_values_are_counted(mlp):
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 6e-5, 1e3, -1e30]).repeat(F_, 1).T
    s = counted(mlp, values, torch.ones_like(values))
    assert float(s.counts.sum()) == 7 * F_
    assert float(s.counts[0, 0]) == 5  # the bins begin at 2^-14
    assert float(s.counts[0, -1]) == 2


@pytest.mark.parametrize("k", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("score", SCORES)
def test_thresholds_from_bins_reach_the_sparsity(mlp, sample, score, k):
    a, u = sample
    s = counted(mlp, a, u)
    thresholds = s.thresholds(SCORES[score](s, k), k)
    below = a.abs() < thresholds
    assert abs(float(below.double().mean()) - k) < 0.01
    mean = torch.where(below, a * u, torch.zeros_like(a)).double().mean(0)
    # neurons whose threshold falls inside a bin are interpolated
    assert float((s.dropped_mean(thresholds) - mean).norm() / (a * u).double().mean(0).norm()) < 0.05


def test_what_is_dropped_below_edges_is_exact(mlp, sample):
    a, u = sample
    s = counted(mlp, a, u)
    thresholds = s.edges[60 + torch.arange(F_) % 60].double()
    mean = torch.where(a.abs() < thresholds, a * u, torch.zeros_like(a)).double().mean(0)
    torch.testing.assert_close(s.dropped_mean(thresholds), mean)


# --- scores ---


def test_scores_by_their_formulas(mlp, sample):
    _, u = (t.double() for t in sample)
    norm = mlp.down_linear.weight.detach().double().norm(dim=0)
    expected = {
        "cats": torch.ones(F_, dtype=torch.float64),
        "chess": u.abs().mean(0),
        "norm": u.square().mean(0).sqrt() * norm,
    }
    s = counted(mlp, *sample)
    for name, weights in expected.items():
        made = SCORES[name](s, 0.5)
        assert made.dtype == torch.float32
        torch.testing.assert_close(made.double(), weights / weights.max(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("best", ["moment", "fisher"])
def test_a_score_of_least_error_costs_less_than_any_other(mlp, sample, best, k):
    a, u = sample
    s = counted(mlp, a, u)
    weight = s.down_norm.square() if best == "moment" else gradients(a.double(), u.double()).square()

    def cost(score):
        weights = score(s, k).double()
        # exactly the same number of dropped activations for all
        order = (a.abs().double() * weights).flatten().sort().values
        return dropped_cost(a.double(), u.double(), weight, float(order[int(k * a.numel())]) / weights)

    costs = {name: cost(score) for name, score in SCORES.items()}
    assert min(costs, key=costs.get) == best, costs
    assert costs[best] < 0.97 * costs["cats"]


def test_moment_drops_first_what_a_constant_replaces(mlp):
    """A neuron whose contribution never changes costs nothing once its mean is compensated."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(400, F_, generator=generator) + 0.5
    u = torch.randn(400, F_, generator=generator)
    a[:, 5], u[:, 5] = 1.9, 7.0  # large, and always the same
    s = counted(mlp, a, u)
    thresholds = s.thresholds(SCORES["moment"](s, 0.1), 0.1)
    assert float(thresholds[5]) > 1.9
    assert float(s.thresholds(SCORES["norm"](s, 0.1), 0.1)[5]) < 0.5


@pytest.mark.parametrize("score", SCORES)
def test_scores_of_dead_neurons_are_finite(mlp, score):
    a, u = torch.randn(50, F_), torch.randn(50, F_)
    u[:, :3] = 0
    a[:, 3:6] = 0
    for hidden in ((a, u), (torch.zeros_like(a), u), (a, torch.zeros_like(u))):
        weights = SCORES[score](counted(mlp, *hidden), 0.5)
        assert bool(weights.isfinite().all())
        assert bool((weights > 0).all())


# --- gradients ---


def labels_by_hand(logits, ids):
    """Labels drawn from the predictions by inverting their distribution at one uniform number a token."""
    labels = []
    for row, tokens in zip(logits.double().softmax(-1), ids, strict=True):
        uniform = torch.rand(len(tokens), generator=torch.Generator().manual_seed(int(tokens.sum())))
        labels.append([int((p.cumsum(0) < x).sum()) for p, x in zip(row, uniform, strict=True)])
    return torch.tensor(labels)


def test_gradients_are_those_of_drawn_labels(split_or_fused):
    """Against autograd through the plain model, by the h that down_proj receives."""
    case, ids = split_or_fused, TEXT[0]
    kept, model = {}, case.dense_copy()
    mlps = find_gated_mlps(model)
    for mlp in mlps:
        # kept tensors are part of the graph, so autograd can be asked for their gradients
        mlp.down_linear.register_forward_pre_hook(lambda _, args, layer=mlp.layer: kept.update({layer: args[0]}))
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels_by_hand(logits.detach(), ids).flatten(), reduction="sum"
    )
    expected = dict(zip(kept, torch.autograd.grad(loss, list(kept.values())), strict=True))
    plain = case.dense_copy()
    found = statistics_of(plain, find_gated_mlps(plain), CalibrationText([{"input_ids": ids}], TokenPolicy()), True)
    for layer, gradient in expected.items():
        squared, h = gradient.double().square().flatten(0, 1), kept[layer].detach().double().flatten(0, 1)
        s = found[layer]
        sums = (s.sensitivity, s.sensitivity_hidden, s.sensitivity_hidden_squared)
        for power, mine in enumerate(sums):
            wanted = (squared * h**power).sum(0)
            torch.testing.assert_close(mine.sum(1), wanted, rtol=1e-3, atol=1e-9, msg=f"layer {layer}, h^{power}")
        torch.testing.assert_close(s.hidden.sum(1), h.sum(0), rtol=1e-4, atol=1e-5)
    assert not any(p.grad is not None for p in plain.parameters())


def test_fisher_needs_predictions(llama):
    with pytest.raises(CatsError, match="the criterion fisher"):
        fit(llama.dense_copy().model, TEXT, 0.5, Criterion.parse("fisher"))


# --- the name of a criterion ---


def test_a_criterion_is_its_name():
    assert Criterion.parse("cats") == Criterion()
    assert Criterion().plain
    assert Criterion().to_dict() == {}
    made = Criterion.parse("norm + sequential+compensate")
    assert made == Criterion("norm", compensate=True, sequential=True)
    assert str(made) == "norm+compensate+sequential"
    assert Criterion.parse("moment+distill") == Criterion("moment", compensate=True, distill=True)
    for score, number in itertools.product(SCORES, range(1 << len(PARTS))):
        parts = {part: bool(number >> i & 1) for i, part in enumerate(PARTS)}
        made = Criterion(score, **parts)
        assert Criterion.parse(str(made)) == made
        assert Criterion.parse(made.to_dict().get("name", "cats")) == made


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wanda", "'wanda' is no score; choose from cats, chess, norm, moment, fisher"),
        ("cats+bias", "'bias' in the criterion 'cats\\+bias' is no part"),
        ("", "'' is no score"),
        ("cats+", "'' in the criterion"),
    ],
)
def test_a_wrong_criterion_is_one_sentence(name, message):
    with pytest.raises(CatsError, match=message):
        Criterion.parse(name)


# --- fitting ---


def inputs_of(case, config, layer, ids):
    """What the MLP of ``layer`` gets when the layers below it compute as the config says, by hooks on a dense model."""
    model = case.dense_copy()
    kept = {}

    def sparse(below):
        t = config.thresholds[below]
        own = (config.vectors or {}).get(below)

        def hook(module, args, output):
            found = t if own is None or own.thresholds is None else own.thresholds
            y = families.reference_mlp(module, args[0], found, case.family.act, case.family.fused)
            return y if own is None or own.compensation is None else y + own.compensation

        return hook

    for below in range(layer):
        model.get_submodule(case.family.mlp.format(below)).register_forward_hook(sparse(below))
    target = model.get_submodule(case.family.mlp.format(layer))
    target.register_forward_pre_hook(lambda module, args: kept.update(x=args[0]))
    families.logits(model, ids)
    return target, kept["x"].reshape(-1, D)


def gate_and_up(mlp, x, fused):
    if fused:
        both = torch.nn.functional.linear(x, mlp.gate_up_proj.weight, mlp.gate_up_proj.bias)
        return both.chunk(2, -1)
    return mlp.gate_proj(x), mlp.up_proj(x)


@pytest.mark.parametrize(
    "criterion",
    ["cats+sequential", "norm+compensate+sequential", FULL, "fisher+compensate+sequential", "chess+compensate"],
)
def test_sparsity_and_compensation_are_those_of_the_calibration_text(split_or_fused, criterion):
    case, ids = split_or_fused, torch.cat(TEXT)
    config = fit(case.dense_copy(), TEXT, 0.6, Criterion.parse(criterion))
    sequential = "sequential" in criterion
    for layer, t in config.thresholds.items():
        own = (config.vectors or {}).get(layer)
        threshold = t if own is None or own.thresholds is None else own.thresholds
        if sequential:
            mlp, x = inputs_of(case, config, layer, ids)
        else:
            mlp, x = inputs_of(case, cats_llm.CatsConfig(dict.fromkeys(config.thresholds, 0.0)), layer, ids)
        with torch.no_grad():
            gate, up = gate_and_up(mlp, x, case.family.fused)
            a = case.family.act(gate)
            below = a.abs() < threshold
            share = float(below.double().mean())
            assert abs(share - 0.6) < 2e-3, f"layer {layer}: {share}"
            assert abs(share - config.layer_sparsity[layer]) < 1e-3
            if "compensate" not in criterion:
                assert own is None or own.compensation is None
                continue
            lost = torch.where(below, a * up, torch.zeros_like(a)).double().mean(0)
            expected = lost @ mlp.down_proj.weight.double().T
            torch.testing.assert_close(own.compensation.double(), expected, rtol=1e-3, atol=1e-4)


def test_every_family_is_fitted_and_answers_as_the_reference(case):
    config = fit(case.dense_copy(), [case.ids], 0.5, Criterion.parse(FULL), data="random")
    assert config.criterion["name"] == FULL
    assert config.calibration["tokens"] == case.ids.numel()
    model = cats_llm.sparsify(case.dense_copy(), config)
    torch.testing.assert_close(
        families.logits(model, case.ids), vectors.reference_logits(case, config), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("criterion", ["cats+compensate", "fisher+sequential+allocate+distill"])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_model_is_left_as_it_was(llama, criterion, sparse):
    model = llama.sparse() if sparse else llama.dense_copy()
    model.train()
    model.model.layers[0].self_attn.eval()
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    modes = {name: m.training for name, m in model.named_modules()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    kinds = {name: type(m) for name, m in model.named_modules()}
    expected = families.logits(model.eval(), llama.ids)
    model.train()
    model.model.layers[0].self_attn.eval()
    fit(model, TEXT, 0.5, Criterion.parse(criterion), distillation=Distillation(steps=2))
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert torch.equal(families.logits(model.eval(), llama.ids), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_model_is_left_as_it_was_after_an_error(llama):
    model = llama.dense_copy()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[3] = math.nan
    kinds = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(CatsError, match="layer 1 are NaN or infinite"):
        fit(model, TEXT, 0.5, Criterion.parse(FULL))
    assert {name: type(m) for name, m in model.named_modules()} == kinds


def test_a_sparse_model_is_fitted_as_the_dense_one(llama):
    criterion = Criterion.parse(FULL)
    one, other = (fit(model, TEXT, 0.5, criterion) for model in (llama.dense_copy(), llama.sparse()))
    assert one.vectors_sha256 == other.vectors_sha256


def test_batches_of_other_sizes_give_the_same(llama):
    ids = torch.cat(TEXT)
    criterion = Criterion.parse(FULL)
    one, other = (fit(llama.dense_copy(), list(ids.split(n)), 0.5, criterion) for n in (2, 12))
    for layer in one.thresholds:
        for mine, theirs in zip(
            (one.vectors[layer].thresholds, one.vectors[layer].compensation),
            (other.vectors[layer].thresholds, other.vectors[layer].compensation),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4)


def test_padding_is_not_learned_from(llama):
    ids = torch.cat(TEXT)[:, :30]
    padded = torch.nn.functional.pad(ids, (0, 10), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 10))
    criterion = Criterion.parse("moment+compensate+sequential+allocate")
    one = fit(llama.dense_copy(), [ids], 0.5, criterion)
    other = fit(llama.dense_copy(), [{"input_ids": padded, "attention_mask": mask}], 0.5, criterion)
    assert other.calibration["tokens"] == ids.numel()
    for layer in one.thresholds:
        assert abs(one.layer_sparsity[layer] - other.layer_sparsity[layer]) < 0.01
        torch.testing.assert_close(
            one.vectors[layer].compensation, other.vectors[layer].compensation, rtol=0.05, atol=0.01
        )


def test_predictions_of_padding_do_not_count(llama):
    ids = TEXT[0][:, :30]
    padded = {
        "input_ids": torch.nn.functional.pad(ids, (0, 10), value=7),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (0, 10)),
    }
    model = llama.sparse()
    assert log_perplexity(llama.dense, [padded]) == pytest.approx(math.log(perplexity(llama.dense, ids)), rel=1e-5)
    found = mean_divergence(model, [padded], [logits_of(llama.dense, padded)])
    assert found == pytest.approx(divergence(model, families.logits(llama.dense, ids), ids), rel=1e-4)


def test_first_tokens_that_stay_dense_are_left_out(llama):
    """The dense tokens of a sequence may be anything: neither thresholds nor compensation see them."""
    ids = torch.cat(TEXT)
    config = fit(llama.dense_copy(), [ids], 0.5, Criterion.parse("cats+compensate"), coverage=TokenPolicy(False, 8))
    assert config.coverage.dense_first_tokens == 8
    assert config.calibration["tokens"] == ids[:, 8:].numel()
    mlp, x = inputs_of(llama, cats_llm.CatsConfig({0: 0.0, 1: 0.0}), 0, ids)
    with torch.no_grad():
        kept = x.view(*ids.shape, D)[:, 8:].reshape(-1, D)
        a = torch.nn.functional.silu(mlp.gate_proj(kept))
    assert abs(float((a.abs() < config.thresholds[0]).double().mean()) - 0.5) < 2e-3


def test_sparsity_zero_keeps_everything(llama):
    for name in ("cats+compensate", "fisher+sequential+allocate+distill"):
        config = fit(llama.dense_copy(), TEXT, 0.0, Criterion.parse(name))
        model = cats_llm.sparsify(llama.dense_copy(), config)
        torch.testing.assert_close(families.logits(model, llama.ids), llama.dense_logits)


@pytest.mark.parametrize(
    ("batches", "message"), [([], "nothing to calibrate on"), ([torch.zeros(0, 5, dtype=torch.long)], "nothing to")]
)
def test_no_text_is_one_sentence(llama, batches, message):
    with pytest.raises(CatsError, match=message):
        fit(llama.dense_copy(), batches, 0.5, Criterion.parse(FULL))


def test_a_16_bit_model_is_fitted(split_or_fused):
    model = split_or_fused.dense_copy().to(torch.bfloat16)
    config = fit(model, TEXT, 0.5, Criterion.parse("moment+sequential+distill"), distillation=Distillation(steps=4))
    sparse = cats_llm.sparsify(model, config)
    assert bool(families.logits(sparse, TEXT[0]).isfinite().all())
    assert all(abs(k - 0.5) < 0.01 for k in config.layer_sparsity.values())


# --- allocation ---


def test_allocation_is_the_best_of_all():
    """Against every combination of the measured points, for curves that are convex."""
    grid = [0.25, 0.5, 0.75, 1.0]
    costs = [[s * k**2 for k in grid] for s in (1.0, 4.0, 0.5)]
    sizes = [1.0, 2.0, 1.0]
    shares = least_cost([grid] * 3, costs, sizes, 0.5)
    assert abs(sum(s * k for s, k in zip(sizes, shares, strict=True)) / 4 - 0.5) < 1e-9

    def total(ks):
        return sum(c[-1] * k**2 for c, k in zip(costs, ks, strict=True))

    fine = [i / 40 for i in range(41)]
    best = min(
        total(ks) for ks in itertools.product(fine, repeat=3) if sum(s * k for s, k in zip(sizes, ks, strict=True)) >= 2
    )
    assert total(shares) <= best * 1.01


def test_equal_layers_share_equally():
    grid = [0.3, 0.6, 0.9]
    assert least_cost([grid] * 4, [[0.1, 0.5, 2.0]] * 4, [3, 3, 3, 3], 0.7) == pytest.approx([0.7] * 4, abs=0.01)


@pytest.mark.parametrize("k", [0.01, 0.5, 0.96])
def test_allocation_meets_any_budget_and_survives_noise(k):
    grid = [0.2, 0.5, 0.8, 0.97]
    costs = [[0.1, 0.05, 0.3, 4.0], [0.0, 0.0, 0.0, 0.0], [-1e-9, 0.2, 0.2, 0.3]]
    sizes = [1.0, 1.0, 3.0]
    shares = least_cost([grid] * 3, costs, sizes, k)
    assert abs(sum(s * x for s, x in zip(sizes, shares, strict=True)) / 5 - k) < 1e-6
    assert all(0 <= x <= 0.97 + 1e-9 for x in shares)


def test_the_layer_that_matters_less_is_made_sparser(llama):
    model = llama.dense_copy()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.01)
    config = fit(model, TEXT, 0.5, Criterion.parse("cats+allocate"))
    assert config.layer_sparsity[0] > config.layer_sparsity[1] + 0.3
    assert abs(sum(config.layer_sparsity.values()) / 2 - 0.5) < 0.01


# --- distillation ---


def divergence(model, expected, ids):
    log_p, log_q = families.logits(model, ids).double().log_softmax(-1), expected.double().log_softmax(-1)
    return float((log_q.exp() * (log_q - log_p)).sum(-1).mean())


def test_distillation_brings_the_model_closer_to_the_dense_one(split_or_fused):
    case, ids = split_or_fused, torch.cat(TEXT)
    expected = families.logits(case.dense, ids)
    made = {}
    for name in ("cats+compensate+sequential", "cats+sequential+distill"):
        config = fit(
            case.dense_copy(), TEXT, 0.7, Criterion.parse(name), distillation=Distillation(steps=60, rate=0.05)
        )
        made[name] = divergence(cats_llm.sparsify(case.dense_copy(), config), expected, ids)
        assert all(abs(k - 0.7) < 0.01 for k in config.layer_sparsity.values())
    assert made["cats+sequential+distill"] < 0.98 * made["cats+compensate+sequential"], made


def test_distillation_is_repeatable_and_recorded(llama):
    settings = Distillation(steps=6, rate=0.03, seed=4)
    criterion = Criterion.parse("moment+distill")
    one, other = (fit(llama.dense_copy(), TEXT, 0.5, criterion, distillation=settings) for _ in range(2))
    assert one.vectors_sha256 == other.vectors_sha256
    assert one.criterion["distillation"] == {"steps": 6, "rate": 0.03, "rounds": 2, "seed": 4}
    third = fit(llama.dense_copy(), TEXT, 0.5, criterion, distillation=Distillation(steps=6, rate=0.03, seed=5))
    assert third.vectors_sha256 != one.vectors_sha256


@pytest.mark.parametrize("settings", [{"steps": 0}, {"rounds": 0}, {"rate": 0.0}, {"rate": math.nan}])
def test_wrong_settings_are_one_sentence(settings):
    with pytest.raises(CatsError, match="at least one step"):
        Distillation(**settings)


# --- choosing ---


def test_auto_takes_what_measures_best_on_text_held_back(llama):
    batches = [families.ids(2, 40, seed) for seed in range(9)]
    target = SparsityTarget(sparsity=0.6, criterion=AUTO, distill_steps=4)
    chosen = find_config(llama.dense_copy(), batches, target)
    assert list(chosen.measured) == [str(c) for c in CANDIDATES]
    assert split(batches)[1] == batches[-1:]
    expected = families.logits(llama.dense, batches[-1])
    for criterion in CANDIDATES[:2]:
        if criterion.plain:
            config = cats_llm.calibrate(llama.dense_copy(), batches[:-1]).config(0.6)
        else:
            config = fit(llama.dense_copy(), batches[:-1], 0.6, criterion)
        found = divergence(cats_llm.sparsify(llama.dense_copy(), config), expected, batches[-1])
        assert chosen.measured[str(criterion)] == pytest.approx(found, rel=1e-3)
    best = min(chosen.measured, key=chosen.measured.get)
    assert chosen.config.criterion.get("name", "cats") == best


def test_a_profile_is_enough_for_the_papers_criterion(llama):
    profile = cats_llm.calibrate(llama.dense_copy(), TEXT)
    policy = TokenPolicy(dense_prefill=True)
    config = find_config(llama.dense, profile, SparsityTarget(sparsity=0.4, coverage=policy)).config
    assert config == profile.config(0.4).with_coverage(policy)
    by_text = find_config(llama.dense_copy(), TEXT, SparsityTarget(sparsity=0.4)).config
    assert by_text.thresholds == config.thresholds
    with pytest.raises(CatsError, match="a profile holds only what the criterion cats needs"):
        find_config(llama.dense, profile, SparsityTarget(sparsity=0.4, criterion="norm"))


def perplexity(model, ids):
    logits = families.logits(model, ids)[:, :-1].double()
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("name", ["cats", FULL])
def test_the_largest_sparsity_within_a_perplexity_increase(llama, name):
    batches = [families.ids(2, 40, seed) for seed in range(4)]
    dense = perplexity(llama.dense, batches[-1])
    chosen = find_config(llama.dense_copy(), batches, SparsityTarget(max_perplexity_increase=0.05, criterion=name))
    k = chosen.config.sparsity
    model = cats_llm.sparsify(llama.dense_copy(), chosen.config)
    assert perplexity(model, batches[-1]) / dense - 1 <= 0.05 + 1e-6
    assert chosen.measured[f"{k:g}"] == pytest.approx(perplexity(model, batches[-1]) / dense - 1, rel=1e-3, abs=1e-5)
    assert chosen.measured[f"{round(k + 0.01, 2):g}"] > 0.05


def test_an_increase_that_cannot_be_kept_is_one_sentence(llama):
    batches = [families.ids(2, 40, seed) for seed in range(2)]
    with pytest.raises(CatsError, match="allows no sparsity with the criterion cats"):
        find_config(llama.dense_copy(), batches, SparsityTarget(max_perplexity_increase=-0.9))
    with pytest.raises(CatsError, match="at least two batches"):
        find_config(llama.dense_copy(), batches[:1], SparsityTarget(max_perplexity_increase=0.1))


def test_bytes_a_token(llama):
    for k in (0.0, 0.3, 0.9):
        size = bytes_per_token(llama.dense, {0: k, 1: k}).sparse
        assert sparsity_for_bytes(llama.dense, size) == pytest.approx(k, abs=1e-4)
    with pytest.raises(CatsError, match="bytes a token cannot be had: this model reads"):
        sparsity_for_bytes(llama.dense, 1e9)
    with pytest.raises(CatsError, match="cannot be had"):
        sparsity_for_bytes(llama.dense, 10)


# --- in the harness ---


def test_every_criterion_is_a_method_of_the_harness(llama):
    names = ["norm+compensate", "cats+sequential"]
    made = make_variants(llama.dense_copy(), ["cats", *names], [0.5], llama.profile, batches=TEXT)
    assert [v.name for v in made] == ["dense", "cats k=0.5", *(f"{name} k=0.5" for name in names)]
    expected = fit(llama.dense_copy(), TEXT, 0.5, Criterion.parse(names[0]), data="random tokens")
    assert made[2].config.vectors_sha256 == expected.vectors_sha256
    assert made[2].to_dict()["criterion"]["name"] == names[0]
    assert made[1].to_dict()["criterion"] is None
    assert len({str(v.settings()) for v in made}) == 4
    with method(names[0]).applied(model := llama.dense_copy(), made[2].config):
        found = families.logits(model, llama.ids)
    torch.testing.assert_close(found, vectors.reference_logits(llama, expected), rtol=1e-3, atol=1e-3)


def test_a_method_that_is_none_and_a_criterion_without_text_are_one_sentence(llama):
    with pytest.raises(CatsError, match="'magic' is no method; choose from dense, cats"):
        method("magic")
    with pytest.raises(CatsError, match="the method norm learns from text"):
        make_variants(llama.dense_copy(), ["norm"], [0.5], llama.profile)


# --- several processes ---

PROCESSES = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
import families
from cats_llm.calibration.criteria.criterion import Criterion
from cats_llm.calibration.criteria.distill import Distillation
from cats_llm.calibration.criteria.fit import fit

out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
torch.set_num_threads(1)
model = families.FAMILIES["llama"].build()
text = [families.ids(4, 40, seed) for seed in range(3)]
shares = [text[:2] if rank == 0 else text[2:], text if rank else []]
for i, (name, mine) in enumerate(zip(sys.argv[2:], shares)):
    config = fit(model, mine, 0.6, Criterion.parse(name), distillation=Distillation(steps=4))
    torch.save((config.vectors, config.thresholds, config.calibration["tokens"]), out / f"{i}.{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_fit_what_one_does(llama, tmp_path):
    names = [FULL, "fisher+sequential+allocate+distill"]
    (tmp_path / "script.py").write_text(PROCESSES)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), *names]
    running = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    for i, name in enumerate(names):
        one, other = (torch.load(tmp_path / f"{i}.{rank}.pt", weights_only=False) for rank in range(2))
        alone = fit(llama.dense_copy(), TEXT, 0.6, Criterion.parse(name), distillation=Distillation(steps=4))
        assert one[1] == other[1], name
        assert one[2] == alone.calibration["tokens"]
        for layer in alone.thresholds:
            for part in ("thresholds", "compensation"):
                mine = getattr(one[0][layer], part)
                assert torch.equal(mine, getattr(other[0][layer], part)), (name, layer)
                torch.testing.assert_close(mine, getattr(alone.vectors[layer], part), rtol=0.05, atol=0.02)
