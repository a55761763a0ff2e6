"""`cats finetune` as a user types it: what is written, what is resumed, several processes, errors."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import cats_llm
from cats_llm import CatsError, bundled
from cats_llm.cli.main import main
from cats_llm.kernels import cpu
from cats_llm.loading import ModelSource, load_model, load_tokenizer
from cats_llm.options import option_fields
from cats_llm.text import load_sequences
from cats_llm.training.config import DataConfig, FinetuneConfig, TrainingConfig
from cats_llm.training.data import read_data
from cats_llm.training.finetune import finetune as finetune_in_python
from cats_llm.training.methods import resumed_config
from checkpoints import save_with_tokenizer
from marks import needs_kernels

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = bundled.calibration_text()
RANK, ALPHA = 4, 16
SHORT = {
    "data": TEXT, "seq-length": 32, "batch-size": 4, "micro-batch": 4, "lora-rank": RANK, "lora-alpha": ALPHA,
    "lr": 1e-2, "heldout-samples": 4, "calibration-samples": 4, "device": "cpu", "eval-every": 4,
}  # fmt: skip


def tiny(config, folder):
    torch.manual_seed(0)
    return save_with_tokenizer(AutoModelForCausalLM.from_config(config), folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=144, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, pad_token_id=None, bos_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    return tiny(config, tmp_path_factory.mktemp("base"))


def words(base, out, **changes):
    """The command line, without the name of the program."""
    options = SHORT | {name.replace("_", "-"): value for name, value in changes.items()}
    line = ["finetune", str(base), str(out)]
    for name, value in options.items():
        if value is not None and value is not False:
            line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def finetune(base, out, **changes):
    assert main(words(base, out, **changes)) == 0
    left = out.with_name(f"{out.name}.training")
    assert not left.exists() or [path.name for path in left.iterdir()] == ["tensorboard"]
    return json.loads((out / "finetune.json").read_text(encoding="utf-8"))


def read(source, tokenizer, samples):
    config = DataConfig(seq_length=32, samples=samples, heldout_samples=4, calibration_samples=4)
    return read_data(str(source), config, tokenizer, 0, True)


def losses(log):
    return [step["loss"] for step in log["steps"]]


def failure(capsys, *line):
    assert main([str(word) for word in line]) == 1
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """One short run, merged and with adapters kept: (folder, log) of each."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: (folder / name, finetune(base, folder / name, sparsity=0.7, steps=8, keep_adapters=name == "kept"))
        for name in ("merged", "kept")
    }


@pytest.fixture(scope="module")
def ids(base):
    tokenizer = load_tokenizer(str(base))
    return torch.stack(list(load_sequences(str(bundled.heldout_text()), tokenizer, 24, 3)))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


# what is written


def test_the_result_is_an_ordinary_cats_checkpoint(runs, base, ids):
    out, log = runs["merged"]
    model = AutoModelForCausalLM.from_pretrained(out)
    config = model.config.quantization_config
    assert config.sparsity == 0.7
    assert cats_llm.thresholds(model) == config.thresholds
    assert not any("lora" in name for name in model.state_dict())
    stock = load_file(out / "model.safetensors")
    assert stock.keys() == load_file(base / "model.safetensors").keys()
    # thresholds of the base model, from the examples set aside
    assert log["thresholds"][0]["step"] == 0
    assert {int(k): v for k, v in log["thresholds"][0]["thresholds"]["thresholds"].items()} == config.thresholds
    assert all(share == pytest.approx(0.7, abs=0.01) for share in config.layer_sparsity.values())


def test_merging_adds_the_adapters_to_the_weights_that_have_some(runs, base):
    adapters = load_file(runs["kept"][0] / "adapter_model.safetensors")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, runs["merged"][0]))
    assert len(adapters) == 2 * 2 * 5
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapters:
            product = adapters[f"{key}.lora_B.weight"].double() @ adapters[f"{key}.lora_A.weight"].double()
            torch.testing.assert_close(after[name].double(), weight + ALPHA / RANK * product, rtol=1e-5, atol=1e-6)
            assert product.abs().max() > 1e-3, f"{name} was not trained"
        else:
            assert torch.equal(after[name], weight), name


def test_kept_adapters_generate_what_the_merged_model_does(runs, ids):
    merged, kept = load_model(str(runs["merged"][0]), device="cpu"), load_model(str(runs["kept"][0]), device="cpu")
    assert cats_llm.thresholds(kept) == cats_llm.thresholds(merged)
    expected = logits(merged, ids)
    torch.testing.assert_close(logits(kept, ids), expected, rtol=1e-4, atol=1e-4)
    with kept.disable_adapter():
        assert (logits(kept, ids) - expected).abs().max() > 0.1, "the adapters change nothing"
    tokens = [
        model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=None) for model in (merged, kept)
    ]
    assert torch.equal(*tokens)


def test_kept_adapters_are_never_lost(runs, tmp_path, capsys, ids):
    out = runs["kept"][0]
    assert not (out / "config.json").exists()
    expected = logits(load_model(str(out), device="cpu"), ids)
    # by transformers alone
    by_transformers = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(by_transformers, ids), expected, rtol=1e-5, atol=1e-5)
    # moved, so that the path in adapter_config.json leads nowhere
    moved = tmp_path / "moved"
    shutil.copytree(out, moved)
    config = json.loads((moved / "adapter_config.json").read_text(encoding="utf-8"))
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/at/all"}))
    assert torch.equal(logits(load_model(str(moved), device="cpu"), ids), expected)
    assert main(["generate", str(moved), "--prompt", "Once", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    assert "CATS model" in capsys.readouterr().err
    # a command that cannot take adapters says so
    assert "holds adapters" in failure(capsys, "sparsify", moved, tmp_path / "x", "--sparsity", 0.5, "--data", TEXT)


def test_adapters_that_do_not_fit_are_refused(runs, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(runs["kept"][0], moved)
    file = moved / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in tensors.items()}, file)
    with pytest.raises(CatsError, match=r"the adapters in .* do not fit the model: size mismatch for .*lora_A"):
        load_model(str(moved), device="cpu")
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp" not in k}, file)
    with pytest.raises(CatsError, match="6 tensors are in one and not in the other"):
        load_model(str(moved), device="cpu")
    file.write_bytes(b"nothing")
    with pytest.raises(CatsError, match=r"adapter_model.safetensors is missing or damaged"):
        load_model(str(moved), device="cpu")


@needs_kernels
@pytest.mark.parametrize("method", ["cats", "relu"])
def test_merged_models_decode_on_the_kernel(runs, base, tmp_path, monkeypatch, method, ids):
    out = runs["merged"][0]
    if method == "relu":
        out = tmp_path / "relu"
        finetune(base, out, method="relu", steps=2)
    model = load_model(str(out), device="cpu")
    used = []
    supports = cpu.BACKEND.supports

    def spy(request):
        used.append(("cpu" if supports(request) else "plain", request.activation))
        return supports(request)

    monkeypatch.setattr(cpu.BACKEND, "supports", spy)
    found = logits(model, ids[:1, :1])
    assert [activation for _, activation in used] == [{"cats": "silu", "relu": "relu"}[method]] * 2
    assert all(name.startswith("cpu") for name, _ in used), used
    monkeypatch.setattr(cpu.BACKEND, "built", False)
    with torch.enable_grad():  # the plain path
        torch.testing.assert_close(found, model(input_ids=ids[:1, :1]).logits.detach(), rtol=1e-4, atol=1e-4)


def test_relu_and_dense_are_written_as_what_they_are(base, tmp_path, ids):
    relu = finetune(base, tmp_path / "relu", method="relu", steps=4)
    config = json.loads((tmp_path / "relu" / "config.json").read_text(encoding="utf-8"))
    assert config["hidden_act"] == "relu"
    assert set(config["quantization_config"]["thresholds"].values()) == {torch.finfo(torch.float32).tiny}
    measured = relu["evaluations"][-1]["layer_sparsity"]
    assert config["quantization_config"]["layer_sparsity"] == measured
    assert all(0.3 < share < 0.7 for share in measured.values()), "ReLU of a random gate is zero half of the time"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "relu")
    sparse = logits(model, ids)
    assert torch.allclose(logits(cats_llm.densify(model), ids), sparse, atol=1e-5), "without the package it is another"
    dense = finetune(base, tmp_path / "dense", method="dense", steps=4)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text(encoding="utf-8"))
    assert "sparsity" not in dense["evaluations"][0]
    names = [log["name"] for log in (relu, dense)]
    assert names == ["relu", "dense"]


def test_a_cats_model_keeps_its_thresholds(base, tmp_path, capsys):
    settings = {"steps": 2, "heldout": bundled.heldout_text()}
    log = finetune(base, tmp_path / "first", sparsity=0.7, **settings)
    again = finetune(tmp_path / "first", tmp_path / "again", **settings)
    assert again["name"] == "cats k=0.7"
    assert again["evaluations"][0]["perplexity"] == pytest.approx(log["evaluations"][-1]["perplexity"], rel=1e-5)
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("first", "again"))
    assert cats_llm.thresholds(before) == cats_llm.thresholds(after)
    assert "pass --sparsity" in failure(capsys, *words(base, tmp_path / "x", steps=2))


@pytest.fixture(scope="module")
def fitted(base, tmp_path_factory):
    """A checkpoint with thresholds a neuron and a compensation."""
    out = tmp_path_factory.mktemp("fitted") / "model"
    text = ["--data", str(bundled.calibration_text()), "--seq-length", "32", "--samples", "8"]
    assert main(["sparsify", str(base), str(out), "--sparsity", "0.6", "--criterion", "norm+compensate", *text]) == 0
    return out


def test_a_criterion_stays_what_it_is(fitted, tmp_path, ids):
    log = finetune(fitted, tmp_path / "out", sparsity=None, steps=2)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (fitted, tmp_path / "out"))
    configs = [model.config.quantization_config for model in (before, after)]
    assert configs[0].vectors_sha256 == configs[1].vectors_sha256 is not None
    assert configs[1].criterion["name"] == "norm+compensate"
    assert not torch.equal(logits(before, ids), logits(after, ids))
    assert log["evaluations"][0]["sparsity"]["gate"] == pytest.approx(0.6, abs=0.05)


def test_a_killed_run_of_a_criterion_goes_on_with_its_vectors(fitted, tmp_path):
    model = load_model(str(fitted))
    history = [{"step": 0, "thresholds": model.config.quantization_config.to_dict()}]
    found = resumed_config(history, load_model(str(fitted)))
    assert found.vectors_sha256 == model.config.quantization_config.vectors_sha256
    model.config.quantization_config = None
    with pytest.raises(CatsError, match="other thresholds than when the run was begun"):
        resumed_config(history, model)


def test_thresholds_of_a_criterion_are_not_refreshed(fitted, tmp_path, capsys):
    line = words(fitted, tmp_path / "out", sparsity=None, steps=2, refresh_thresholds=1)
    assert "criterion norm+compensate cannot be refreshed" in failure(capsys, *line)


def test_thresholds_may_come_from_a_profile(base, tmp_path):
    profile = tmp_path / "profile.safetensors"
    assert main(["calibrate", str(base), "--data", str(TEXT), "--samples", "4", "--seq-length", "64", "-o",
                 str(profile), "--device", "cpu"]) == 0  # fmt: skip
    finetune(base, tmp_path / "out", sparsity=0.5, profile=profile, steps=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert cats_llm.thresholds(model) == cats_llm.Profile.load(profile).config(0.5).thresholds


def test_python_gives_what_the_command_gives(runs, base, tmp_path):
    log = copy.deepcopy(runs["merged"][1])
    settings = TrainingConfig(
        steps=8, batch_size=4, rank=RANK, alpha=ALPHA, learning_rate=1e-2, eval_every=4,
    )  # fmt: skip
    config = FinetuneConfig(
        ModelSource(str(base), device="cpu"), tmp_path / "out", str(TEXT), 0.7, training=settings,
        reading=DataConfig(seq_length=32, heldout_samples=4, calibration_samples=4),
    )  # fmt: skip
    lines = []
    written = finetune_in_python(config, notify=lines.append)
    same = json.loads((tmp_path / "out" / "finetune.json").read_text("utf-8"))
    assert json.loads(json.dumps(written)) == same
    for entry in (same, log):
        for thresholds in entry["thresholds"]:
            del thresholds["thresholds"]["calibration"]["date"]
    differ = {"created", "seconds", "training_seconds", "command"}
    assert {k: v for k, v in same.items() if k not in differ} == {k: v for k, v in log.items() if k not in differ}
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", runs["merged"][0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert lines[-1] == f"{tmp_path / 'out'}: the merged model and the log, finetune.json"


def test_every_option_is_in_the_help_of_the_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["finetune", "--help"]) == 0
    text = capsys.readouterr().out
    for name, field in option_fields(FinetuneConfig).items():
        word = field.option.flags[0].partition("/")[0] if field.option.flags else f"--{name.replace('_', '-')}"
        assert (name.upper() if field.option.positional else word) in text, name


# the steps


def test_the_steps_are_those_of_a_plain_loop(base, tmp_path):
    settings = {"steps": 4, "samples": 10, "batch_size": 8, "lora_dropout": 0.0, "sparsity": 0.5}
    log = finetune(base, tmp_path / "out", **settings)
    kept = finetune(base, tmp_path / "kept", **(settings | {"lr": 0.0, "keep_adapters": True, "steps": 1}))
    assert kept["data"]["examples"] == 8  # so every batch is the whole of it, in whatever order
    model = load_model(str(tmp_path / "kept"), device="cpu")  # the adapters as they began
    data = read(TEXT, load_tokenizer(str(base)), samples=10)
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)
    ids = torch.stack([example["input_ids"] for example in data.train])
    expected = []
    for _ in range(4):
        out = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten())
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert losses(log) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0] - 0.1


@pytest.mark.parametrize("change", [{"micro_batch": 1}, {"gradient_checkpointing": True}])
def test_how_it_is_computed_does_not_change_the_losses(base, tmp_path, change):
    settings = {"steps": 4, "lora_dropout": 0.0, "sparsity": 0.5}
    plain = finetune(base, tmp_path / "plain", **settings)
    other = finetune(base, tmp_path / "other", **settings, **change)
    assert losses(other) == pytest.approx(losses(plain), rel=1e-4)


def test_bfloat16(base, tmp_path):
    finetune(base, tmp_path / "out", sparsity=0.5, steps=2, dtype="bfloat16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert cats_llm.thresholds(model) == model.config.quantization_config.thresholds


def test_refreshed_thresholds_hold_the_sparsity(base, tmp_path):
    settings = {"sparsity": 0.7, "steps": 6, "lr": 0.05}
    log = finetune(base, tmp_path / "out", refresh_thresholds=3, **settings)
    assert [entry["step"] for entry in log["thresholds"]] == [0, 3, 6]
    model = load_model(str(tmp_path / "out"), device="cpu")
    # the last calibration was of these weights, on these examples
    data = read(TEXT, load_tokenizer(str(base)), samples=32)
    expected = cats_llm.calibrate(copy.deepcopy(model), [torch.stack([e["input_ids"] for e in data.aside])])
    assert cats_llm.thresholds(model) == pytest.approx(expected.config(0.7).thresholds, rel=1e-2)
    assert {int(k): v for k, v in log["thresholds"][0]["thresholds"]["thresholds"].items()} != pytest.approx(
        cats_llm.thresholds(model), rel=1e-2
    )
    # what the old thresholds had come to is told
    assert all(0 < share < 1 for share in log["thresholds"][2]["drift"].values())
    stayed = finetune(base, tmp_path / "stayed", **settings)
    assert len(stayed["thresholds"]) == 1
    errors = [abs(run["evaluations"][-1]["sparsity"]["gate"] - 0.7) for run in (log, stayed)]
    assert errors[0] < errors[1]


def test_instructions(base, tmp_path):
    rows = [{"prompt": f"Is {i} even? Answer:", "completion": " no" if i % 2 else " yes"} for i in range(40)]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    log = finetune(base, tmp_path / "out", data=source, sparsity=0.5, lr=3e-2, eval_every=100)
    data = log["data"]
    assert (data["kind"], data["examples"], data["heldout_examples"], data["calibration_examples"]) == (
        "instructions", 32, 4, 4
    )  # fmt: skip
    assert len(log["steps"]) == 8  # one epoch
    # an answer is one token and the end of the text
    assert log["evaluations"][0]["tokens"] == 4 * 2
    assert log["evaluations"][-1]["loss"] < log["evaluations"][0]["loss"] - 1
    # the accuracy is that of generating
    model, tokenizer = load_model(str(tmp_path / "out"), device="cpu"), load_tokenizer(str(base))
    data = read(source, tokenizer, samples=None)
    right = 0
    for example in data.heldout:
        prompt = int((example["labels"] == -100).sum())
        ids = example["input_ids"]
        made = model.generate(input_ids=ids[None, :prompt], max_new_tokens=len(ids) - prompt, do_sample=False)
        right += made[0].tolist() == ids.tolist()
    assert log["evaluations"][-1]["accuracy"] == right / 4
    assert log["evaluations"][0]["accuracy"] == 0


def test_tensorboard(base, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(words(base, tmp_path / "out", sparsity=0.5, steps=4)) == 0
    assert [path.name for path in (tmp_path / "out.training").iterdir()] == ["tensorboard"]
    events = EventAccumulator(str(tmp_path / "out.training" / "tensorboard")).Reload()
    log = json.loads((tmp_path / "out" / "finetune.json").read_text(encoding="utf-8"))
    found = [event.value for event in events.Scalars("eval/perplexity")]
    assert found == pytest.approx([entry["perplexity"] for entry in log["evaluations"]], rel=1e-5)
    assert len(events.Scalars("train/loss")) == 4


# interruptions and processes


def run(line, variables=None, **kwargs):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (variables or {})
    return subprocess.Popen([sys.executable, "-m", *line], env=environment, **kwargs)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_losses(base, tmp_path, capsys):
    settings = {"sparsity": 0.7, "steps": 40, "save_every": 4, "refresh_thresholds": 6}
    whole = finetune(base, tmp_path / "whole", **settings)
    out, work = tmp_path / "out", tmp_path / "out.training"
    process = run(["cats_llm.cli.main", *words(base, out, **settings)])
    while not (work / "checkpoint-8" / "trainer_state.json").exists():
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    # what a kill in the middle of writing leaves
    (work / "checkpoint-999").mkdir()
    (work / "checkpoint-999" / "trainer_state.json").write_text('{"log_hi')
    assert "holds a run that was not finished" in failure(capsys, *words(base, out, **settings))
    changed = failure(capsys, *words(base, out, **(settings | {"lr": 1e-3, "resume": True})))
    assert "was begun with settings" in changed
    assert "999" not in changed
    resumed = finetune(base, out, **settings, resume=True)
    assert [step["step"] for step in resumed["steps"]] == list(range(1, 41))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)
    assert [e["step"] for e in resumed["evaluations"]] == [e["step"] for e in whole["evaluations"]]
    assert [e["perplexity"] for e in resumed["evaluations"]] == pytest.approx(
        [e["perplexity"] for e in whole["evaluations"]], rel=1e-6
    )
    one, two = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6, msg=name)
    assert cats_llm.thresholds(load_model(str(out), device="cpu")) == pytest.approx(
        cats_llm.thresholds(load_model(str(tmp_path / "whole"), device="cpu")), rel=1e-4
    )


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(base, tmp_path):
    settings = {
        "sparsity": 0.7, "steps": 6, "batch_size": 8, "micro_batch": 2, "lora_dropout": 0.0, "refresh_thresholds": 4,
        "heldout_samples": 5, "samples": 60,
    }  # fmt: skip
    one = finetune(base, tmp_path / "one", **settings)
    line = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cats_llm.cli.main"]
    process = run([*line, *words(base, tmp_path / "two", **settings)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    two = json.loads((tmp_path / "two" / "finetune.json").read_text(encoding="utf-8"))
    assert two["processes"] == 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for a, b in zip(one["evaluations"], two["evaluations"], strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-4)
        assert a["sparsity"]["gate"] == pytest.approx(b["sparsity"]["gate"], abs=1e-3)
    assert one["thresholds"][0]["thresholds"]["thresholds"] == two["thresholds"][0]["thresholds"]["thresholds"]


@pytest.mark.slow
def test_sharded_over_processes_the_step_is_the_same(base):
    script = str(Path(__file__).parents[1] / "support" / "fsdp_step.py")
    process = run(
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, str(base), "0.3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error.decode()
    found = json.loads(output)
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-5)
    assert found["error"] < 1e-4
    assert found["gradients"] == 2 * 2 * 5
    assert found["sharded"] > found["gradients"], "nothing was sharded"


@pytest.mark.slow
def test_training_sharded_by_fsdp_is_the_same(base, tmp_path):
    settings = {"sparsity": 0.7, "steps": 4, "batch_size": 4, "lora_dropout": 0.0, "samples": 40, "save_every": 2}
    one = finetune(base, tmp_path / "one", **settings, micro_batch=4)
    script = str(Path(__file__).parents[1] / "support" / "fsdp_train.py")
    line = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    process = run(
        [*line, *words(base, tmp_path / "two", **settings, micro_batch=2)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        variables={
            "ACCELERATE_USE_CPU": "true",
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        },
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    sharded = int(re.search(r"sharded parameters: ([0-9]+)", output.decode())[1])
    assert sharded > 2 * 5 * 2, "nothing but adapters was sharded"
    two = json.loads((tmp_path / "two" / "finetune.json").read_text(encoding="utf-8"))
    assert two["processes"] == 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for a, b in zip(one["evaluations"], two["evaluations"], strict=True):
        assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-4)
        assert a["sparsity"]["gate"] == pytest.approx(b["sparsity"]["gate"], abs=1e-3)
    ours, theirs = (dict(load_model(str(tmp_path / n), device="cpu").named_parameters()) for n in ("one", "two"))
    before = dict(load_model(str(base), device="cpu").named_parameters())
    moved = [name for name in ours if not torch.equal(ours[name], before[name])]
    assert len(moved) == 2 * 5
    for name in moved:
        # Adam divides small gradients by small ones, which rounding changes
        assert (ours[name] - theirs[name]).norm() < 0.02 * (ours[name] - before[name]).norm(), name


# errors


def test_errors_are_one_sentence(base, tmp_path, capsys, runs):
    out = tmp_path / "out"
    gpt2 = tiny(GPT2Config(vocab_size=4096, n_embd=32, n_layer=1, n_head=2), tmp_path / "gpt2")
    assert "has no gated MLP" in failure(capsys, *words(gpt2, out, sparsity=0.5))
    assert "there is no file or folder" in failure(capsys, *words(base, out, sparsity=0.5, data=tmp_path / "no.txt"))
    quantised = tmp_path / "quantised"
    shutil.copytree(base, quantised)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantised / "config.json").write_text(json.dumps(config))
    for method in ({"sparsity": 0.5}, {"method": "dense"}):
        assert "is quantised with gptq, and adapters cannot" in failure(capsys, *words(quantised, out, **method))
    assert "has a linear layer 'nothing'" in failure(capsys, *words(base, out, sparsity=0.5, lora_targets="nothing"))
    assert "cannot be divided" in failure(capsys, *words(base, out, sparsity=0.5, batch_size=6, micro_batch=4))
    assert "exists already" in failure(capsys, *words(base, base, sparsity=0.5))
    assert "--dtype bfloat16 or float32" in failure(capsys, *words(base, out, sparsity=0.5, dtype="float16"))
    other = tiny(LlamaConfig(vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=1), tmp_path / "other")  # fmt: skip
    profile = tmp_path / "profile.safetensors"
    assert main(["calibrate", str(other), "--data", str(TEXT), "--samples", "1", "--seq-length", "32", "-o",
                 str(profile), "--device", "cpu"]) == 0  # fmt: skip
    capsys.readouterr()
    assert "the profile was made with another model" in failure(
        capsys, *words(base, out, sparsity=0.5, profile=profile)
    )
    assert not out.exists()


def test_a_diverged_run_is_no_result(base, tmp_path, capsys):
    error = failure(capsys, *words(base, tmp_path / "out", sparsity=0.5, steps=4, lr=1e30, save_every=0))
    assert "the training diverged" in error
    assert not (tmp_path / "out").exists()
    # the log is there, and is JSON
    text = (tmp_path / "out.training" / "log.json").read_text(encoding="utf-8")
    log = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the log"))
    assert log["evaluations"][-1]["perplexity"] is None


def test_only_a_sparsity_that_was_asked_for_can_be_held(base, tmp_path, capsys):
    model = load_model(str(base), device="cpu")
    cats_llm.sparsify(model, cats_llm.CatsConfig(thresholds={0: 0.1, 1: 0.1})).save_pretrained(tmp_path / "by-hand")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path / "by-hand")
    error = failure(capsys, *words(tmp_path / "by-hand", tmp_path / "out", refresh_thresholds=2, steps=2))
    assert "were not calibrated for a sparsity" in error


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 2, "epochs": 1, "sparsity": 0.5},
        {"method": "relu", "sparsity": 0.5},
        {"sparsity": 1.5},
        {"profile": "p.safetensors"},
    ],
)
def test_wrong_usage(base, tmp_path, wrong):
    assert main(words(base, tmp_path / "out", **wrong)) == 2
