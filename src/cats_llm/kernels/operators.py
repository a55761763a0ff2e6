"""The operators as PyTorch sees them, once for all devices: schemas and the shapes of results.

Each device's folder registers its implementation. Calling an operator whose device has none raises NotImplementedError.
"""

import torch
from torch import Tensor

library = torch.library.Library("cats_llm", "FRAGMENT")  # keeps the operators alive

library.define(
    "gated_mlp(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor threshold, str activation, "
    "Tensor? b_gate=None, Tensor? b_up=None, Tensor? b_down=None, float sparsity=0.0) -> Tensor"
)
library.define("linear(Tensor x, Tensor w, Tensor? bias=None) -> Tensor")
library.define("act_and_mul(Tensor gate, Tensor up, Tensor threshold, str activation) -> Tensor")
library.define("read_checksum(Tensor x) -> int")


def _like_first(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _linear_fake(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[0])


torch.library.register_fake("cats_llm::gated_mlp", _like_first, lib=library)
torch.library.register_fake("cats_llm::act_and_mul", _like_first, lib=library)
torch.library.register_fake("cats_llm::linear", _linear_fake, lib=library)


def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    threshold: Tensor,
    activation: str = "silu",
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    sparsity: float = 0.0,
) -> Tensor:
    """`definition.gated_mlp`, reading only the weights of neurons that are active for some token. No gradient.

    A neuron whose masked activation is zero is skipped, so an infinity in its other weights does not show.
    ``w_down`` must be stored neuron-major: ``w_down.t()`` has adjacent columns. ``sparsity``, the share of neurons that
    a token is expected to skip, chooses how the work is divided, never what is computed.
    """
    out: Tensor = torch.ops.cats_llm.gated_mlp(
        x, w_gate, w_up, w_down, threshold, activation, b_gate, b_up, b_down, sparsity
    )
    return out


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` for few tokens, accumulated in float32 and rounded once. No gradient."""
    out: Tensor = torch.ops.cats_llm.linear(x, w, bias)
    return out


def act_and_mul(gate: Tensor, up: Tensor, threshold: Tensor, activation: str) -> Tensor:
    """``CATS_t(act(gate)) * up`` in one pass over (..., f), rounded where PyTorch rounds. GPU only. No gradient."""
    out: Tensor = torch.ops.cats_llm.act_and_mul(gate, up, threshold, activation)
    return out


def read_checksum(x: Tensor) -> int:
    """A checksum of every byte of ``x``: its time is the machine's read bandwidth with torch's threads. CPU only."""
    checksum: int = torch.ops.cats_llm.read_checksum(x)
    return checksum
