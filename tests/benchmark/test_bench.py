"""The benchmarks' arithmetic and output; never how fast anything is."""

import math

import pytest
import torch

import cats_llm
from cats_llm.benchmark.bench import bench_decode, bench_mlp
from cats_llm.benchmark.config import DecodeBench, MLPBench
from cats_llm.benchmark.models import SHAPES, Shape, parse_shape, random_model
from cats_llm.benchmark.timing import Quartiles, interleave, ratio
from cats_llm.cli.main import main
from cats_llm.errors import CatsError
from cats_llm.kernels import cpu
from marks import needs_kernels

TINY = Shape("tiny", 64, 96, layers=2, heads=2, kv_heads=1, head_dim=32, vocab_size=128)


def test_candidates_take_turns_and_the_first_round_is_not_counted():
    order = []
    seconds = interleave(
        {"a": lambda turn: order.append(("a", turn)), "b": lambda turn: order.append(("b", turn)) or 7.0}, 2
    )
    assert [name for name, _ in order] == ["b", "a", "a", "b", "b", "a"]
    assert [turn for _, turn in order] == list(range(6))
    assert len(seconds["a"]) == 2
    assert seconds["b"] == [7.0, 7.0], "a candidate that measures itself is believed"


def test_spread_and_ratio():
    assert Quartiles.of([3.0, 1.0, 2.0]) == Quartiles(2.0, 1.5, 2.5)
    assert Quartiles.of([4.0]) == Quartiles(4.0, 4.0, 4.0)
    # round by round: a machine that slows down in one round slows both
    assert ratio([1.0, 10.0], [2.0, 20.0]) == Quartiles(0.5, 0.5, 0.5)


@pytest.mark.parametrize(("name", "mlp_bytes"), [("llama2-7b", 270_532_608), ("mistral-7b", 352_321_536)])
def test_shapes_have_the_bytes_of_the_models(name, mlp_bytes):
    shape = parse_shape(name)
    assert 3 * shape.hidden_size * shape.intermediate_size * 2 == mlp_bytes
    assert set(SHAPES) == {"llama2-7b", "mistral-7b", "llama3-8b", "qwen3-8b"}


def test_parse_shape():
    assert (parse_shape("64,100").hidden_size, parse_shape("64,100").intermediate_size) == (64, 100)
    for text in ("gpt5", "1", "0,5", "a,b", "1,2,3"):
        with pytest.raises(CatsError, match="is no shape"):
            parse_shape(text)


@needs_kernels
def test_bench_mlp_counts_bytes():
    config = MLPBench(shape="64,1000", sparsities=(0.0, 0.5, 0.9), rounds=2, threads=(1,))
    rows = bench_mlp(config, working_set=0).record["rows"]
    assert [row["contestant"] for row in rows] == ["read", "torch dense", "k = 0.0", "k = 0.5", "k = 0.9"]
    matrix = 64 * 1000 * 2
    for row, k in zip(rows, [0, 0, 0, 0.5, 0.9], strict=True):
        assert row["bytes"] == pytest.approx(matrix * (1 + 2 * (1 - k)), rel=0.01)
        assert row["byte_bound"] == pytest.approx(3 / (1 + 2 * (1 - k)), rel=0.01)
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"]["median"] / 1e6)
    assert rows[0]["share_of_read_bandwidth"]["median"] == pytest.approx(1)
    assert rows[1]["speedup_over_torch"]["median"] == pytest.approx(1)
    assert {row["kernel"] for row in rows[2:]} == {"cpu"}


@needs_kernels
@pytest.mark.parametrize("batch", [1, 3])
def test_bench_decode_leaves_the_model_as_it_was(batch):
    model = random_model(TINY, 2, torch.float32)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    config = DecodeBench("float32", (0.5,), (batch,), model="tiny", tokens=5, rounds=1)
    result = bench_decode(config, model=model).record
    assert [row["contestant"] for row in result["rows"]] == ["stock transformers", "k = 0.0", "k = 0.5"]
    assert {(row["model"], row["dtype"]) for row in result["rows"]} == {("tiny", "float32")}
    stock, own, sparse = result["rows"]
    assert stock["bytes"] == own["bytes"] > sparse["bytes"]
    assert sparse["sparsity_decoded"] == pytest.approx(0.5**batch, abs=0.12)
    assert [entry["contestant"] for entry in result["breakdown"]] == ["stock transformers", "k = 0.0", "k = 0.5"]
    for entry in result["breakdown"]:
        assert all(math.isfinite(value) and value >= 0 for value in entry["ms"].values())
    assert cats_llm.thresholds(model) == {}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][1]), name
        assert tensor.is_contiguous()


@needs_kernels
def test_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cats_llm.benchmark.mlp._WORKING_SET", 0)
    files = ("--json", str(tmp_path / "a.json"), "--figure", str(tmp_path / "a.svg"))
    assert main(["bench", "mlp", "--shape", "64,96", "--rounds", "1", "--threads", "1,2", *files]) == 0
    assert "k = 0.9" in capsys.readouterr().out
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1
    files = ("--json", str(tmp_path / "b.json"), "--figure", str(tmp_path / "b.png"))
    arguments = ("--layers", "1", "--rounds", "1", "--tokens", "3", "--batch", "1,2", *files)
    assert main(["bench", "decode", "--shape", "64,96", *arguments]) == 0
    assert "where a step's ms go" in capsys.readouterr().out
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert main(["env"]) == 0
    assert cpu.isa() in capsys.readouterr().out


def test_wrong_usage(capsys, tmp_path):
    for arguments, code in (
        (["bench", "mlp", "--shape", "x"], 1),
        (["bench", "mlp", "--sparsity", "2"], 2),
        (["bench", "mlp", "--batch", "0"], 2),
        (["bench", "decode"], 2),
        (["bench", "mlp", "--figure", str(tmp_path / "no" / "a.svg")], 1),
    ):
        assert main(arguments) == code, arguments
        assert capsys.readouterr().err.count("\n") == 1
