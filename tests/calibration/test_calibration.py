"""Quantiles against exact ones (sort everything, count everything), and what is counted."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import cats_llm
import families
from cats_llm import CatsError, Profile
from cats_llm.calibration.distribution import GateHistogram, MagnitudeDistribution

pytestmark = pytest.mark.usefixtures("one_thread")

ACTS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": families.gelu_tanh, "relu": F.relu}
SPARSITIES = [0.0, 1e-4, 0.1, 0.5, 0.7, 0.9, 0.99, 0.9999]
TOLERANCE = 1e-3  # 0.1 percentage points
N = 1 << 17


def _normal(std, mean=0.0):
    return lambda g: g.normal(mean, std, N)


def _scaled(scale, sample):
    return lambda g: scale * sample(g)


DATA = {
    **{f"normal {s:g}": _normal(s) for s in (1e-6, 1e-3, 1.0, 30.0, 1e3)},
    "normal around the minimum of SiLU": _normal(0.05, -1.2785),
    "normal around the minimum of GELU": _normal(0.05, -0.7518),
    "normal, mean -3": _normal(1.0, -3.0),
    "normal, mean 10": _normal(1.0, 10.0),
    "cauchy": lambda g: g.standard_cauchy(N),
    "cauchy 1e-6": _scaled(1e-6, lambda g: g.standard_cauchy(N)),
    "lognormal": lambda g: g.lognormal(0, 3, N),
    "lognormal both signs": lambda g: g.lognormal(-2, 2, N) * g.choice([-1, 1], N),
    "uniform over 20 decades": lambda g: 10 ** g.uniform(-15, 4, N),
    "two scales": lambda g: np.concatenate([g.normal(0, 1e-5, N // 2), g.normal(0, 100, N - N // 2)]),
    "30 % zeros": lambda g: np.where(g.random(N) < 0.3, 0, g.normal(0, 1, N)),
    "60 % zeros": lambda g: np.where(g.random(N) < 0.6, 0, g.standard_cauchy(N)),
    "all zeros": lambda g: np.zeros(N),
    "one value": lambda g: np.full(N, 0.37),
    "few values": lambda g: g.choice([-2.0, -0.5, 0.0, 0.1, 0.1001, 3.0], N),
}


def gates(name, dtype):
    values = DATA[name](np.random.default_rng(0))
    return torch.from_numpy(values).float().clamp(-6e4, 6e4).to(dtype)


def magnitudes(gate, act):
    """|act(gate)| as the definition says, sorted, in float32."""
    return act(gate.float()).abs().numpy()


def achieved(values, threshold):
    """The share that a CATS model skips."""
    return np.mean(values < np.float32(threshold))


def distribution(gate, act, batches=1):
    histogram = GateHistogram()
    for chunk in gate.chunk(batches):
        histogram.add(chunk)
    return histogram.distribution(act)


def nearest(values, k):
    """The sparsity nearest to k that any threshold can give which skips all zeros and keeps the maximum."""
    unique = np.unique(values)
    possible = np.searchsorted(np.sort(values), unique[unique > 0]) / values.size
    return possible[np.abs(possible - k).argmin()] if possible.size else 1.0


def fullest(values):
    """The largest share of the values that agree to 12 bits."""
    mantissa, exponent = np.frexp(values)
    return largest_tie(np.ldexp(np.floor(mantissa * 8192), exponent))


def largest_tie(values):
    """The largest share of the values that are equal."""
    return np.unique(values, return_counts=True)[1].max() / values.size


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", DATA)
def test_float32_quantiles_are_exact_to_a_tenth_of_a_point(name, act):
    gate = gates(name, torch.float32)
    values = magnitudes(gate, ACTS[act])
    found = distribution(gate, ACTS[act])
    # these are so narrow that one bin, and one float32 number at the activation's minimum, hold more than that
    narrow = fullest(gate.abs().numpy()) + largest_tie(values) if name.startswith("normal around") else 0
    tolerance = max(TOLERANCE, narrow)
    for k in SPARSITIES:
        threshold, promised = found.threshold(k)
        got = achieved(values, threshold)
        if k == 0:
            assert threshold == got == promised == 0
            continue
        assert abs(got - promised) <= tolerance, (k, got, promised)
        assert abs(got - nearest(values, k)) <= tolerance, (k, got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", DATA)
def test_16_bit_quantiles_are_exact(name, act, dtype):
    gate = gates(name, dtype)
    values = magnitudes(gate, ACTS[act])
    found = distribution(gate, ACTS[act])
    # far below zero, 1 + tanh(x) is rounding alone, and differs between vector and scalar instructions
    exact = 0 if act != "gelu_tanh" else 1e-4
    for k in SPARSITIES:
        threshold, promised = found.threshold(k)
        got = achieved(values, threshold)
        if k == 0:
            assert threshold == got == promised == 0
            continue
        assert abs(got - promised) <= exact, (k, got, promised)
        assert abs(got - k) <= abs(nearest(values, k) - k) + 5e-5 + exact, (k, got)


def test_float32_values_are_divided_at_the_borders_of_bins():
    # a border taken half a bin off would be off by half of what a bin holds, here 0.05 points
    gate = gates("normal, mean 10", torch.float32)
    for k in (0.1, 0.5, 0.9):
        threshold, promised = distribution(gate, F.silu).threshold(k)
        assert abs(achieved(magnitudes(gate, F.silu), threshold) - promised) <= 1e-4


def test_16_bit_thresholds_separate_what_a_16_bit_histogram_cannot():
    # 7 % of these activations are the same bfloat16 number; the gates are not
    gate = gates("normal around the minimum of SiLU", torch.bfloat16)
    values = F.silu(gate.float()).abs()
    assert largest_tie(values.bfloat16().float().numpy()) > 0.05
    assert largest_tie(values.numpy()) < 0.2
    threshold, promised = distribution(gate, F.silu).threshold(0.5)
    assert achieved(values.numpy(), threshold) == promised


@pytest.mark.parametrize("name", ["normal 1", "cauchy", "30 % zeros", "few values"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_order_and_split_of_the_data_do_not_matter(name, dtype):
    gate = gates(name, dtype)
    whole = distribution(gate, F.silu)
    shuffled = gate[torch.from_numpy(np.random.default_rng(1).permutation(N))]
    for other in (distribution(gate, F.silu, 7), distribution(shuffled, F.silu, 3)):
        assert torch.equal(other.edges, whole.edges)
        assert torch.equal(other.counts, whole.counts)
        assert (other.maximum, other.zeros) == (whole.maximum, whole.zeros)


def test_adding_the_states_of_histograms_merges_them():
    gate = gates("cauchy", torch.float32)
    parts = [GateHistogram(), GateHistogram()]
    for histogram, chunk in zip(parts, gate.chunk(2), strict=True):
        histogram.add(chunk)
    for mine, other in zip(parts[0].tensors(), parts[1].tensors(), strict=True):
        mine += other
    assert torch.equal(parts[0].distribution(F.silu).counts, distribution(gate, F.silu).counts)


def test_every_value_is_counted_once_and_facts_are_true():
    gate = gates("30 % zeros", torch.bfloat16)
    values = magnitudes(gate, F.silu)
    found = distribution(gate, F.silu)
    assert found.total == N
    assert found.zeros == (values == 0).sum()
    assert found.maximum == values.max()
    # the edges divide the values as the counts say
    below = np.searchsorted(np.sort(values), found.edges.numpy(), side="left")
    assert np.array_equal(below, (found.counts.cumsum(0) - found.counts).numpy())
    assert len(found.edges) < 25_000


def test_a_profile_has_a_bounded_size():
    found = distribution(torch.randn(2_000_000), F.silu)
    assert len(found.edges) <= 1 / 5e-5 + 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_value_that_is_not_finite_is_noticed(bad, dtype):
    histogram = GateHistogram()
    gate = torch.randn(1000, dtype=dtype)
    histogram.add(gate)
    assert not histogram.not_finite
    gate[777] = bad
    histogram.add(gate)
    histogram.add(torch.randn(10))
    assert histogram.not_finite


def test_empty_and_strided_input():
    histogram = GateHistogram()
    histogram.add(torch.empty(0, 5))
    assert histogram.counts.sum() == 0
    wide = torch.randn(6, 10)
    histogram.add(wide[:, ::2])
    assert histogram.counts.sum() == 30


scales = st.sampled_from([1e-6, 1e-3, 1.0, 10.0, 1e3])
elements = st.floats(-1, 1, width=16)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(elements, min_size=1, max_size=60),
    scales,
    st.sampled_from(sorted(ACTS)),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.floats(0, 1, exclude_max=True),
)
def test_no_threshold_of_the_same_data_is_nearer(values, scale, act, dtype, k):
    gate = (torch.tensor(values) * scale).to(dtype)
    found = magnitudes(gate, ACTS[act])
    threshold, promised = distribution(gate, ACTS[act]).threshold(k)
    got = achieved(found, threshold)
    if k == 0:
        assert (threshold, promised, got) == (0, 0, 0)
        return
    if dtype != torch.float32:
        assert got == promised
        assert abs(promised - k) <= abs(nearest(found, k) - k) + 5e-5


def test_threshold_by_hand():
    found = MagnitudeDistribution.from_values(torch.tensor([3.0, 0.0, 1.0, 2.0]), torch.tensor([1, 2, 3, 4]))
    assert found.total == 10
    assert found.zeros == 2
    assert found.maximum == 3.0
    assert found.edges.tolist() == [0.0, 0.5, 1.5, 2.5]
    assert found.counts.tolist() == [2, 3, 4, 1]
    assert found.sparsity().tolist() == [0.0, 0.2, 0.5, 0.9]
    assert found.threshold(0.0) == (0.0, 0.0)
    assert found.threshold(0.01) == (0.5, 0.2)
    assert found.threshold(0.36) == (1.5, 0.5)
    assert found.threshold(0.99) == (2.5, 0.9)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1, 50, math.nan, math.inf, "abc", "0.5", None, True])
def test_a_sparsity_out_of_range_is_one_sentence(cases, sparsity):
    with pytest.raises(CatsError, match="sparsity is") as error:
        cases("llama").profile.config(sparsity)
    assert "\n" not in str(error.value)


def collected(model, family, batches):
    """Every gate of every layer, by hooks of this test, padding excluded."""
    found = {layer: [] for layer in range(families.LAYERS)}
    handles = []
    mask = None

    for layer, rows in found.items():
        mlp = model.get_submodule(family.mlp.format(layer))
        linear = mlp.gate_up_proj if family.fused else mlp.gate_proj

        def hook(module, args, output, rows=rows):
            gate = output[..., : families.FFN]
            rows.append(gate[mask] if mask is not None else gate.flatten(0, -2))

        handles.append(linear.register_forward_hook(hook))
    for batch in batches:
        batch = batch if isinstance(batch, dict) else {"input_ids": batch}
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
        families.logits(model, batch["input_ids"], attention_mask=batch.get("attention_mask"))
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(rows) for layer, rows in found.items()}


def same(a, b):
    assert a.layers.keys() == b.layers.keys()
    for layer in a.layers:
        for field in ("edges", "counts"):
            assert torch.equal(getattr(a.layers[layer], field), getattr(b.layers[layer], field)), layer
        assert a.layers[layer].maximum == b.layers[layer].maximum
        assert a.layers[layer].zeros == b.layers[layer].zeros
    return True


@pytest.mark.parametrize("k", [0.5, 0.7, 0.9])
def test_achieved_sparsity_of_every_family(case, k):
    config = case.profile.config(k)
    for layer, gate in collected(case.dense, case.family, [case.ids]).items():
        values = magnitudes(gate, case.family.act)
        assert abs(achieved(values, config.thresholds[layer]) - k) <= TOLERANCE
        assert abs(achieved(values, config.thresholds[layer]) - config.layer_sparsity[layer]) <= TOLERANCE / 2
    assert config.sparsity == k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_model_is_calibrated_exactly(split_or_fused, dtype):
    case = split_or_fused
    model = case.dense_copy().to(dtype)
    config = cats_llm.calibrate(model, [case.ids]).config(0.7)
    assert config.calibration["dtype"] == str(dtype).removeprefix("torch.")
    for layer, gate in collected(model, case.family, [case.ids]).items():
        values = magnitudes(gate, case.family.act)
        assert achieved(values, config.thresholds[layer]) == config.layer_sparsity[layer]
        assert abs(config.layer_sparsity[layer] - 0.7) <= largest_tie(values) / 2 + 5e-5


def test_batches_in_any_order_and_split_give_the_same_profile(split_or_fused):
    case = split_or_fused
    model = case.dense_copy().double()  # so that rounding does not depend on the batch size
    ids = families.ids(6, 20)
    whole = cats_llm.calibrate(model, [ids])
    assert whole.record["tokens"] == 120
    assert whole.record["sequences"] == 6
    same(whole, cats_llm.calibrate(model, ids.flip(0).split(1)))
    same(whole, cats_llm.calibrate(model, iter([{"input_ids": ids[:4]}, {"input_ids": ids[4:]}])))
    same(whole, cats_llm.calibrate(model, [ids, ids[:0]]))


@pytest.mark.parametrize("side", ["right", "left", "both", "whole row", "nothing"])
def test_padding_is_never_counted(split_or_fused, side):
    case = split_or_fused
    ids = families.ids(4, 24)
    mask = torch.ones_like(ids)
    if side in ("right", "both"):
        mask[1, -5:] = 0
        mask[2, -20:] = 0
    if side in ("left", "both"):
        mask[0, :7] = 0
        mask[3, :1] = 0
    if side == "whole row":
        mask[2] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    profile = cats_llm.calibrate(case.dense, [batch, families.ids(2, 9, seed=3)])
    rows = collected(case.dense, case.family, [batch, families.ids(2, 9, seed=3)])
    assert profile.record["tokens"] == mask.sum() + 18
    for layer, gate in rows.items():
        assert profile.layers[layer].total == gate.numel() == profile.record["tokens"] * families.FFN
        same(Profile({0: profile.layers[layer]}, {}), Profile({0: distribution(gate, case.family.act)}, {}))


def test_padding_tokens_themselves_make_no_difference(llama):
    ids, mask = families.ids(3, 16), torch.ones(3, 16, dtype=torch.long)
    mask[:, 10:] = 0
    other = torch.where(mask.bool(), ids, 0)
    profiles = [cats_llm.calibrate(llama.dense, [{"input_ids": i, "attention_mask": mask}]) for i in (ids, other)]
    same(*profiles)


def test_a_bool_mask_and_one_of_ones_are_accepted(llama):
    ids = families.ids(3, 16)
    plain = cats_llm.calibrate(llama.dense, [ids])
    for mask in (torch.ones_like(ids), torch.ones_like(ids).bool(), torch.ones_like(ids).float()):
        same(plain, cats_llm.calibrate(llama.dense, [{"input_ids": ids, "attention_mask": mask}]))


def test_a_sparse_model_is_calibrated_as_the_dense_one(case):
    model = case.sparse()
    same(cats_llm.calibrate(model, [case.ids]), case.profile)
    assert cats_llm.thresholds(model) == case.config.thresholds
    assert all(mlp.sparse for mlp in cats_llm.sparse_mlps(model).values())


def test_a_model_in_training_mode_is_calibrated_without_dropout_and_stays_in_it(llama):
    model = llama.dense_copy().train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.model.norm.eval()
    same(cats_llm.calibrate(model, [llama.ids]), llama.profile)
    assert model.training
    assert not model.model.norm.training
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_left_on_the_model(llama):
    model = llama.dense_copy()

    def broken():
        yield llama.ids
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        cats_llm.calibrate(model.train(), broken())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(families.logits(model.eval(), llama.ids), llama.dense_logits)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_damaged_weights_are_one_clear_error(split_or_fused, bad):
    model = split_or_fused.dense_copy()
    mlp = cats_llm.find_gated_mlps(model)[1]
    with torch.no_grad():
        mlp.gate_linear.weight[3, 3] = bad
    with pytest.raises(CatsError, match="gate activations of layer 1 are NaN or infinite") as error:
        cats_llm.calibrate(model, [split_or_fused.ids])
    assert "\n" not in str(error.value)


def test_not_finite_in_padding_is_no_error(llama):
    # half-precision models overflow on padding, which nobody reads
    ids, mask = families.ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, 8:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    model = llama.dense_copy()
    gate = model.get_submodule(llama.family.mlp.format(1)).gate_proj

    def overflow(module, args, output):
        return output.masked_fill(mask[..., None] == 0, math.inf) if output.shape[:2] == mask.shape else output

    gate.register_forward_hook(overflow)
    same(cats_llm.calibrate(model, [batch]), cats_llm.calibrate(llama.dense, [batch]))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no tokens"),
        ([torch.empty(0, 8, dtype=torch.long)], "no tokens"),
        ([torch.empty(3, 0, dtype=torch.long)], "no tokens"),
        ([{"input_ids": families.ids(2, 8), "attention_mask": torch.zeros(2, 8)}], "no tokens"),
        ([families.ids(2, 8)[None]], r"shape \(1, 2, 8\)"),
        ([{"input_ids": families.ids(2, 8), "attention_mask": torch.ones(2, 7)}], r"shape \(2, 8\) .* shape \(2, 7\)"),
        ([{"input_ids": families.ids(2, 8), "attention_mask": torch.ones(8)}], r"shape \(2, 8\) .* shape \(8,\)"),
        ([{"attention_mask": torch.ones(2, 8)}], "input_ids"),
    ],
)
def test_bad_batches_are_one_clear_error(llama, batches, message):
    with pytest.raises(CatsError, match=message) as error:
        cats_llm.calibrate(llama.dense, batches)
    assert "\n" not in str(error.value)


def test_the_record_says_what_was_calibrated(llama):
    record = llama.profile.record
    assert record["model"] == "LlamaForCausalLM"
    assert record["data"] == "random tokens"
    assert record["tokens"] == llama.ids.numel()
    assert record["sequences"] == len(llama.ids)
    assert record["dtype"] == "float32"
    assert set(record["versions"]) == {"cats-llm", "torch", "transformers"}
    assert record["date"].endswith("+00:00")
    json.dumps(record)


def test_a_profile_survives_its_file(case, tmp_path):
    case.profile.save(tmp_path / "p.safetensors")
    again = Profile.load(tmp_path / "p.safetensors")
    same(again, case.profile)
    assert again.record == case.profile.record
    for k in SPARSITIES:
        assert again.config(k) == case.profile.config(k)
    assert [f.name for f in tmp_path.iterdir()] == ["p.safetensors"]


def test_an_existing_profile_needs_force(llama, tmp_path):
    path = tmp_path / "p.safetensors"
    llama.profile.save(path)
    before = path.read_bytes()
    with pytest.raises(CatsError, match="exists already"):
        llama.profile.save(path)
    assert path.read_bytes() == before
    other = Profile(llama.profile.layers, {"data": "other"})
    other.save(path, force=True)
    assert Profile.load(path).record == {"data": "other"}


@pytest.fixture
def written(llama, tmp_path):
    path = tmp_path / "p.safetensors"
    llama.profile.save(path)
    return path


def refused(path, match):
    with pytest.raises(CatsError, match=match) as error:
        Profile.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value) or "distribution" in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path):
    refused(tmp_path / "none.safetensors", "there is no calibration profile")
    refused(tmp_path, "there is no calibration profile")


@pytest.mark.parametrize("share", [0, 1e-5, 0.001, 0.01, 0.5, 0.999])
def test_a_truncated_file(written, share):
    data = written.read_bytes()
    written.write_bytes(data[: int(len(data) * share)])
    refused(written, "not a calibration profile")


def test_other_files(written, llama):
    written.write_text("hello")
    refused(written, "not a calibration profile")
    refused(llama.dense_folder / "model.safetensors", "no calibration profile")
    refused(llama.dense_folder / "config.json", "not a calibration profile")


def _header(change):
    def rewrite(tensors, header):
        change(header)

    return rewrite


def _tensor(name, value):
    def rewrite(tensors, header):
        tensors[name] = value(tensors[name]) if callable(value) else value

    return rewrite


CORRUPT = {
    "newer version": _header(lambda h: h.update(version=2)),
    "version x": _header(lambda h: h.update(version="x")),
    "no version": _header(lambda h: h.pop("version")),
    "no layers": _header(lambda h: h.pop("layers")),
    "empty layers": _header(lambda h: h.update(layers={})),
    "list of layers": _header(lambda h: h.update(layers=[1])),
    "record is no object": _header(lambda h: h.update(record=3)),
    "layer without tensors": _header(lambda h: h["layers"].update({"7": {"maximum": 1.0, "zeros": 0}})),
    "layer that is no number": _header(lambda h: h["layers"].update(x=h["layers"].pop("0"))),
    "maximum NaN": _header(lambda h: h["layers"]["0"].update(maximum=math.nan)),
    "maximum huge": _header(lambda h: h["layers"]["0"].update(maximum=10**400)),
    "maximum a string": _header(lambda h: h["layers"]["0"].update(maximum="1")),
    "maximum too small": _header(lambda h: h["layers"]["0"].update(maximum=1e-9)),
    "zeros wrong": _header(lambda h: h["layers"]["0"].update(zeros=10**9)),
    "zeros infinite": _header(lambda h: h["layers"]["0"].update(zeros=math.inf)),
    "facts missing": _header(lambda h: h["layers"].update({"0": None})),
    "edges descending": _tensor("0.edges", lambda t: t.flip(0)),
    "edges NaN": _tensor("0.edges", lambda t: torch.full_like(t, math.nan)),
    "edges infinite": _tensor("0.edges", lambda t: torch.cat([t[:-1], torch.tensor([math.inf])])),
    "edges do not begin at 0": _tensor("0.edges", lambda t: t + 1),
    "edges in float64": _tensor("0.edges", lambda t: t.double()),
    "edges a scalar": _tensor("0.edges", torch.tensor(0.0)),
    "edges 2-d": _tensor("0.edges", lambda t: t[None].contiguous()),
    "edges bool": _tensor("0.edges", lambda t: t > 0),
    "edges empty": _tensor("0.edges", lambda t: t[:0]),
    "edges short": _tensor("0.edges", lambda t: t[:-1].contiguous()),
    "counts negative": _tensor("0.counts", lambda t: -t),
    "counts zero": _tensor("0.counts", torch.zeros_like),
    "counts float": _tensor("0.counts", lambda t: t.double()),
    "counts overflow": _tensor("0.counts", lambda t: torch.full_like(t, 2**62)),
    "counts complex": _tensor("0.counts", lambda t: t.to(torch.complex64)),
}


@pytest.mark.parametrize("damage", CORRUPT)
def test_a_corrupt_profile(written, damage):
    with safe_open(written, framework="pt") as file:
        header = json.loads(file.metadata()["cats_profile"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    CORRUPT[damage](tensors, header)
    save_file(tensors, written, metadata={"cats_profile": json.dumps(header)})
    refused(written, "version 2" if damage == "newer version" else "damaged")


@pytest.mark.parametrize("header", ["", "null", "3", "[]", "{", '"text"', "{}"])
def test_a_corrupt_header(written, header):
    save_file({"a": torch.zeros(1)}, written, metadata={"cats_profile": header})
    refused(written, "profile")


def test_any_bytes_changed_give_a_profile_or_a_cats_error(written):
    data = written.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(data)
        # most of the file is numbers; its header is where damage is interesting
        end = len(data) if generator.random() < 0.2 else 1200
        for position in generator.integers(0, end, 3):
            changed[position] = generator.integers(0, 256)
        written.write_bytes(bytes(changed))
        try:
            profile = Profile.load(written)
        except CatsError:
            continue
        for k in (0.0, 0.5, 0.99):
            profile.config(k)


def test_a_profile_that_is_changed_after_loading_was_a_copy(llama):
    profile = copy.deepcopy(llama.profile)
    profile.record["data"] = "other"
    assert llama.profile.record["data"] == "random tokens"
