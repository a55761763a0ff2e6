"""`cats finetune`: training through the thresholds, and a checkpoint of what comes out."""

import sys
from typing import Annotated

from cats_llm import distributed
from cats_llm.cli.output import Results, quiet_libraries, show
from cats_llm.cli.signature import Change
from cats_llm.outputs import command_line
from cats_llm.training.config import FinetuneConfig

_DTYPE = "Of the base model: bfloat16 or float32; auto: bfloat16 on a GPU that has it, else float32."


def command(config: Annotated[FinetuneConfig, Change(helps={"dtype": _DTYPE})], results: Results) -> None:
    """Recover quality: train a CATS, ReLUfied or dense model, and write the result as a checkpoint.

    The defaults are the paper's settings: LoRA adapters, learning the text. --parameters mlp trains all weights of the
    MLPs, --loss distillation learns from the dense model's predictions. For several GPUs, start it with `accelerate
    launch -m cats_llm.cli.main finetune ...` or torchrun; the batch is divided among them.

    Example: **cats finetune mistralai/Mistral-7B-v0.1 mistral-cats70 --sparsity 0.7 --data tiiuae/falcon-refinedweb
    --text-column content**
    """
    results.check()
    from cats_llm.training.finetune import finetune  # it imports much

    quiet_libraries()
    try:
        log = finetune(
            config, force=results.force, notify=show, command=command_line(), progress_bar=sys.stderr.isatty()
        )
        if distributed.rank() == 0:
            results.write(log)
    finally:
        distributed.leave()
