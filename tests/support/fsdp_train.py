"""The command cats, sharded by FSDP2 through accelerate over the processes of torchrun, on CPUs.

    FSDP_VERSION=2 ... torchrun --nproc-per-node 2 tests/support/fsdp_train.py finetune ...

accelerate takes FSDP on GPUs only. Here it is told to take it on CPUs too; all that follows is the way it goes on GPUs.
Rank 0 prints how many parameters were sharded when the adapters were saved.
"""

import sys

import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from cats_llm.cli.main import main
from cats_llm.training.trainer import CatsTrainer

_init, _save = AcceleratorState.__init__, CatsTrainer.save_model


def init(self, *args, fsdp_plugin=None, **kwargs):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if self.distributed_type is DistributedType.MULTI_CPU and fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def save(self, *args, **kwargs):
    if dist.get_rank() == 0:
        print("sharded parameters:", sum(hasattr(p, "full_tensor") for p in self.model.parameters()), flush=True)
    return _save(self, *args, **kwargs)


AcceleratorState.__init__, CatsTrainer.save_model = init, save
sys.exit(main())
