"""What people do with models: compile, generate, train, adapt, offload, distribute. Sparse models must do it all."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM, GenerationConfig, Trainer, TrainingArguments

import cats_llm
import families
from cats_llm import SparseMLP
from families import logits

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("one_thread")

PROJECTIONS = ["q_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "gate_up_proj", "down_proj"]


def reference_of(dense, case):
    return families.Reference(dense, case.family, case.config.thresholds)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# compile and generate


# inductor also compiles C++, which is slow; aot_eager captures the same graph


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    ("name", "backend"), [("llama", "inductor"), ("phi3", "aot_eager"), ("gemma2", "aot_eager"), ("qwen3", "aot_eager")]
)
def test_compile_fullgraph_equals_eager(cases, name, tokens, backend):
    torch._dynamo.reset()
    case = cases(name)
    model = case.sparse()
    ids = case.ids[:1, :tokens]
    expected = logits(model, ids, use_cache=False)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    torch.testing.assert_close(logits(compiled, ids, use_cache=False), expected, rtol=1e-4, atol=1e-4)
    # other thresholds need no new graph
    cats_llm.sparsify(model, case.profile.config(0.9))
    other = logits(model, ids, use_cache=False)
    assert (other - expected).abs().max() > 0.1
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(logits(compiled, ids, use_cache=False), other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_gradients_equal_eager(llama):
    torch._dynamo.reset()
    model = llama.sparse()
    model(input_ids=llama.ids, labels=llama.ids, use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    compiled(input_ids=llama.ids, labels=llama.ids, use_cache=False).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def generate(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids), **kwargs)


def test_generate_equals_greedy_decoding_of_the_reference(case):
    ids = case.ids[:2, :8]
    expected = ids
    config = case.profile.config(0.9)
    with families.Reference(case.dense, case.family, config.thresholds) as dense:
        for _ in range(8):
            expected = torch.cat([expected, logits(dense, expected, use_cache=False)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(cats_llm.sparsify(case.sparse(), config), ids), expected)
    # a copy: some families keep positions on the model
    dense = generate(case.dense_copy(), ids)
    assert not torch.equal(dense, expected), "dense and sparse agree: the test proves nothing"


def test_generate_with_a_static_cache(case):
    ids = case.ids[:1, :8]
    model = case.sparse()
    assert torch.equal(generate(model, ids, cache_implementation="static"), generate(model, ids))


@pytest.mark.slow
def test_generate_with_a_static_cache_and_a_compiled_forward(llama):
    torch._dynamo.reset()
    ids = llama.ids[:1, :8]
    model = llama.sparse()
    expected = generate(model, ids)
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.equal(generate(model, ids, cache_implementation="static"), expected)


@pytest.mark.skipif(not hasattr(transformers, "ContinuousBatchingConfig"), reason="this transformers has another API")
def test_continuous_batching_equals_generate(split_or_fused):
    model = split_or_fused.sparse()
    prompts = [split_or_fused.ids[row, : 5 + row].tolist() for row in range(3)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = transformers.ContinuousBatchingConfig(
        num_blocks=16, max_batch_tokens=32
    )  # else it takes most of the memory
    results = model.generate_batch(prompts, config, small)
    found = [result.generated_tokens for result in sorted(results.values(), key=lambda r: len(r.prompt_ids))]
    for prompt, tokens in zip(prompts, found, strict=True):
        whole = model.generate(
            torch.tensor([prompt]), generation_config=config, attention_mask=torch.ones(1, len(prompt))
        )
        assert tokens == whole[0, len(prompt) :].tolist()


# training


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_gradients_of_the_reference(split_or_fused, reentrant):
    case = split_or_fused
    dense, sparse = case.dense_copy().double(), case.sparse().double().train()
    with reference_of(dense, case):
        dense(input_ids=case.ids, labels=case.ids, use_cache=False).loss.backward()
    sparse.gradient_checkpointing_enable({"use_reentrant": reentrant})
    sparse.enable_input_require_grads()
    sparse(input_ids=case.ids, labels=case.ids, use_cache=False).loss.backward()
    expected = gradients(dense)
    found = gradients(sparse)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


class Rows(torch.utils.data.Dataset):
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def train_one_step(model, ids, folder, **kwargs):
    arguments = TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=len(ids), learning_rate=1e-2, optim="sgd",
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
        max_grad_norm=0, dataloader_pin_memory=False, **kwargs,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Rows(ids)).train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_takes_the_step_of_the_reference(llama, tmp_path, checkpointing):
    # full fine-tuning of a model that was loaded from a CATS checkpoint
    model = AutoModelForCausalLM.from_pretrained(llama.sparse_folder)
    train_one_step(model, llama.ids, tmp_path, gradient_checkpointing=checkpointing)
    dense = llama.dense_copy()
    with reference_of(dense, llama):
        train_one_step(dense, llama.ids, tmp_path)
    before, expected = llama.dense.state_dict(), dense.state_dict()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, expected[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(parameter, before[name]), name
    assert cats_llm.thresholds(model) == llama.config.thresholds
    model.save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(logits(again, llama.ids), logits(model.eval(), llama.ids))


# adapters


def lora(case, **kwargs):
    return peft.LoraConfig(
        r=4, lora_alpha=32, target_modules=FUSED if case.family.fused else PROJECTIONS, task_type="CAUSAL_LM", **kwargs
    )


def randomise(model):
    """Adapters that change the output: LoRA begins with B = 0."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    return model


def merged_reference(adapted, case, inputs):
    """What a dense model with the adapters in its weights answers when the reference thresholds it."""
    dense = copy.deepcopy(adapted).merge_and_unload()
    cats_llm.densify(dense)
    with reference_of(dense, case):
        return logits(dense, inputs)


@pytest.fixture(params=["sparsify first", "adapt first"])
def adapted(request, split_or_fused):
    if request.param == "sparsify first":
        model = peft.get_peft_model(split_or_fused.sparse(), lora(split_or_fused))
    else:
        model = peft.get_peft_model(split_or_fused.dense_copy(), lora(split_or_fused))
        assert cats_llm.sparsify(model, split_or_fused.config) is model
    assert cats_llm.thresholds(model) == split_or_fused.config.thresholds
    return randomise(model.eval())


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_adapters_count_in_decode_and_prefill(adapted, split_or_fused, tokens):
    inputs = split_or_fused.ids[:1, :tokens]
    found = logits(adapted, inputs)
    torch.testing.assert_close(found, merged_reference(adapted, split_or_fused, inputs), rtol=1e-3, atol=1e-3)
    with adapted.disable_adapter():
        assert (logits(adapted, inputs) - found).abs().max() > 0.1


def test_adapters_train_and_only_they(adapted, split_or_fused):
    case = split_or_fused
    adapted.train()
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1)
    adapted(input_ids=case.ids, labels=case.ids).loss.backward()
    optimizer.step()
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def test_adapters_are_saved_and_loaded(adapted, split_or_fused, tmp_path):
    adapted.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    expected = logits(adapted, split_or_fused.ids)
    for base in (AutoModelForCausalLM.from_pretrained(split_or_fused.sparse_folder), split_or_fused.sparse()):
        again = peft.PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(logits(again, split_or_fused.ids), expected, rtol=1e-5, atol=1e-5)


def test_adapters_merge_into_a_checkpoint(adapted, split_or_fused, tmp_path):
    inputs = split_or_fused.ids
    expected = merged_reference(adapted, split_or_fused, inputs)
    model = adapted.merge_and_unload()
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules())
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert cats_llm.thresholds(again) == split_or_fused.config.thresholds
    torch.testing.assert_close(logits(again, inputs), expected, rtol=1e-5, atol=1e-5)


def test_densify_keeps_adapters(adapted, split_or_fused):
    dense = copy.deepcopy(adapted).merge_and_unload()
    expected = logits(cats_llm.densify(dense), split_or_fused.ids)
    assert cats_llm.densify(adapted) is adapted
    assert not any(isinstance(module, SparseMLP) for module in adapted.modules())
    torch.testing.assert_close(logits(adapted, split_or_fused.ids), expected, rtol=1e-3, atol=1e-3)
    assert any("lora_" in name for name, _ in adapted.named_parameters())
    # and away again: nothing was written into the weights
    plain = adapted.unload()
    assert torch.equal(logits(plain, split_or_fused.ids), split_or_fused.dense_logits)


def test_an_adapted_model_is_calibrated_with_its_adapters(adapted, split_or_fused):
    expected = cats_llm.calibrate(cats_llm.densify(copy.deepcopy(adapted).merge_and_unload()), [split_or_fused.ids])
    found = cats_llm.calibrate(adapted, [split_or_fused.ids]).config(0.5).thresholds
    assert found == pytest.approx(expected.config(0.5).thresholds, rel=1e-3)
    assert found != pytest.approx(split_or_fused.config.thresholds, rel=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_of_a_loaded_model_train_under_gradient_checkpointing(llama, tmp_path, reentrant):
    base = AutoModelForCausalLM.from_pretrained(llama.sparse_folder)
    plain = randomise(peft.get_peft_model(copy.deepcopy(base), lora(llama)))
    plain(input_ids=llama.ids, labels=llama.ids).loss.backward()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = randomise(peft.get_peft_model(base, lora(llama)))
    model.train()(input_ids=llama.ids, labels=llama.ids, use_cache=False).loss.backward()
    expected = gradients(plain)
    assert gradients(model).keys() == expected.keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_trainer_trains_adapters_of_a_loaded_model(llama, tmp_path):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama.sparse_folder), lora(llama))
    train_one_step(model, llama.ids, tmp_path)
    assert any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


# offloading


def map_of(target, split):
    """Layers, or only their MLPs, at the target; the rest on the CPU."""
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for layer in range(families.LAYERS):
        if not split:
            device_map[f"model.layers.{layer}"] = target
            continue
        for part in ("self_attn", "input_layernorm", "post_attention_layernorm"):
            device_map[f"model.layers.{layer}.{part}"] = "cpu"
        device_map[f"model.layers.{layer}.mlp"] = target
    return device_map


OFFLOADS = {
    "cpu_offload": lambda model, folder: cpu_offload(model, torch.device("cpu")),
    "disk_offload": lambda model, folder: disk_offload(model, str(folder), torch.device("cpu")),
    "layers on disk": lambda model, folder: dispatch_model(
        model, map_of("disk", False), main_device="cpu", offload_dir=str(folder)
    ),
    "MLPs on disk": lambda model, folder: dispatch_model(
        model, map_of("disk", True), main_device="cpu", offload_dir=str(folder)
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("order", ["sparsify first", "offload first"])
def test_offloading(llama, tmp_path, offload, order):
    if order == "sparsify first":
        model = OFFLOADS[offload](llama.sparse(), tmp_path)
    else:
        model = OFFLOADS[offload](llama.dense_copy(), tmp_path)
        assert cats_llm.calibrate(model, [llama.ids]).config(0.5).thresholds == llama.config.thresholds
        cats_llm.sparsify(model, llama.config)
    assert cats_llm.find_gated_mlps(model)[0].down_linear.weight.is_meta
    assert cats_llm.thresholds(model) == llama.config.thresholds
    torch.testing.assert_close(logits(model, llama.ids), llama.reference_logits, rtol=1e-5, atol=1e-5)
    token = llama.ids[:1, :1]
    torch.testing.assert_close(logits(model, token), logits(llama.sparse(), token), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(cats_llm.densify(model), llama.ids), llama.dense_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", [False, True], ids=["layers", "MLPs"])
@pytest.mark.parametrize("buffers", [False, True])
def test_loading_with_a_part_on_disk(llama, tmp_path, split, buffers):
    model = AutoModelForCausalLM.from_pretrained(
        llama.sparse_folder, device_map=map_of("disk", split), offload_folder=tmp_path, offload_buffers=buffers
    )
    assert cats_llm.find_gated_mlps(model)[0].down_linear.weight.is_meta
    assert cats_llm.thresholds(model) == llama.config.thresholds
    for _ in range(2):
        torch.testing.assert_close(logits(model, llama.ids), llama.reference_logits, rtol=1e-5, atol=1e-5)
    assert cats_llm.thresholds(model) == llama.config.thresholds
    on_the_fly = AutoModelForCausalLM.from_pretrained(
        llama.dense_folder,
        quantization_config=llama.config,
        device_map=map_of("disk", split),
        offload_folder=tmp_path,
    )
    torch.testing.assert_close(logits(on_the_fly, llama.ids), llama.reference_logits, rtol=1e-5, atol=1e-5)


def test_saving_an_offloaded_model(llama, tmp_path):
    model = OFFLOADS["layers on disk"](llama.sparse(), tmp_path / "offload")
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(again, llama.ids), llama.reference_logits, rtol=1e-5, atol=1e-5)


# several processes

DISTRIBUTED = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
import cats_llm, families
from transformers import AutoModelForCausalLM

folders, out = json.loads(sys.argv[1]), Path(sys.argv[2])
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
torch.set_num_threads(1)
ids = families.ids(6, 20)
facts, tensors = {}, {}

# each process has its share of the data
model = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float64)
share = [ids[:1], ids[1:2], ids[2:3], ids[3:4]] if rank == 0 else [ids[4:]]
cats_llm.calibrate(model, iter(share)).save(out / f"profile{rank}.safetensors")
# one has none, one has a damaged model
facts["tokens"] = cats_llm.calibrate(model, [ids] if rank == 1 else []).record["tokens"]
if rank == 1:
    model.model.layers[0].mlp.gate_proj.weight.data[0, 0] = float("nan")
try:
    cats_llm.calibrate(model, [ids])
except cats_llm.CatsError as error:
    facts["error"] = str(error)

# each process has its share of the weights
for name, folder in folders.items():
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    facts[name] = {"loaded": cats_llm.thresholds(model)}
    tensors[name] = [families.logits(model, ids), families.logits(model, ids[:1, :1])]
    cats_llm.densify(model)
    tensors[name].append(families.logits(model, ids))
    config = cats_llm.calibrate(model, [ids]).config(0.5)
    facts[name]["calibrated"] = config.thresholds
    facts[name]["tokens"] = config.calibration["tokens"]
    facts[name]["processes"] = model.tp_size
    cats_llm.sparsify(model, config)
    tensors[name].append(families.logits(model, ids))
torch.save(tensors, out / f"logits{rank}.pt")
(out / f"facts{rank}.json").write_text(json.dumps(facts))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(cases, tmp_path_factory):
    """The folder in which two processes of one group left what they found."""
    out = tmp_path_factory.mktemp("distributed")
    (out / "script.py").write_text(DISTRIBUTED)
    folders = json.dumps({name: str(cases(name).sparse_folder) for name in ("llama", "phi3")})
    path = os.pathsep.join(sys.path)
    environment = os.environ | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": "2",
    }
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # else it asks for the address of the host's name
    running = [
        subprocess.Popen(
            [sys.executable, out / "script.py", folders, out],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_calibrate_as_one(llama, two_processes, rank):
    alone = cats_llm.calibrate(llama.dense_copy().double(), [families.ids(6, 20)])
    found = cats_llm.Profile.load(two_processes / f"profile{rank}.safetensors")
    for layer, distribution in alone.layers.items():
        assert torch.equal(found.layers[layer].counts, distribution.counts)
        assert torch.equal(found.layers[layer].edges, distribution.edges)
    assert found.record["tokens"] == alone.record["tokens"] == 120
    assert found.record["sequences"] == 6
    assert found.config(0.7).thresholds == alone.config(0.7).thresholds
    facts = json.loads((two_processes / f"facts{rank}.json").read_text())
    assert facts["tokens"] == 120
    # damage seen by one process is an error in all: nobody is left waiting
    assert "layer 0 are NaN or infinite" in facts["error"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_tensor_parallel(split_or_fused, two_processes, rank):
    case, ids = split_or_fused, families.ids(6, 20)
    facts = json.loads((two_processes / f"facts{rank}.json").read_text())[case.name]
    assert facts["loaded"] == {str(layer): t for layer, t in case.config.thresholds.items()}
    # both processes saw the same tokens; transformers 5.16 does not tell that they share a model
    assert facts["tokens"] == ids.numel() * (1 if facts["processes"] else 2)
    config = cats_llm.calibrate(case.dense, [ids]).config(0.5)
    calibrated = {int(layer): t for layer, t in facts["calibrated"].items()}
    assert calibrated == pytest.approx(config.thresholds, rel=1e-3)
    with reference_of(case.dense, case) as dense:
        expected = [logits(dense, ids), logits(dense, ids[:1, :1])]
    expected.append(logits(case.dense, ids))
    with families.Reference(case.dense, case.family, calibrated) as dense:
        expected.append(logits(dense, ids))
    found = torch.load(two_processes / f"logits{rank}.pt")[case.name]
    for answer, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-4)
