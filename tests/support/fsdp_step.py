"""One step of a CATS model with adapters, sharded by FSDP over the processes of torchrun, on CPUs.

    torchrun --nproc-per-node 2 tests/support/fsdp_step.py MODEL THRESHOLD

Rank 0 prints as JSON the losses of the sharded and of the whole model, and how far their gradients differ.
"""

import copy
import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import cats_llm
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.training.adapters import add_adapters
from cats_llm.training.config import TrainingConfig
from cats_llm.training.methods import apply_method


def step(model, ids):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model):
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def main():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    layers = [mlp.layer for mlp in cats_llm.find_gated_mlps(model)]
    apply_method(model, "cats", CatsConfig(thresholds=dict.fromkeys(layers, float(sys.argv[2])), sparsity=0.5))
    model = add_adapters(model, TrainingConfig(rank=4, dropout=0.0)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    single = copy.deepcopy(model)
    ids = torch.randint(3, 100, (2, 20))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = step(model, ids), step(single, ids)
    found, expected = gradients(model), gradients(single)
    assert found.keys() == expected.keys()
    error = max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in found)
    sharded = sum(hasattr(p, "full_tensor") for p in model.parameters())
    if dist.get_rank() == 0:
        print(json.dumps({"losses": losses, "error": error, "gradients": len(found), "sharded": sharded}))
    dist.destroy_process_group()


main()
