"""The parts of fine-tuning: gradients, data, which layers get adapters, ReLUfication, measurements."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import cats_llm
import families
from cats_llm import CatsError, bundled
from cats_llm.loading import load_tokenizer
from cats_llm.model.relufy import relufy
from cats_llm.text import load_sequences
from cats_llm.training.adapters import adaptable, add_adapters
from cats_llm.training.config import DataConfig, TrainingConfig
from cats_llm.training.data import IGNORED, collate, is_instructions, read_data, read_instructions, read_text
from cats_llm.training.methods import apply_method
from cats_llm.training.validation import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = str(bundled.calibration_text())


# the gradient through the mask


def effective(linear, leaves):
    """W + alpha / r B A of a LoRA layer, written out, with fresh float64 leaves for A and B."""
    a, b = (layer["default"].weight.detach().clone().requires_grad_() for layer in (linear.lora_A, linear.lora_B))
    leaves += [a, b]
    return linear.base_layer.weight.detach() + linear.scaling["default"] * b @ a


@pytest.mark.parametrize("per_neuron", [False, True])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_gradients_through_the_mask_are_those_of_the_formula(llama, per_neuron, activation):
    model = llama.sparse().double()
    apply_method(model, "cats" if activation == "silu" else "relu", llama.config)
    adapted = add_adapters(model, TrainingConfig(rank=4, alpha=8, dropout=0.0)).double()
    mlp = cats_llm.sparse_mlps(adapted)[1]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in mlp.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        if per_neuron:
            mlp.threshold = torch.rand(families.FFN, generator=generator)
    x = torch.randn(5, 7, families.HIDDEN, generator=generator, dtype=torch.float64)
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (mlp(mine) * weights).sum().backward()

    leaves = []
    w_gate, w_up, w_down = (effective(layer, leaves) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    g = theirs @ w_gate.T
    a = g / (1 + torch.exp(-g)) if activation == "silu" else g * (g > 0)
    alive = (a.abs() >= mlp.threshold.double()).double().detach()
    assert 0.2 < alive.mean() < 0.9, "the case tests nothing"
    ((a * alive * (theirs @ w_up.T)) @ w_down.T * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    found = [
        layer["default"].weight.grad
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        for layer in (linear.lora_A, linear.lora_B)
    ]
    for i, (gradient, leaf) in enumerate(zip(found, leaves, strict=True)):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-12, msg=f"adapter matrix {i}")


def test_dead_neurons_get_no_gradient_and_living_ones_do(llama):
    model = llama.sparse().double()
    mlp = cats_llm.sparse_mlps(model)[0]
    x = torch.randn(1, 1, families.HIDDEN, dtype=torch.float64)
    mlp(x).sum().backward()
    g = F.linear(x, mlp.gate_proj.weight)[0, 0].detach()
    dead = (F.silu(g).abs() < mlp.threshold.double()).nonzero().flatten()
    alive = (F.silu(g).abs() >= mlp.threshold.double()).nonzero().flatten()
    assert len(dead) > 10
    assert len(alive) > 10
    for projection in (mlp.gate_proj, mlp.up_proj):
        assert not projection.weight.grad[dead].any()
        assert projection.weight.grad[alive].any(dim=1).all()
    assert not mlp.down_proj.weight.grad[:, dead].any()


# which layers get adapters


def test_adapters_go_to_the_projections_of_the_paper(case):
    found = adaptable(case.dense)
    attention = {"qkv_proj"} if case.name == "phi3" else {"q_proj", "v_proj"}
    mlp = {"gate_up_proj", "down_proj"} if case.family.fused else {"gate_proj", "up_proj", "down_proj"}
    assert {path.rpartition(".")[2] for path in found} == attention | mlp
    assert len(found) == len(set(found)) == families.LAYERS * len(attention | mlp)
    assert not any("vision" in path or "visual" in path for path in found)
    assert adaptable(case.sparse()) == found


def test_adapters_go_where_the_user_says(llama):
    assert {path.rpartition(".")[2] for path in adaptable(llama.dense, ["k_proj", "down_proj"])} == {
        "k_proj",
        "down_proj",
    }
    with pytest.raises(CatsError, match=r"no decoder layer has a linear layer 'query'; .* may name .*q_proj"):
        adaptable(llama.dense, ["query", "q_proj"])


def test_a_model_without_gated_mlps_is_refused():
    with pytest.raises(CatsError, match="has no gated MLP"):
        adaptable(families.REFUSED["gpt2"][0].build())


# data


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(bundled.model_path()))


@pytest.fixture
def instructions(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
        return str(path)

    return write


def answer(tokenizer, example):
    """What the labels spell out."""
    return tokenizer.decode(example["labels"][example["labels"] != IGNORED])


def test_text_is_packed_and_every_token_is_predicted(tokenizer):
    examples = read_text(TEXT, tokenizer, 64, 3).examples
    expected = list(load_sequences(TEXT, tokenizer, 64, 3))
    assert len(examples) == 3
    for example, ids in zip(examples, expected, strict=True):
        assert torch.equal(example["input_ids"], ids)
        assert torch.equal(example["labels"], ids)


def test_only_the_answer_is_predicted(tokenizer, instructions):
    source = instructions({"prompt": "Is the cat happy? Answer:", "completion": " yes"})
    assert is_instructions(source)
    (example,) = read_instructions(source, tokenizer, 64).examples
    assert tokenizer.decode(example["input_ids"]) == "Is the cat happy? Answer: yes</s>"
    assert answer(tokenizer, example) == " yes</s>"


def test_every_answer_of_a_conversation_is_predicted(tokenizer, instructions):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    source = instructions({"messages": messages})
    try:
        (example,) = read_instructions(source, tokenizer, 64).examples
        assert answer(tokenizer, example) == "two;four;"
    finally:
        tokenizer.chat_template = None
    with pytest.raises(CatsError, match="no chat template"):
        read_instructions(source, tokenizer, 64)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": 3}, "line 1 of .* has no text in prompt and completion"),
        ({"messages": "hello"}, "no conversation"),
        ({"messages": [{"role": "user", "content": "hello"}]}, "an assistant"),
        ("{", "line 1 of .* is not JSON"),
        ("[1]", "no JSON object"),
        ({"prompt": "a b c d e f g h", "completion": "i"}, "longer than 4 tokens"),
    ],
)
def test_wrong_instructions_are_named(tokenizer, instructions, row, message):
    with pytest.raises(CatsError, match=message):
        read_instructions(instructions(row), tokenizer, 4)


def test_long_instructions_are_counted(tokenizer, instructions):
    short, long = {"prompt": "a", "completion": "b"}, {"prompt": "many words " * 50, "completion": "b"}
    found = read_instructions(instructions(short, long), tokenizer, 32)
    assert (len(found.examples), found.too_long) == (1, 1)


def test_a_column_of_text_is_text(instructions):
    assert not is_instructions(instructions({"text": "a", "prompt": "b", "completion": "c"}))
    assert not is_instructions(TEXT)


def test_batches_are_padded_and_say_so(tokenizer):
    one = {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([IGNORED, 6, 7])}
    two = {"input_ids": torch.tensor([8]), "labels": torch.tensor([8])}
    batch = collate([one, two])
    assert batch["input_ids"][0].tolist() == [5, 6, 7]
    assert batch["input_ids"][1, 0] == 8
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


def read(tokenizer, calibrates, **changes):
    config = DataConfig(seq_length=64, **({"samples": 40, "heldout_samples": 3, "calibration_samples": 2} | changes))
    return read_data(TEXT, config, tokenizer, 0, calibrates)


def test_what_is_set_aside_is_not_trained_on(tokenizer):
    data = read(tokenizer, True)
    parts = [[tuple(e["input_ids"].tolist()) for e in part] for part in (data.train, data.heldout, data.aside)]
    assert [len(part) for part in parts] == [35, 3, 2]
    everything = {tuple(ids.tolist()) for ids in load_sequences(TEXT, tokenizer, 64, 40)}
    assert set().union(*parts) == everything
    assert len(everything) == 40
    # a method without thresholds trains on the same
    other = read(tokenizer, False)
    assert other.aside == []
    assert [tuple(e["input_ids"].tolist()) for e in other.train] == parts[0]


def test_sources_that_cannot_be_measured_are_refused(tokenizer):
    with pytest.raises(CatsError, match="are the same text"):
        read(tokenizer, False, heldout=TEXT)
    with pytest.raises(CatsError, match="holds 1 example, too few"):
        read(tokenizer, True, samples=1)


# ReLUfication


def test_a_relufied_checkpoint_is_the_relu_model_and_sparse(case, tmp_path):
    expected = case.dense_copy()
    for i in range(families.LAYERS):
        expected.get_submodule(case.family.mlp.format(i)).act_fn = torch.nn.ReLU()
        if case.family.fused:
            expected.get_submodule(case.family.mlp.format(i)).activation_fn = torch.nn.ReLU()
    expected = families.logits(expected, case.ids)
    model = relufy(case.dense_copy())
    torch.testing.assert_close(families.logits(model, case.ids), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path) if case.name not in ("gemma3", "qwen2.5-vl") else None
    again = again or type(model).from_pretrained(tmp_path)
    assert cats_llm.thresholds(again) == cats_llm.thresholds(model)
    assert all(mlp.activation_name == "relu" for mlp in cats_llm.sparse_mlps(again).values())
    torch.testing.assert_close(families.logits(again, case.ids), expected, rtol=1e-5, atol=1e-5)
    # and without the package: a ReLU model by its config alone
    cats_llm.densify(again)
    torch.testing.assert_close(families.logits(again, case.ids), expected, rtol=1e-5, atol=1e-5)


def test_a_model_whose_config_does_not_choose_the_activation_is_not_relufied(llama):
    class Stubborn(type(llama.dense)):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp.act_fn = torch.nn.SiLU()

    model = Stubborn(llama.dense.config)
    with pytest.raises(CatsError, match="no entry that makes its MLPs use ReLU"):
        relufy(model)
    assert cats_llm.thresholds(model) == {}


# measurements


def test_measurements_are_those_of_plain_pytorch(llama, tokenizer):
    model = llama.sparse()
    ids = llama.ids
    labels = ids.clone()
    labels[:, :20] = IGNORED
    examples = [{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)]
    examples.append({"input_ids": ids[0, :30], "labels": labels[0, :30]})
    found = evaluate(model, examples, 2)
    total, tokens = 0.0, 0
    for example in examples:
        logits = llama.reference_logits[0, :30] if len(example["labels"]) == 30 else None
        if logits is None:
            logits = families.logits(model, example["input_ids"][None])[0]
        wanted = example["labels"][1:]
        log_p = torch.log_softmax(logits[:-1].double(), -1)
        for i, label in enumerate(wanted.tolist()):
            if label != IGNORED:
                total -= float(log_p[i, label])
                tokens += 1
    assert found["tokens"] == tokens == 3 * 20 + 10
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found["sparsity"]["gate"] == pytest.approx(0.5, abs=0.1)
    assert "sparsity" not in evaluate(llama.dense, examples, 2)


# settings


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(CatsError, match="the method 'teal' is unknown; choose from cats, relu, dense"):
        TrainingConfig(method="teal")
    with pytest.raises(CatsError, match="only the method cats has thresholds"):
        TrainingConfig(method="relu", refresh_every=3)
    with pytest.raises(CatsError, match="a batch of 6 cannot be divided into micro-batches of 4 on 1 process;"):
        TrainingConfig(batch_size=6).accumulation(1)
    assert TrainingConfig(batch_size=16, micro_batch=2).accumulation(4) == 2


# the example's instructions


@pytest.mark.parametrize(
    ("task", "rows"),
    [
        ("cola", [{"sentence": "The cat sat.", "label": 1}, {"sentence": "Cat the sat.", "label": 0}]),
        ("sst2", [{"sentence": "a delight ", "label": 1}, {"sentence": "dull ", "label": 0}]),
        (
            "boolq",
            [
                {"passage": "Cats purr.", "question": "do cats purr", "answer": True},
                {"passage": "Cats purr.", "question": "do cats bark", "answer": False},
            ],
        ),
    ],
)
def test_yes_no_instructions(tmp_path, tokenizer, monkeypatch, task, rows):
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    script = Path(__file__).parents[2] / "examples" / "yes_no_instructions.py"
    monkeypatch.setattr("sys.argv", [str(script), task, "train", str(out), "--source", str(source)])
    runpy.run_path(str(script), run_name="__main__")
    assert is_instructions(str(out))
    found = read_instructions(str(out), tokenizer, 128).examples
    assert [answer(tokenizer, example) for example in found] == [" yes</s>", " no</s>"]
    for row, example in zip(rows, found, strict=True):
        text = tokenizer.decode(example["input_ids"])
        assert all(part.strip() in text for part in row.values() if isinstance(part, str))
    with pytest.raises(SystemExit, match=r"^error: .* exists already"):
        runpy.run_path(str(script), run_name="__main__")


def test_the_share_below_a_threshold_is_that_of_counting(llama):
    distribution = llama.profile.layers[0]
    for k in (0.0, 0.3, 0.5, 0.9):
        threshold, achieved = distribution.threshold(k)
        assert distribution.below(threshold) == pytest.approx(achieved, abs=1e-9)
    # between two edges, to within the group that it cuts
    between = float((distribution.edges[100] + distribution.edges[101]) / 2)
    exact = int(distribution.counts[:100].sum()) / distribution.total
    assert exact <= distribution.below(between) <= exact + int(distribution.counts[100]) / distribution.total
