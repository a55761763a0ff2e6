"""Commands and the harness on models with thresholds a neuron and compensation."""

import json

import pytest
import torch

import cats_llm
from cats_llm import CatsConfig, bundled
from cats_llm.benchmark.config import DecodeBench
from cats_llm.benchmark.cpu_decode import bench_cpu_decode
from cats_llm.benchmark.models import Shape, random_model
from cats_llm.checkpoint.layer_tensors import LayerTensors
from cats_llm.checkpoint.write import write_checkpoint
from cats_llm.cli.main import main
from cats_llm.evaluation.cache import Cache, digest_model
from cats_llm.evaluation.perplexity import PerplexityTask
from cats_llm.evaluation.run import run_evaluation
from cats_llm.evaluation.sparsity import SparsityCounter
from cats_llm.evaluation.variants import Variant
from cats_llm.model.weight_traffic import bytes_per_token
from marks import needs_kernels
from vectors import vector_config, vector_model

pytestmark = pytest.mark.usefixtures("one_thread")

HELDOUT = str(bundled.heldout_text())


@pytest.fixture
def with_vectors(model, profile):
    """A config of the bundled model with vectors for all layers but the last."""
    generator = torch.Generator().manual_seed(0)
    config = profile.config(0.5)
    vectors = {}
    for mlp in cats_llm.find_gated_mlps(model)[:-1]:
        spread = 0.5 + torch.rand(mlp.intermediate_size, generator=generator)
        compensation = torch.randn(mlp.hidden_size, generator=generator) / 50
        vectors[mlp.layer] = LayerTensors(config.thresholds[mlp.layer] * spread, compensation)
    return CatsConfig(**config.to_dict(), criterion={"name": "norm", "power": 2}, vectors=vectors)


@pytest.fixture
def folder(with_vectors, tmp_path):
    write_checkpoint(bundled.model_path(), tmp_path / "model", with_vectors)
    return tmp_path / "model"


def inspected(folder, tmp_path, *options):
    assert main(["inspect", str(folder), "--json", str(tmp_path / "i.json"), "--force", *options]) == 0
    return json.loads((tmp_path / "i.json").read_text())


def test_inspect_shows_criterion_and_vectors(with_vectors, folder, model, tmp_path, capsys):
    facts = inspected(folder, tmp_path, "--samples", "2", "--seq-length", "64")
    shown = capsys.readouterr().out
    assert "criterion: norm (power 2)" in shown
    number = len(facts["layers"])
    assert f"a threshold a neuron in {number - 1} of {number} layers (cats.safetensors)" in shown
    assert f"compensation of the output in {number - 1} of {number} layers" in shown
    assert facts["criterion"] == {"name": "norm", "power": 2}
    f, d = cats_llm.find_gated_mlps(model)[0].intermediate_size, cats_llm.find_gated_mlps(model)[0].hidden_size
    assert [layer["vectors"] for layer in facts["layers"][:-1]] == [{"thresholds": f, "compensation": d}] * (number - 1)
    assert facts["layers"][-1]["vectors"] == {}
    assert {layer["layer"]: layer["threshold"] for layer in facts["layers"]} == with_vectors.thresholds
    assert all(0.2 < layer["measured_sparsity"] < 0.8 for layer in facts["layers"])
    # without reading weights too; the file's own bytes are part of what a token reads
    facts = inspected(folder, tmp_path, "--no-measure")
    size = facts["bytes_per_token"]["mlp_dense"] // (3 * f * d * number)  # bytes of a weight
    plain = tmp_path / "plain"
    write_checkpoint(bundled.model_path(), plain, CatsConfig(with_vectors.thresholds, 0.5, with_vectors.layer_sparsity))
    other = inspected(plain, tmp_path, "--no-measure")
    assert (other["criterion"], other["layers"][0]["vectors"]) == (None, {})
    more = facts["bytes_per_token"]["sparse"] - other["bytes_per_token"]["sparse"]
    assert more == (number - 1) * (4 * f + size * d)
    assert "criterion" not in capsys.readouterr().out.rpartition("/plain")[2]


def test_a_checkpoint_without_its_file_is_one_sentence(folder, capsys):
    (folder / "cats.safetensors").unlink()
    for command in (
        ["inspect", str(folder), "--no-measure"],
        ["generate", str(folder), "--prompt", "x"],
        ["eval", str(folder), "--text", HELDOUT],
    ):
        assert main(command) == 1
        message = capsys.readouterr().err
        assert "cats.safetensors, which the CATS config names, cannot be read" in " ".join(message.split())


def test_generate(folder, capsys):
    assert main(["generate", str(folder), "--prompt", "Once upon a time", "--max-new-tokens", "4"]) == 0


def test_eval_of_a_checkpoint_says_what_it_is_and_restores_it(folder, model, tmp_path):
    options = ("--samples", "2", "--seq-length", "64", "--json", str(tmp_path / "e.json"))
    assert main(["eval", str(folder), "--text", HELDOUT, *options]) == 0
    result = json.loads((tmp_path / "e.json").read_text())
    dense, own = result["variants"]
    assert dense["criterion"] is None
    assert own["criterion"] == {"name": "norm", "power": 2}
    assert "vectors" not in own


def test_measurements_with_other_vectors_are_others(llama, model, tokenizer, with_vectors, tmp_path):
    assert digest_model(vector_model(llama)) == digest_model(llama.dense)  # what is compared has the same weights

    def computed(*configs):
        cached = []
        variants = [Variant(str(i), "cats", config) for i, config in enumerate(configs)]
        result = run_evaluation(
            model,
            tokenizer,
            [Variant("dense"), *variants],
            [PerplexityTask(HELDOUT, length=64, samples=2)],
            cache=Cache(tmp_path),
            progress=lambda p: cached.append(p.cached),
        )
        values = [row["value"] for row in result["results"] if row["metric"] == "perplexity"]
        assert cats_llm.thresholds(model) == {}
        return cached.count(False), values

    plain = CatsConfig(with_vectors.thresholds)
    values = with_vectors.to_dict() | {"vectors": with_vectors.vectors}
    other = CatsConfig(**values | {"vectors": dict(list(with_vectors.vectors.items())[:1])})
    number, values = computed(plain, with_vectors, other)
    assert number == 4
    assert len(set(values)) == 4
    assert computed(with_vectors, other, plain) == (0, [values[0], values[2], values[3], values[1]])


def test_the_sparsity_counted_is_that_of_the_vectors(split_or_fused):
    case = split_or_fused
    model = vector_model(case)
    with SparsityCounter(model) as counter, torch.no_grad():
        model(input_ids=case.ids)
    config, found = vector_config(case), counter.result()
    # of the first layer, whose input no vector changes
    dense = cats_llm.find_gated_mlps(case.dense)[0]
    gates = []
    handle = dense.gate_linear.register_forward_hook(lambda module, args, output: gates.append(dense.gate_of(output)))
    with torch.no_grad():
        case.dense(input_ids=case.ids)
    handle.remove()
    a = case.family.act(gates[0].double()).abs()
    assert found[0] == pytest.approx((a < config.vectors[0].thresholds).double().mean().item(), abs=1e-3)
    assert found[0] != pytest.approx((a < config.thresholds[0]).double().mean().item(), abs=1e-3)


def test_calibration_of_a_model_with_vectors_is_that_of_its_dense_one(llama):
    profile = cats_llm.calibrate(vector_model(llama), [llama.ids])
    assert profile.config(0.5).thresholds == llama.config.thresholds


def test_bytes_of_some_vectors(llama):
    plain = bytes_per_token(llama.dense, {})
    vectors = {1: LayerTensors(compensation=torch.ones(64))}
    assert bytes_per_token(llama.dense, {}, vectors).sparse == plain.sparse + 4 * 64
    assert bytes_per_token(llama.dense_copy().bfloat16(), {}, vectors).sparse == plain.dense // 2 + 2 * 64
    assert bytes_per_token(llama.dense, {}, vectors).dense == plain.dense


@needs_kernels
def test_bench_decode_runs_and_counts_vectors():
    model = random_model(
        Shape("tiny", 64, 96, layers=2, heads=2, kv_heads=1, head_dim=32, vocab_size=128), 2, torch.float32
    )
    config = DecodeBench("float32", (0.5,), model="tiny", tokens=3, rounds=1)
    plain = bench_cpu_decode(config, model, None, 1)[0][-1]

    class WithVectors:
        """A profile whose configs have vectors."""

        def __init__(self, model):
            ids = torch.randint(100, (4, 64), generator=torch.Generator().manual_seed(0))
            self.profile = cats_llm.calibrate(model, [ids])

        def config(self, sparsity):
            config = self.profile.config(sparsity)
            vectors = {0: LayerTensors(torch.full((96,), config.thresholds[0]), torch.zeros(64))}
            return CatsConfig(**config.to_dict(), vectors=vectors)

    row = bench_cpu_decode(config, model, WithVectors(model), 1)[0][-1]
    share, other = row["sparsity_decoded"], plain["sparsity_decoded"]
    matrix = 2 * 64 * 96 * 4
    assert row["bytes"] + 2 * matrix * share == pytest.approx(
        plain["bytes"] + 2 * matrix * other + 4 * (96 + 64), abs=2
    )
    assert all(mlp.module.__class__.__name__ != "SparseMLP" for mlp in cats_llm.find_gated_mlps(model))
