"""The harness: perplexity, methods, paired tests, cache, resuming, memory that runs out, several processes."""

import copy
import json
import math
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import cats_llm
import families
from cats_llm import bundled
from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.cli.main import main
from cats_llm.evaluation.batch import BatchSize
from cats_llm.evaluation.cache import Cache, digest_model, digest_tokenizer
from cats_llm.evaluation.paired import combined, mcnemar, paired_difference, standard_error
from cats_llm.evaluation.perplexity import PerplexityTask
from cats_llm.evaluation.run import run_evaluation
from cats_llm.evaluation.task import Metric
from cats_llm.evaluation.variants import Variant, make_variants
from cats_llm.loading import load_model
from cats_llm.text import load_sequences

HELDOUT = str(bundled.heldout_text())
CALIBRATION = str(bundled.calibration_text())


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def task(**settings):
    return PerplexityTask(HELDOUT, **({"length": 64, "samples": 6} | settings))


def rows(result, variant, **wanted):
    """The only row, by metric."""
    return {
        row["metric"]: row
        for row in result["results"]
        if row["variant"] == variant and all(row[key] == value for key, value in wanted.items())
    }


# --- perplexity ---


def perplexity_by_hand(model, tokenizer, text, length, stride, windows):
    """In twenty lines, without the package: perplexity a token, a word and a byte."""
    documents = [d.strip() for d in text.split("\n<|endoftext|>\n") if d.strip()]
    stream, words, size, nll, tokens, used = [], 0, 0, 0.0, 0, 0
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        stream += [*ids, tokenizer.eos_token_id]
        words += len(document.split())
        size += len(document.encode("utf-8"))
        if len(stream) >= (windows - 1) * stride + length:
            break
    for begin in range(0, windows * stride, stride):
        window = torch.tensor(stream[begin : begin + length])
        with torch.no_grad():
            log_p = model(window[None]).logits[0].double().log_softmax(-1)
        for i in range(1, length):
            if begin + i >= used:
                nll -= log_p[i - 1, window[i]].item()
                tokens += 1
        used = begin + length + (1 if stride == length else 0)
    mean = nll / tokens
    return math.exp(mean), math.exp(mean * len(stream) / words), math.exp(mean * len(stream) / size), tokens


@pytest.mark.parametrize("stride", [None, 64, 40, 1])
def test_perplexity_equals_a_computation_by_hand(model, tokenizer, stride):
    result = run_evaluation(model, tokenizer, [Variant("dense")], [task(stride=stride)], batch_size=4)
    text = Path(HELDOUT).read_text(encoding="utf-8")
    token, word, byte, tokens = perplexity_by_hand(model, tokenizer, text, 64, stride or 64, 6)
    found = rows(result, "dense")
    assert result["tasks"][0]["tokens"] == tokens
    assert found["perplexity"]["value"] == pytest.approx(token, rel=1e-6)
    assert found["word_perplexity"]["value"] == pytest.approx(word, rel=1e-6)
    assert found["byte_perplexity"]["value"] == pytest.approx(byte, rel=1e-6)


def test_a_stride_predicts_with_more_context(model, tokenizer):
    tasks = [task(name="cut", length=64, samples=32), task(name="overlap", length=64, stride=16, samples=128)]
    result = run_evaluation(model, tokenizer, [Variant("dense")], tasks, batch_size=32)
    cut, overlap = (rows(result, "dense", task=name)["perplexity"]["value"] for name in ("cut", "overlap"))
    assert overlap < cut


def test_the_tokens_of_a_sparse_variant_are_counted(model, tokenizer, profile):
    result = run_evaluation(model, tokenizer, make_variants(model, ["cats"], [0.5], profile), [task()])
    row = rows(result, "cats k=0.5")["perplexity"]
    assert row["tokens"] == 6 * 64
    ids = torch.stack(list(load_sequences(HELDOUT, tokenizer, 64, samples=6)))
    config = profile.config(0.5)
    below = {}
    for layer, t in config.thresholds.items():
        mlp = model.model.layers[layer].mlp
        hook = mlp.gate_proj.register_forward_hook(
            lambda _m, _x, y, t=t, layer=layer: below.update({layer: (F.silu(y).abs() < t).double().mean().item()})
        )
        # the layers below must be sparse too
        with families.Reference(model, families.FAMILIES["mistral"], {k: v for k, v in config.thresholds.items()}):
            families.logits(model, ids)
        hook.remove()
    assert {int(k): v for k, v in row["layer_sparsity"].items()} == pytest.approx(below, abs=1e-4)
    assert row["sparsity"]["gate"] == pytest.approx(sum(below.values()) / len(below), abs=1e-4)
    assert row["sparsity"]["ffn"] == pytest.approx(row["sparsity"]["gate"] * 2 / 3)


# --- methods ---


class Relu:
    """A dense model whose activations are ReLU, without the package."""

    def __init__(self, model):
        self.mlps = [layer.mlp for layer in model.model.layers]

    def __enter__(self):
        self.before = [mlp.act_fn for mlp in self.mlps]
        for mlp in self.mlps:
            mlp.act_fn = torch.nn.ReLU()

    def __exit__(self, *args):
        for mlp, act in zip(self.mlps, self.before, strict=True):
            mlp.act_fn = act


def test_relu_is_the_model_with_another_activation(model, tokenizer, profile):
    variants = make_variants(model, ["relu", "cats"], [0.5], profile)
    assert [v.name for v in variants] == ["dense", "relu", "cats k=0.5"]
    result = run_evaluation(model, tokenizer, variants, [task()])
    ids = torch.stack(list(load_sequences(HELDOUT, tokenizer, 64, samples=6)))
    with torch.no_grad():
        q = model(ids).logits[:, :-1].double().log_softmax(-1)
        with Relu(model):
            p = model(ids).logits[:, :-1].double().log_softmax(-1)
    nll = -p.gather(-1, ids[:, 1:, None]).mean().item()
    found = rows(result, "relu")
    assert found["perplexity"]["value"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert found["kl"]["value"] == pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=1e-3)
    assert 0.5 < found["perplexity"]["sparsity"]["gate"] < 0.8
    assert result["variants"][1]["thresholds"] is None


@pytest.mark.parametrize("before", ["dense", "sparse"])
def test_the_model_is_left_as_it_was(cases, tokenizer, profile, before):
    model = load_model(str(bundled.model_path()), "float32", "cpu")
    if before == "sparse":
        cats_llm.sparsify(model, profile.config(0.7).with_coverage(TokenPolicy(dense_first_tokens=2)))
    digest, logits = digest_model(model), families.logits(model, torch.arange(64)[None])
    classes = [type(module) for module in model.modules()]
    run_evaluation(model, tokenizer, make_variants(model, ["cats", "relu"], [0.5], profile), [task()])
    assert torch.equal(families.logits(model, torch.arange(64)[None]), logits)
    assert [type(module) for module in model.modules()] == classes
    assert digest_model(model) == digest


def test_coverage_is_in_the_result(model, tokenizer, profile):
    variants = make_variants(model, ["cats", "relu"], [0.5], profile, TokenPolicy(dense_first_tokens=32))
    result = run_evaluation(model, tokenizer, variants, [task()])
    assert result["variants"][1]["coverage"]["dense_first_tokens"] == 32
    assert result["variants"][0]["coverage"] == TokenPolicy().to_dict()
    for name in ("cats k=0.5 (first 32 dense)", "relu (first 32 dense)"):
        assert rows(result, name)["perplexity"]["sparsity"]["gate"] < 0.4
    assert variants[1].config.coverage == TokenPolicy(dense_first_tokens=32)


def test_another_models_weights_are_a_variant_of_their_own(model, tokenizer):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    result = run_evaluation(model, tokenizer, [Variant("dense"), Variant("tuned", model=other)], [task()])
    alone = run_evaluation(other, tokenizer, [Variant("dense")], [task()])
    found = rows(result, "tuned")
    assert found["perplexity"]["value"] == rows(alone, "dense")["perplexity"]["value"]
    assert found["kl"]["value"] > 0
    assert found["perplexity"]["difference"]["value"] == pytest.approx(
        found["perplexity"]["value"] - rows(result, "dense")["perplexity"]["value"]
    )


@pytest.mark.parametrize(
    ("methods", "sparsities", "with_profile", "message"),
    [
        (["cats"], [0.5], False, "needs thresholds"),
        (["cats"], [], True, "needs a sparsity"),
        (["magic"], [0.5], True, "'magic' is no method; choose from dense, cats, relu"),
    ],
)
def test_variants_that_cannot_be(model, profile, methods, sparsities, with_profile, message):
    with pytest.raises(cats_llm.CatsError, match=message):
        make_variants(model, methods, sparsities, profile if with_profile else None)


# --- paired tests ---


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 5), (3, 12), (40, 70), (700, 900)])
def test_mcnemar_is_the_binomial_test(gained, lost):
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


def metric(scores, weights=None, kind="mean", strata=None):
    weights = weights or [1.0] * len(scores)
    mean = float(np.average(scores, weights=weights))
    return Metric("m", math.exp(mean) if kind == "perplexity" else mean, None, True, len(scores), kind, scores, weights,
                  strata or [])  # fmt: skip


def test_a_difference_of_accuracies():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 2, 300).astype(float).tolist() for _ in range(2))
    found = paired_difference(metric(a), metric(b))
    d = np.array(a) - np.array(b)
    assert found.value == pytest.approx(d.mean())
    assert found.stderr == pytest.approx(stats.sem(d))
    assert (found.low, found.high) == pytest.approx(stats.norm.interval(0.95, d.mean(), stats.sem(d)))
    assert found.p == pytest.approx(stats.binomtest(int((d > 0).sum()), int((d != 0).sum())).pvalue)
    assert "McNemar" in found.test


def test_a_difference_of_scores_agrees_with_a_t_test():
    rng = np.random.default_rng(1)
    b = rng.normal(size=60)
    a = b + rng.normal(0.08, 0.3, size=60)
    found = paired_difference(metric(a.tolist()), metric(b.tolist()))
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.02)
    assert found.stderr == pytest.approx(stats.sem(a - b))


def test_a_difference_of_perplexities():
    rng = np.random.default_rng(2)
    b = rng.normal(3.0, 0.2, size=80)
    a = b + rng.normal(0.02, 0.05, size=80)
    found = paired_difference(metric(a.tolist(), kind="perplexity"), metric(b.tolist(), kind="perplexity"))
    assert found.value == pytest.approx(math.exp(a.mean()) - math.exp(b.mean()))
    # the delta method
    assert found.stderr == pytest.approx(stats.sem(np.exp(b.mean()) * (a - b)), rel=0.2)
    assert found.low < found.value < found.high
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.02)


def test_equal_variants_do_not_differ():
    for kind in ("mean", "perplexity"):
        found = paired_difference(metric([0.1, 0.4, 0.2], kind=kind), metric([0.1, 0.4, 0.2], kind=kind))
        assert (found.value, found.stderr, found.p) == (0.0, pytest.approx(0.0, abs=1e-15), 1.0)


def test_no_difference_without_pairs():
    assert paired_difference(metric([1.0]), metric([1.0])) is None
    assert paired_difference(metric([1.0, 0.0]), metric([1.0, 0.0, 1.0])) is None
    opaque = Metric("bleu", 1.0, None, True, 5)
    assert paired_difference(opaque, opaque) is None


def test_the_mean_of_tasks_weighs_them_equally():
    one, two = [1.0, 0.0, 1.0, 1.0], [0.0, 0.0]
    found = combined("acc", [metric(one), metric(two)])
    assert found.value == pytest.approx((0.75 + 0.0) / 2)
    assert found.stderr == pytest.approx(math.hypot(stats.sem(one), stats.sem(two)) / 2)
    assert standard_error(one, [1.0] * 4) == pytest.approx(stats.sem(one))


# --- memory ---


def test_a_batch_that_does_not_fit_is_halved(model, tokenizer, profile, monkeypatch):
    variants = make_variants(model, ["cats"], [0.5], profile)
    expected = run_evaluation(model, tokenizer, variants, [task()], batch_size=2)
    forward, sizes, said = type(model).forward, [], []

    def limited(self, input_ids=None, **inputs):
        sizes.append(len(input_ids))
        result = forward(self, input_ids=input_ids, **inputs)  # memory runs out late
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return result

    monkeypatch.setattr(type(model), "forward", limited)
    result = run_evaluation(model, tokenizer, variants, [task()], batch_size=5, notify=said.append)
    assert sizes[0] == 5
    assert said == ["out of memory: going on with batches of 2"]
    assert max(sizes[1:]) == 2, "the smaller batch is forgotten"
    for mine, other in zip(result["results"], expected["results"], strict=True):
        assert mine["value"] == pytest.approx(other["value"], rel=1e-9)
        assert mine["tokens"] == other["tokens"], "tokens of the failed attempt were counted"
        assert mine["layer_sparsity"] == other["layer_sparsity"]


def test_one_sequence_that_does_not_fit_is_an_error():
    def full(size):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to ...")

    with pytest.raises(cats_llm.CatsError, match="out of memory with one sequence"):
        BatchSize(8).run(full)

    def broken(size):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        BatchSize(8).run(broken)


# --- cache ---


def test_measurements_are_found_by_content(model, tokenizer, profile, tmp_path):
    def computed(model, variants, *tasks):
        cached = []
        result = run_evaluation(
            model, tokenizer, variants, tasks, cache=Cache(tmp_path), progress=lambda p: cached.append(p.cached)
        )
        return cached.count(False), result

    variants = make_variants(model, ["cats"], [0.5], profile)
    first, result = computed(model, variants, task())
    assert first == 2
    again, repeated = computed(
        copy.deepcopy(model), [Variant("dense"), Variant("x", "cats", variants[1].config)], task()
    )
    assert again == 0, "names must not matter"
    assert [r["value"] for r in repeated["results"]] == [r["value"] for r in result["results"]]
    assert [r["difference"] for r in repeated["results"]] == [r["difference"] for r in result["results"]]
    assert computed(model, variants, task(name="renamed"))[0] == 0, "names must not matter"
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.norm.weight[0] += 1e-3
    assert computed(changed, variants, task())[0] == 2, "other weights"
    assert computed(model, make_variants(model, ["cats"], [0.6], profile), task())[0] == 1, "other thresholds"
    covered = make_variants(model, ["cats"], [0.5], profile, TokenPolicy(dense_first_tokens=1))
    assert computed(model, covered, task())[0] == 1, "other tokens"
    assert computed(model, variants, task(stride=32))[0] == 2, "another stride"
    assert computed(model, variants, task(samples=5))[0] == 2, "other text"
    for file in tmp_path.iterdir():
        file.write_text(file.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert computed(model, variants, task())[0] == 2, "a damaged file was believed"


def test_the_digest_of_a_sparse_model_is_that_of_its_dense_one(llama, tokenizer):
    assert digest_model(llama.sparse()) == digest_model(llama.dense)
    assert digest_model(llama.dense_copy().to(torch.bfloat16)) != digest_model(llama.dense)
    changed = copy.deepcopy(tokenizer)
    assert digest_tokenizer(changed) == digest_tokenizer(tokenizer)
    changed.add_tokens(["xyzzy"])
    assert digest_tokenizer(changed) != digest_tokenizer(tokenizer)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(short_text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CATS_CACHE", str(tmp_path / "cache"))
    arguments = [
        "eval", str(bundled.model_path()), "--text", HELDOUT, "--calibration", short_text, "--sparsity", "0.5,0.7,0.9",
        "--samples", "8", "--seq-length", "128", "--dtype", "float32", "--device", "cpu", "--json",
        str(tmp_path / "r.json"),
    ]  # fmt: skip
    command = [sys.executable, "-m", "cats_llm.cli.main", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    before = []
    for line in process.stderr:
        before.append(line)
        if line.startswith("[2/4]"):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert not (tmp_path / "r.json").exists()
    assert [name.name for name in tmp_path.iterdir()] == ["cache"]
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache" / "eval").glob("*.json")}
    assert len(done) >= 2
    assert main(arguments) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert len(lines) == 4
    assert ["known already" in line for line in lines] == [i < len(done) for i in range(4)]
    assert all(file.stat().st_mtime_ns == time for file, time in done.items()), "computed again"
    assert main([*arguments[:-1], str(tmp_path / "f.json"), "--no-cache"]) == 0
    assert "known already" not in capsys.readouterr().err
    results = [json.loads((tmp_path / name).read_text(encoding="utf-8"))["results"] for name in ("r.json", "f.json")]
    assert results[0] == results[1]


# --- several processes ---

WORKER = """
import json, sys
import torch, torch.distributed as dist
torch.set_num_threads(1)
rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
from cats_llm import bundled, calibrate
from cats_llm.evaluation.variants import make_variants
from cats_llm.evaluation.perplexity import PerplexityTask
from cats_llm.evaluation.run import run_evaluation
from cats_llm.evaluation.tasks import build_tasks
from cats_llm.loading import load_model, load_tokenizer
from cats_llm.text import load_sequences
from lm_eval.tasks._index import TaskIndex
from pathlib import Path
every = TaskIndex._iter_yaml_files  # 14,000 files, of which one is needed
TaskIndex._iter_yaml_files = lambda root: every(root / "piqa" if (root / "piqa").is_dir() else root)
model = load_model(str(bundled.model_path()), "float32", "cpu")
tokenizer = load_tokenizer(str(bundled.model_path()))
from cats_llm.calibration.profile import Profile
profile = Profile.load(sys.argv[4])
tasks, means = build_tasks(["piqa"], Path(sys.argv[5]))
tasks.append(PerplexityTask(str(bundled.heldout_text()), length=64, samples=5))
batches = [torch.stack(list(load_sequences(str(bundled.calibration_text()), tokenizer, 64, samples=3)))]
variants = make_variants(model, ["cats", "teal", "wina"], [0.5], profile, batches=batches)
result = run_evaluation(model, tokenizer, variants, tasks, batch_size=2)
Path(f"{out}.{rank}").write_text(json.dumps(result))
"""

PIQA = [
    {"goal": f"How do I open the {thing}?", "sol1": f"Turn the key of the {thing}.", "sol2": "Eat it.", "label": i % 2}
    for i, thing in enumerate(["door", "old box", "window of the house", "gate", "chest"])
]


@pytest.mark.slow
def test_two_processes_share_the_work(model, tokenizer, profile, tmp_path):
    from cats_llm.evaluation.tasks import build_tasks

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA), encoding="utf-8")
    profile.save(tmp_path / "p.safetensors")
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [str(tmp_path / name) for name in ("out", "p.safetensors", "data")]
    processes = [
        subprocess.Popen([sys.executable, str(tmp_path / "worker.py"), str(rank), str(port), *places])
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    found = [json.loads((tmp_path / f"out.{rank}").read_text(encoding="utf-8"))["results"] for rank in range(2)]
    assert found[0] == found[1], "the processes disagree"
    tasks, _ = build_tasks(["piqa"], tmp_path / "data")
    tasks.append(task(length=64, samples=5))
    batches = [torch.stack(list(load_sequences(CALIBRATION, tokenizer, 64, samples=3)))]
    variants = make_variants(model, ["cats", "teal", "wina"], [0.5], profile, batches=batches)
    alone = run_evaluation(model, tokenizer, variants, tasks, batch_size=2)
    for mine, expected in zip(found[0], alone["results"], strict=True):
        for key in ("variant", "task", "metric", "n", "tokens"):
            assert mine[key] == expected[key]
        assert mine["value"] == pytest.approx(expected["value"], rel=1e-5)
        assert mine["layer_sparsity"] == pytest.approx(expected["layer_sparsity"], abs=1e-3)
        assert mine["linear_sparsity"] == pytest.approx(expected["linear_sparsity"], abs=1e-3)
