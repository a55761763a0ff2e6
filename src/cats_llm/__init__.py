"""CATS: contextually-aware thresholding for sparsity.

Importing this registers the checkpoint format with transformers; `AutoModelForCausalLM.from_pretrained` then loads CATS
checkpoints as what they are.
"""

from cats_llm.calibration.calibrate import calibrate
from cats_llm.calibration.criteria.criterion import Criterion
from cats_llm.calibration.criteria.fit import fit
from cats_llm.calibration.criteria.search import find_config
from cats_llm.calibration.criteria.target import SparsityTarget
from cats_llm.calibration.profile import Profile
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.layer_tensors import LayerTensors
from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.errors import CatsError
from cats_llm.integrations.generation import graph_decode
from cats_llm.integrations.transformers import register
from cats_llm.loading import load_model as load
from cats_llm.loading import load_tokenizer
from cats_llm.model.decode_linear import use_decode_linears
from cats_llm.model.sparse_mlp import SparseMLP
from cats_llm.model.sparsify import as_dense, densify, sparse_mlps, sparsify, thresholds
from cats_llm.model.structure import find_gated_mlps
from cats_llm.versions import __version__ as __version__

__all__ = [
    "CatsConfig",
    "CatsError",
    "Criterion",
    "LayerTensors",
    "Profile",
    "SparseMLP",
    "SparsityTarget",
    "TokenPolicy",
    "as_dense",
    "calibrate",
    "densify",
    "find_config",
    "find_gated_mlps",
    "fit",
    "graph_decode",
    "load",
    "load_tokenizer",
    "sparse_mlps",
    "sparsify",
    "thresholds",
    "use_decode_linears",
]

register()
