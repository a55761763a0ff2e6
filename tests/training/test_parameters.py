"""What is trained and what is learned from: the loss distillation, and training all weights of the MLPs."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import cats_llm
import families
from cats_llm import CatsError, bundled
from cats_llm.cli.main import main
from cats_llm.errors import UsageError
from cats_llm.loading import ModelSource, load_model, load_tokenizer
from cats_llm.model.sparsify import densify
from cats_llm.text import load_sequences
from cats_llm.training import trainer as trainer_module
from cats_llm.training.config import DataConfig, FinetuneConfig, TrainingConfig
from cats_llm.training.data import IGNORED, Data
from cats_llm.training.finetune import finetune
from cats_llm.training.methods import apply_method
from cats_llm.training.parameters import make_teacher, make_trainable, mlp_parameters, trained_model
from cats_llm.training.trainer import train, trainer_arguments
from checkpoints import save_with_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = TrainingConfig(
    loss="distillation", steps=1, batch_size=4, micro_batch=2, rank=4, alpha=16, dropout=0.0, learning_rate=1e-2,
)  # fmt: skip
MLP = replace(SETTINGS, parameters="mlp")


def examples():
    """Four of different lengths; of each the first tokens are not trained on."""
    made = []
    for i, ids in enumerate(families.ids(4, 30, seed=7)):
        ids = ids[: 30 - 5 * i]
        labels = ids.clone()
        labels[: 4 + i] = IGNORED
        made.append({"input_ids": ids, "labels": labels})
    return made


def run(model, config, folder, teacher=None, steps=None):
    config = config if steps is None else replace(config, steps=steps, eval_every=steps)
    data = Data(examples(), examples()[:2], [], {"heldout": "random tokens"})
    return train(model, data, config, trainer_arguments(config, folder, "cpu"), teacher=teacher)


def taught(model, config, method="cats", thresholds=None):
    """A model in the form of a method, and its teacher."""
    teacher = make_teacher(model, config)
    apply_method(model, method, thresholds)
    return model, teacher


def log_probabilities(model, example):
    return torch.log_softmax(model(input_ids=example["input_ids"][None]).logits[0, :-1], -1)


def plain_divergence(dense, model, batch):
    """Mean over the predicted tokens of a batch, written out."""
    total, tokens = 0.0, 0
    for example in batch:
        wanted = example["labels"][1:] != IGNORED
        q, p = log_probabilities(dense, example)[wanted], log_probabilities(model, example)[wanted]
        total = total + (q.exp() * (q - p)).sum()
        tokens += int(wanted.sum())
    return total / tokens


# the loss


@pytest.mark.parametrize("method", ["cats", "relu"])
def test_the_loss_is_the_divergence_from_the_dense_model(split_or_fused, tmp_path, method):
    case = split_or_fused
    model, teacher = taught(case.dense_copy(), SETTINGS, method, case.config)
    apply_method(reference := case.dense_copy(), method, case.config)
    with torch.no_grad():
        expected = plain_divergence(case.dense_copy().double(), reference.double(), examples())
        measured = plain_divergence(case.dense_copy().double(), reference, examples()[:2])
    log = run(model, SETTINGS, tmp_path, teacher)
    assert expected > 1e-3, "the case tests nothing"
    assert log["steps"][0]["loss"] == pytest.approx(float(expected), rel=1e-4)
    # what is measured besides perplexity
    assert log["evaluations"][0]["kl"] == pytest.approx(float(measured), rel=1e-4)
    assert log["settings"]["loss"] == "distillation"


def test_a_dense_model_has_nothing_to_learn_from_itself(llama, tmp_path):
    model, teacher = taught(llama.dense_copy(), SETTINGS, "dense")
    log = run(model, SETTINGS, tmp_path, teacher)
    assert log["steps"][0]["loss"] == pytest.approx(0, abs=1e-6)
    assert log["steps"][0]["grad_norm"] < 1e-5


@pytest.mark.parametrize("config", [SETTINGS, MLP], ids=["lora", "mlp"])
def test_learning_from_the_dense_model_brings_it_nearer(llama, tmp_path, config):
    model, teacher = taught(llama.dense_copy(), config, "cats", llama.profile.config(0.7))
    log = run(model, replace(config, learning_rate=1e-3), tmp_path, teacher, steps=30)
    before, after = (log["evaluations"][i]["kl"] for i in (0, -1))
    assert after < 0.8 * before


# the teacher


@pytest.mark.parametrize("config", [SETTINGS, MLP], ids=["lora", "mlp"])
@pytest.mark.parametrize("base", ["dense", "sparse"])
def test_the_teacher_stays_the_dense_model_and_copies_what_changes(split_or_fused, tmp_path, config, base):
    case = split_or_fused
    model, teacher = taught(
        case.dense_copy() if base == "dense" else case.sparse(), config, "cats", copy.deepcopy(case.config)
    )
    pointers = {p.data_ptr() for p in model.parameters()}
    own = {name for name, p in teacher.named_parameters() if p.data_ptr() not in pointers}
    assert own == (set(mlp_parameters(model)) if config is MLP else set())
    assert not cats_llm.thresholds(teacher)
    before = families.logits(model, case.ids)
    run(model, replace(config, learning_rate=0.1), tmp_path, teacher, steps=2)
    assert torch.equal(families.logits(teacher, case.ids), case.dense_logits)
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert (families.logits(model.eval(), case.ids) - before).abs().max() > 1e-2, "nothing was trained"


def test_a_relufied_base_learns_from_its_own_activation(llama, tmp_path):
    """What is dense is the model as it is loaded, with the activation that its config names."""
    apply_method(llama_relu := llama.dense_copy(), "relu")
    llama_relu.save_pretrained(tmp_path / "relu")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "relu")
    expected = families.logits(loaded, llama.ids)
    teacher = make_teacher(loaded, SETTINGS)
    torch.testing.assert_close(families.logits(teacher, llama.ids), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, llama.dense_logits, atol=1e-2)


# all weights of the MLPs


def test_only_the_mlps_move(split_or_fused, tmp_path):
    case = split_or_fused
    before = case.dense.state_dict()
    apply_method(model := case.dense_copy(), "cats", case.config)
    log = run(model, replace(MLP, loss="cross-entropy"), tmp_path)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    parts = ("gate_up_proj", "down_proj") if case.family.fused else ("gate_proj", "up_proj", "down_proj")
    names = {f"{case.family.mlp.format(i)}.{part}.weight" for i in range(families.LAYERS) for part in parts}
    assert moved == names
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= names
    sizes = {name: value.numel() for name, value in case.dense.named_parameters()}
    assert log["parameters"] == {"trained": sum(sizes[name] for name in names), "all": sum(sizes.values())}


def test_the_steps_are_those_of_adamw_written_out(llama, tmp_path):
    config = replace(MLP, loss="cross-entropy", weight_decay=0.1, max_grad_norm=0.5, micro_batch=4)
    apply_method(model := llama.dense_copy(), "cats", llama.config)
    apply_method(reference := llama.dense_copy(), "cats", llama.config)
    log = run(model, config, tmp_path, steps=2)
    reference.double().requires_grad_(False)
    weights = {name: p for name, p in reference.named_parameters() if ".mlp." in name}
    first, second = ({name: torch.zeros_like(p) for name, p in weights.items()} for _ in range(2))
    start = {name: p.clone() for name, p in weights.items()}
    losses = []
    for step in (1, 2):
        total, tokens = 0.0, 0
        for p in weights.values():
            p.requires_grad_(True)
        for example in examples():
            log_p = log_probabilities(reference, example)
            total = total + F.nll_loss(log_p, example["labels"][1:], ignore_index=IGNORED, reduction="sum")
            tokens += int((example["labels"][1:] != IGNORED).sum())
        gradients = dict(zip(weights, torch.autograd.grad(total / tokens, weights.values()), strict=True))
        losses.append((total / tokens).item())
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        for name, p in weights.items():
            g = gradients[name] * min(1.0, 0.5 / (norm + 1e-6))
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
            step_taken = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            p.requires_grad_(False)
            p.copy_(p * (1 - 1e-2 * 0.1) - 1e-2 * step_taken)
    assert [step["loss"] for step in log["steps"]] == pytest.approx(losses, rel=1e-4)
    found = dict(model.named_parameters())
    for name, p in weights.items():
        # Adam divides small gradients by small ones, which rounding changes
        assert (found[name] - p).norm() < 1e-2 * (p - start[name]).norm(), name


def test_masters_are_float32_and_everything_else_stays(llama):
    model = llama.dense_copy().bfloat16()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainable(model, MLP)
    for name, p in model.named_parameters():
        assert torch.equal(p.bfloat16(), before[name])
        assert p.requires_grad == (p.dtype == torch.float32) == (name in mlp_parameters(model)), name


def test_weights_of_another_model_are_refused(llama, tmp_path):
    apply_method(model := llama.dense_copy(), "cats", llama.config)
    run(model, replace(MLP, loss="cross-entropy"), tmp_path)
    with pytest.raises(CatsError, match=r"trained.safetensors is missing, damaged or of another model"):
        trained_model(families.FAMILIES["phi3"].build(), MLP, tmp_path)
    trained = trained_model(densify(llama.dense_copy()), MLP, tmp_path)
    assert torch.equal(trained.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize("changes", [{"loss": "distillation"}, {"parameters": "mlp"}])
def test_what_needs_whole_weights_is_refused_where_they_are_sharded(llama, tmp_path, monkeypatch, changes):
    begin = trainer_module.CatsTrainer.__init__

    def sharded(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(trainer_module.CatsTrainer, "__init__", sharded)
    config = replace(SETTINGS, **({"loss": "cross-entropy"} | changes))
    model, teacher = taught(llama.dense_copy(), config, "cats", llama.config)
    with pytest.raises(CatsError, match="in every process, but FSDP and DeepSpeed shard weights; start plain"):
        run(model, config, tmp_path, teacher)


# the command


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=144, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, pad_token_id=None, bos_token_id=0,
    )  # fmt: skip
    return save_with_tokenizer(AutoModelForCausalLM.from_config(config), tmp_path_factory.mktemp("base"))


def settings(base, out, sparsity=0.7, dtype="float32", **training):
    return FinetuneConfig(
        ModelSource(str(base), device="cpu", dtype=dtype), out, str(bundled.calibration_text()), sparsity,
        training=replace(MLP, **({"rank": 64, "dropout": 0.1, "eval_every": 4, "steps": 4} | training)),
        reading=DataConfig(
            seq_length=32, heldout=str(bundled.heldout_text()), heldout_samples=4, calibration_samples=4
        ),
        save_every=2,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["cats", "relu", "dense"])
def test_what_is_written_is_the_trained_model(base, tmp_path, method):
    config = settings(base, tmp_path / "out", 0.7 if method == "cats" else None, method=method)
    log = finetune(config)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] or (tmp_path / "out.training" / "tensorboard").is_dir()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert ("quantization_config" in model.config.to_dict()) == (method != "dense")
    sequences = load_sequences(str(bundled.heldout_text()), load_tokenizer(str(base)), 32, 4)
    ids = torch.stack(list(sequences))
    log_p = torch.log_softmax(families.logits(model, ids)[:, :-1].double(), -1)
    loss = -log_p.gather(-1, ids[:, 1:, None]).mean()
    assert log["evaluations"][-1]["loss"] == pytest.approx(float(loss), rel=1e-5)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".mlp." in name}


def test_masters_are_rounded_once_at_the_end(base, tmp_path):
    """And thresholds can be set again while weights are float32 among bfloat16 ones."""
    log = finetune(settings(base, tmp_path / "out", dtype="bfloat16", refresh_every=2))
    assert [entry["step"] for entry in log["thresholds"]] == [0, 2, 4]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    model = load_model(str(tmp_path / "out"), device="cpu")
    assert cats_llm.thresholds(model) == model.config.quantization_config.thresholds
    held = log["evaluations"][-1]["sparsity"]["gate"]
    assert held == pytest.approx(0.7, abs=0.05)


def test_a_criterion_stays_what_it_is(base, tmp_path):
    text = ["--data", str(bundled.calibration_text()), "--seq-length", "32", "--samples", "8"]
    line = ["sparsify", str(base), str(tmp_path / "fitted"), "--sparsity", "0.6", "--criterion", "norm+compensate"]
    assert main([*line, *text]) == 0
    finetune(settings(tmp_path / "fitted", tmp_path / "out", None))
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("fitted", "out"))
    configs = [model.config.quantization_config for model in (before, after)]
    assert configs[0].vectors_sha256 == configs[1].vectors_sha256 is not None
    for old, new in zip(cats_llm.sparse_mlps(before).values(), cats_llm.sparse_mlps(after).values(), strict=True):
        assert torch.equal(old.threshold, new.threshold)
        assert torch.equal(old.compensation, new.compensation)
        assert not torch.equal(old.down_linear.weight, new.down_linear.weight)


def test_a_stopped_run_goes_on_with_the_same_steps(base, tmp_path):
    whole = finetune(settings(base, tmp_path / "whole", steps=6))

    def stop(line):
        if line.startswith("step 4"):
            raise KeyboardInterrupt

    config = settings(base, tmp_path / "out", steps=6)
    with pytest.raises(KeyboardInterrupt):
        finetune(config, notify=stop)
    assert (tmp_path / "out.training" / "checkpoint-2").is_dir()
    # only what is trained is in a checkpoint
    stored = load_file(tmp_path / "out.training" / "checkpoint-2" / "trained.safetensors")
    assert len(stored) == 2 * 3
    resumed = finetune(replace(config, resume=True))
    assert [s["loss"] for s in resumed["steps"]] == pytest.approx([s["loss"] for s in whole["steps"]], rel=1e-6)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("change", [{"micro_batch": 1}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("parameters", ["lora", "mlp"])
def test_how_it_is_computed_does_not_change_the_losses(llama, tmp_path, change, parameters):
    config = replace(SETTINGS, parameters=parameters, micro_batch=4)
    losses = []
    for i, one in enumerate((config, replace(config, **change))):
        model, teacher = taught(llama.dense_copy(), one, "cats", llama.config)
        log = run(model, one, tmp_path / str(i), teacher, steps=3)
        losses.append([step["loss"] for step in log["steps"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(base, tmp_path):
    one = finetune(settings(base, tmp_path / "one", batch_size=8))
    words = [
        "finetune", base, tmp_path / "two", "--data", bundled.calibration_text(), "--sparsity", "0.7", "--loss",
        "distillation", "--parameters", "mlp", "--steps", "4", "--batch-size", "8", "--micro-batch", "2", "--lr",
        "1e-2", "--seq-length", "32", "--heldout", bundled.heldout_text(), "--heldout-samples", "4",
        "--calibration-samples", "4", "--device", "cpu", "--dtype", "float32", "--eval-every", "4",
    ]  # fmt: skip
    line = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cats_llm.cli.main"]
    done = subprocess.run([sys.executable, "-m", *line, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "finetune.json").read_text(encoding="utf-8"))
    assert two["processes"] == 2
    assert [s["loss"] for s in two["steps"]] == pytest.approx([s["loss"] for s in one["steps"]], rel=1e-3)
    for a, b in zip(one["evaluations"], two["evaluations"], strict=True):
        assert [b["perplexity"], b["kl"]] == pytest.approx([a["perplexity"], a["kl"]], rel=1e-3)


# options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_adapters": True}, "--keep-adapters has no meaning for --parameters mlp"),
        ({"training": replace(MLP, dropout=0.1)}, "--lora-rank has no meaning for --parameters mlp"),
        ({"training": TrainingConfig(parameters="mlp", targets=("q_proj",))}, "--lora-targets has no meaning"),
    ],
)
def test_options_of_adapters_are_wrong_usage_without_them(changes, message):
    config = {"training": TrainingConfig(parameters="mlp")} | changes
    with pytest.raises(UsageError, match=message):
        FinetuneConfig(ModelSource("m"), Path("out"), "text.txt", 0.5, **config)


def test_unknown_choices_are_named():
    with pytest.raises(CatsError, match="the loss 'mse' is unknown; choose from cross-entropy, distillation"):
        TrainingConfig(loss="mse")
    with pytest.raises(CatsError, match="the parameters 'all' are unknown; choose from lora, mlp"):
        TrainingConfig(parameters="all")
