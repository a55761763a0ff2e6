"""TEAL and WINA, simulated: against plain PyTorch in float64, on every family; counting, coverage, restoring."""

import json
import math
from contextlib import ExitStack

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

import families
from cats_llm import bundled
from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.cli.main import app
from cats_llm.errors import CatsError
from cats_llm.evaluation.cache import Cache
from cats_llm.evaluation.methods import METHODS
from cats_llm.evaluation.perplexity import PerplexityTask
from cats_llm.evaluation.run import run_evaluation
from cats_llm.evaluation.sparsity import SparsityCounter
from cats_llm.evaluation.variants import make_variants, share_of_inputs
from cats_llm.report.results import read_eval
from cats_llm.text import load_sequences

HELDOUT = str(bundled.heldout_text())
CALIBRATION = str(bundled.calibration_text())


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture(scope="module")
def batches(tokenizer):
    return [torch.stack(list(load_sequences(CALIBRATION, tokenizer, 64, samples=8)))]


def linears(model, family):
    """Every nn.Linear of the decoder layers, by name; without the package."""
    prefix = family.mlp.split("{}")[0]
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(prefix)}


class ByHand:
    """While it lasts, hooks replace the output of every linear layer by that of the masked input.

    `skip` is (name, weight, x) -> bool like x. Counts what is skipped, and keeps the inputs.
    """

    def __init__(self, model, family, skip):
        self.linears, self.skip, self.counts, self.seen = linears(model, family), skip, {}, {}

    def __enter__(self):
        self.stack = ExitStack()
        for name, linear in self.linears.items():

            def hook(module, args, output, name=name):
                skip = self.skip(name, module.weight, args[0])
                self.seen[name] = args[0]
                self.counts[name] = (int(skip.sum()), skip.numel())
                return F.linear(torch.where(skip, 0.0, args[0]), module.weight, module.bias)

            self.stack.callback(linear.register_forward_hook(hook).remove)
        return self

    def __exit__(self, *args):
        self.stack.close()


def teal_by_hand(config):
    return lambda name, weight, x: x.abs() < config.thresholds[name]


def wina_by_hand(share):
    def skip(name, weight, x):
        score = x.abs() * weight.square().sum(0).sqrt()
        rank = score.argsort(-1).argsort(-1)
        return rank < round(share * x.shape[-1])

    return skip


def variant_of(case, method, sparsity=0.5, coverage=None):
    return make_variants(case.dense, [method], [sparsity], None, coverage, [case.ids])[1]


@pytest.mark.parametrize("method", ["teal", "wina"])
def test_every_family_computes_it(case, method):
    config = variant_of(case, method).config
    model = case.dense_copy().double()
    assert sorted(config.linear_sparsity) == sorted(linears(model, case.family)), "all linear layers of the decoder"
    with ByHand(model, case.family, teal_by_hand(config) if method == "teal" else wina_by_hand(0.5)) as reference:
        expected = families.logits(model, case.ids)
    with METHODS[method].applied(model, config):
        counter = SparsityCounter(model)
        with counter:
            found = families.logits(model, case.ids)
        with METHODS[method].dense(model):
            dense = families.logits(model, case.ids)
        assert torch.equal(families.logits(model, case.ids), found), "the dense context leaves something behind"
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, dense, rtol=1e-2), "it changes nothing"
    assert counter.inputs() == reference.counts
    assert counter.counts() == {}
    assert torch.equal(dense, families.logits(case.dense_copy().double(), case.ids))


def test_thresholds_are_quantiles_of_the_dense_model(case):
    model = case.dense_copy()
    with ByHand(model, case.family, lambda name, weight, x: torch.zeros_like(x, dtype=torch.bool)) as dense:
        families.logits(model, case.ids)
    for sparsity in (0.25, 0.8):
        config = variant_of(case, "teal", sparsity).config
        for name, x in dense.seen.items():
            below = (x.abs() < config.thresholds[name]).double().mean().item()
            assert below == pytest.approx(sparsity, abs=1e-3), name
            assert config.linear_sparsity[name] == pytest.approx(below, abs=1e-3), name


def output_error(model, case, layer, thresholds):
    """The squared error of one decoder layer, whose input is the dense model's."""
    path = case.family.mlp.format(layer).removesuffix(".mlp")
    outputs = []

    def note(module, args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    inside = {n: t for n, t in thresholds.items() if n.startswith(path + ".")}
    handle = model.get_submodule(path).register_forward_hook(note)
    families.logits(model, case.ids)
    with ByHand(model, case.family, lambda name, weight, x: x.abs() < inside.get(name, 0.0)):
        families.logits(model, case.ids)
    handle.remove()
    return (outputs[0] - outputs[1]).double().square().sum().item()


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_the_greedy_search_keeps_the_bytes_and_lowers_the_error(case, sparsity):
    uniform, greedy = (variant_of(case, method, sparsity).config for method in ("teal", "teal-greedy"))
    model = case.dense_copy()
    sizes = {n: m.weight.numel() for n, m in linears(model, case.family).items()}
    for layer in range(families.LAYERS):
        inside = [n for n in sizes if f".{layer}." in n]
        share = np.average([greedy.linear_sparsity[n] for n in inside], weights=[sizes[n] for n in inside])
        assert share == pytest.approx(sparsity, abs=2e-3), "the share of this layer's bytes"
        assert len({round(greedy.linear_sparsity[n], 2) for n in inside}) > 1, "it allocates nothing"
        errors = [output_error(model, case, layer, config.thresholds) for config in (uniform, greedy)]
        assert errors[1] < errors[0]


def test_one_search_serves_all_sparsities(cases):
    """Whatever was asked for before: the path is the same."""
    case = cases("llama")
    several = make_variants(case.dense, ["teal-greedy"], [0.2, 0.5, 0.8], batches=[case.ids])[1:]
    for variant in several:
        assert variant.config == variant_of(case, "teal-greedy", variant.sparsity).config
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in case.dense.modules())


def test_a_step_of_the_search_is_the_best_one(cases):
    """The first linear layer that gets a share is the one that costs least error a byte, found by trying all."""
    case = cases("llama")
    model = case.dense_copy()
    sizes = {n: m.weight.numel() for n, m in linears(model, case.family).items() if ".0." in n}
    uniform = {s: variant_of(case, "teal", s).config.thresholds for s in (0.04, 0.2)}
    costs = {}
    for name, size in sizes.items():
        share = min(0.04 * sum(sizes.values()) / size, 0.2)
        threshold = uniform[0.2][name] if share == 0.2 else variant_of(case, "teal", share).config.thresholds[name]
        costs[name] = output_error(model, case, 0, {name: threshold}) / (share * size)
    first = variant_of(case, "teal-greedy", 0.005).config.linear_sparsity
    assert [n for n in sizes if first[n] > 0] == [min(costs, key=costs.get)]


@pytest.mark.parametrize("method", ["teal", "wina"])
@pytest.mark.parametrize(
    "coverage", [TokenPolicy(last_fraction=0.5), TokenPolicy(dense_first_tokens=7), TokenPolicy(dense_prefill=True)]
)
def test_only_covered_tokens_skip(cases, method, coverage):
    case = cases("llama")
    config = variant_of(case, method, coverage=coverage).config
    model = case.dense_copy().double()
    first = {"last_fraction": 20, "dense_first_tokens": 7, "dense_prefill": 40}
    begin = next(n for key, n in first.items() if getattr(coverage, key) not in (None, 0, False))
    rule = teal_by_hand(config) if method == "teal" else wina_by_hand(0.5)

    def skip(name, weight, x):
        return rule(name, weight, x) & (torch.arange(x.shape[1]) >= begin)[:, None]

    with ByHand(model, case.family, skip) as reference:
        expected = families.logits(model, case.ids)
    with METHODS[method].applied(model, config):
        counter = SparsityCounter(model)
        with counter:
            found = families.logits(model, case.ids)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert counter.inputs() == reference.counts


@pytest.mark.parametrize("method", ["teal", "wina"])
@pytest.mark.parametrize("coverage", [TokenPolicy(), TokenPolicy(dense_first_tokens=7)])
def test_decoding_with_a_cache_skips_the_same(cases, method, coverage):
    case = cases("llama")
    config = variant_of(case, method, coverage=coverage).config
    model, inputs = case.dense_copy().double(), case.ids[:, :12]
    with METHODS[method].applied(model, config):
        whole, steps = SparsityCounter(model), SparsityCounter(model)
        with whole:
            expected = families.logits(model, inputs)
        cache, found = None, []
        with steps:
            for part in (inputs[:, :5], *inputs[:, 5:].split(1, dim=1)):
                with torch.no_grad():
                    out = model(input_ids=part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-9, atol=1e-9)
    assert steps.inputs() == whole.inputs()


def test_a_dense_prompt_is_counted_as_dense(cases):
    case = cases("llama")
    config = variant_of(case, "wina", coverage=TokenPolicy(dense_prefill=True)).config
    model = case.dense_copy()
    with METHODS["wina"].applied(model, config):
        counter = SparsityCounter(model)
        with counter, torch.no_grad():
            out = model(input_ids=case.ids[:, :9], use_cache=True)
            model(input_ids=case.ids[:, 9:10], past_key_values=out.past_key_values)
    for name, (skipped, seen) in counter.inputs().items():
        assert skipped == 3 * round(0.5 * seen / 30), name
        assert seen == 30 * linears(model, case.family)[name].in_features


@pytest.mark.parametrize("method", ["teal", "wina"])
def test_the_model_comes_back_to_the_bit(cases, method):
    case = cases("qwen3")
    model = case.dense_copy()
    config = variant_of(case, method, coverage=TokenPolicy(dense_first_tokens=2)).config
    for broken in (False, True):
        try:
            with METHODS[method].applied(model, config), SparsityCounter(model):
                families.logits(model, case.ids)
                if broken:
                    raise KeyError("stop")
        except KeyError:
            pass
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        assert torch.equal(families.logits(model, case.ids), case.dense_logits)


def test_learning_leaves_the_model_as_it_was(cases):
    case = cases("llama")
    model = case.dense_copy().train()
    config = make_variants(model, ["teal"], [0.5], batches=[case.ids])[1].config
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert config == variant_of(case, "teal").config
    assert make_variants(case.sparse(), ["teal"], [0.5], batches=[case.ids])[1].config == config, "of the dense model"


def test_padding_does_not_count(cases):
    case = cases("llama")
    padded = torch.cat((case.ids, torch.zeros(3, 9, dtype=torch.int64)), 1)
    mask = torch.cat((torch.ones(3, 40), torch.zeros(3, 9)), 1).long()
    batch = {"input_ids": padded, "attention_mask": mask}
    found = make_variants(case.dense, ["teal"], [0.5], batches=[batch])[1].config
    expected = variant_of(case, "teal").config
    assert found.thresholds == pytest.approx(expected.thresholds, rel=1e-3)


@pytest.mark.parametrize("method", ["teal", "wina"])
def test_nan_shows(cases, method):
    case = cases("llama")
    config = variant_of(case, method, 0.9).config
    model = case.dense_copy()
    with torch.no_grad():
        model.model.embed_tokens.weight[case.ids[0, 0], 5] = float("nan")
    with METHODS[method].applied(model, config):
        assert families.logits(model, case.ids)[0].isnan().all()
    if method == "teal":
        with pytest.raises(CatsError, match="NaN or infinite"):
            make_variants(model, [method], [0.5], batches=[case.ids])


def test_what_is_missing_is_said(cases):
    case = cases("llama")
    with pytest.raises(CatsError, match="the method teal learns from text, more than a profile holds"):
        make_variants(case.dense, ["teal"], [0.5], case.profile)
    with pytest.raises(CatsError, match="the method wina needs a sparsity above 0"):
        make_variants(case.dense, ["wina"], [0.0])
    with pytest.raises(CatsError, match="sparsity is 1"):
        make_variants(case.dense, ["wina"], [1.0])


# --- in the harness ---


def test_sparsity_is_measured_in_the_three_units(model, tokenizer, profile, batches):
    task = PerplexityTask(HELDOUT, length=64, samples=6)
    variants = make_variants(model, ["cats", "teal", "wina"], [0.6], profile, None, batches)
    assert [v.name for v in variants] == ["dense", "cats k=0.6", "teal k=0.6", "wina k=0.6"]
    result = run_evaluation(model, tokenizer, variants, [task])
    ids = torch.stack(list(load_sequences(HELDOUT, tokenizer, 64, samples=6)))
    family = families.FAMILIES["llama"]
    for name, rule in (("teal", teal_by_hand(variants[2].config)), ("wina", wina_by_hand(0.6))):
        with ByHand(model, family, rule) as reference:
            log_p = families.logits(model, ids)[:, :-1].double().log_softmax(-1)
        row = next(r for r in result["results"] if r["variant"] == f"{name} k=0.6" and r["metric"] == "perplexity")
        nll = -log_p.gather(-1, ids[:, 1:, None]).mean().item()
        assert row["value"] == pytest.approx(math.exp(nll), rel=1e-4)
        shares = {n: skipped / seen for n, (skipped, seen) in reference.counts.items()}
        assert row["linear_sparsity"] == pytest.approx(shares, abs=1e-4)
        sizes = {n: m.weight.numel() for n, m in linears(model, family).items()}
        mlp = [n for n in sizes if ".mlp." in n]
        assert row["sparsity"]["gate"] is None
        expected = np.average([shares[n] for n in mlp], weights=[sizes[n] for n in mlp])
        assert row["sparsity"]["ffn"] == pytest.approx(expected, abs=1e-4)
        expected = np.average([shares[n] for n in sizes], weights=list(sizes.values()))
        assert row["sparsity"]["model"] == pytest.approx(expected, abs=1e-4)
        assert row["layer_sparsity"] == {}
    described = {v["name"]: v for v in result["variants"]}
    assert described["teal k=0.6"]["unit"] == described["wina k=0.6"]["unit"] == "inputs"
    assert described["cats k=0.6"]["unit"] == "neurons"
    assert described["teal k=0.6"]["thresholds"] is None
    assert described["teal k=0.6"]["linear_thresholds"] == variants[2].config.thresholds
    json.dumps(result, allow_nan=False)


def test_equal_bytes(model, tokenizer, profile, batches):
    variants = make_variants(model, ["cats", "teal", "wina"], [0.5, 0.8], profile, None, batches, equal_bytes=True)
    assert [v.name for v in variants[3:5]] == ["teal k=0.5 (equal bytes)", "teal k=0.8 (equal bytes)"]
    layer = model.model.layers[0]
    mlp = sum(m.weight.numel() for m in layer.mlp.modules() if isinstance(m, nn.Linear))
    everything = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
    for k in (0.5, 0.8):
        assert share_of_inputs(model, k) == pytest.approx(k * (2 / 3) * mlp / everything)
        assert next(v for v in variants if v.equal_bytes == k).sparsity == share_of_inputs(model, k)
    result = run_evaluation(model, tokenizer, variants, [PerplexityTask(HELDOUT, length=64, samples=6)])
    rows = {r["variant"]: r["sparsity"]["model"] for r in result["results"] if r["metric"] == "perplexity"}
    for name in ("teal", "wina"):
        for k in (0.5, 0.8):
            assert rows[f"{name} k={k} (equal bytes)"] == pytest.approx(rows[f"cats k={k}"], abs=0.02)


def test_settings_tell_measurements_apart(model, tokenizer, batches, tmp_path):
    def known(variant):
        told = []
        task = PerplexityTask(HELDOUT, length=64, samples=2, distance=False)
        run_evaluation(model, tokenizer, [variant], [task], cache=Cache(tmp_path), progress=told.append)
        return [step.cached for step in told]

    one = make_variants(model, ["teal", "wina"], [0.5], None, None, batches)[1:]
    others = make_variants(model, ["teal", "wina"], [0.6], None, None, batches)[1:]
    covered = make_variants(model, ["teal", "wina"], [0.5], None, TokenPolicy(last_fraction=0.5), batches)[1:]
    for variant in (*one, *others, *covered):
        assert known(variant) == [False], variant.name
    for variant in (*one, *others, *covered):
        assert known(variant) == [True], variant.name


def test_teal_needs_the_text(profile, tmp_path):
    profile.save(tmp_path / "p.safetensors")
    done = run_cli("--text", HELDOUT, "--sparsity", 0.5, "--method", "teal", "--profile", tmp_path / "p.safetensors")
    assert done.exit_code != 0
    assert "pass --calibration TEXT instead of --profile" in " ".join((done.output + str(done.exception)).split())


def run_cli(*arguments):
    return CliRunner().invoke(app, ["eval", str(bundled.model_path()), "--no-cache", *map(str, arguments)])


def test_the_command_compares_them(short_text, tmp_path):
    out = tmp_path / "r.json"
    common = ["--text", HELDOUT, "--samples", 2, "--seq-length", 64, "--sparsity", 0.5]
    calibrated = [*common, "--calibration", short_text, "--method", "cats,teal,wina"]
    done = run_cli(*calibrated, "--json", out)
    assert done.exit_code == 0, done.output
    assert "At equal k, not equal bytes" in " ".join(done.output.split())
    read = read_eval(json.loads(out.read_text(encoding="utf-8")), out)
    assert [v.name for v in read.variants] == ["dense", "cats k=0.5", "teal k=0.5", "wina k=0.5"]
    assert read.row("wina k=0.5", "heldout", "perplexity").sparsity.gate is None
    done = run_cli(*calibrated, "--equal-bytes", "--json", out, "--force")
    assert done.exit_code == 0, done.output
    assert "At equal bytes: teal, wina skip that share" in " ".join(done.output.split())
    assert "teal k=0.5 (equal bytes)" in {v["name"] for v in json.loads(out.read_text(encoding="utf-8"))["variants"]}
