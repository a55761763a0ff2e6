"""The operators as parts of PyTorch: shapes, dispatch, compilation, errors, and which calls are served."""

import pytest
import torch

from cats_llm.kernels import cpu
from cats_llm.kernels.backend import MAX_DECODE_TOKENS, Request
from cats_llm.kernels.backends import backend_of
from cats_llm.kernels.operators import gated_mlp, linear
from kernel_cases import make
from marks import needs_kernels

pytestmark = needs_kernels


def test_leading_dimensions_and_non_contiguous_x():
    case = make(6, 33, 20, torch.bfloat16)
    flat = case.run()
    case.x = case.x.view(2, 3, 33)
    assert torch.equal(case.run(), flat.view(2, 3, 33))
    case.x = case.x.transpose(0, 1)
    assert torch.equal(case.run(), flat.view(2, 3, 33).transpose(0, 1))
    case.x = flat[:0]
    assert case.run().shape == (0, 33)
    case.x = flat[0]
    assert case.run().shape == (33,)


def test_linear_shapes():
    w = torch.randn(5, 7)
    assert linear(torch.randn(2, 3, 7), w).shape == (2, 3, 5)
    assert linear(torch.randn(7), w).shape == (5,)
    assert linear(torch.randn(0, 7), w).shape == (0, 5)


def operands(**changes):
    case = make(2, 8, 6, torch.float32, bias=True)
    args = {**vars(case), **changes}
    return tuple(args.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(2, 9)}, "w_gate has the wrong shape"),
        ({"x": torch.randn(2, 8).double()}, "float32, bfloat16 or float16"),
        ({"w_up": torch.randn(6, 8).half()}, "w_up must have the dtype"),
        ({"w_gate": torch.randn(8, 6).t()}, "w_gate must have adjacent columns"),
        ({"w_down": torch.randn(8, 6)}, "neuron-major"),
        ({"w_down": torch.randn(6, 8)}, "w_down has the wrong shape"),
        ({"threshold": torch.zeros(5)}, "threshold must have the shape"),
        ({"threshold": torch.tensor(0.0).double()}, "threshold must be float32"),
        ({"activation": "tanh"}, "unknown activation tanh"),
        ({"b_up": torch.zeros(5)}, "b_up has the wrong shape"),
        ({"b_down": torch.zeros(8).half()}, "b_down must have the dtype"),
    ],
)
def test_what_it_cannot_do_it_says(changes, message, capfd):
    with pytest.raises(RuntimeError, match=message):
        gated_mlp(*operands(**changes))


def test_a_strided_bias_and_an_expanded_threshold():
    case = make(2, 8, 6, torch.float32, bias=True)
    plain = case.run()
    case.b_up = torch.stack([case.b_up, case.b_up], 1)[:, 0]
    case.threshold = case.threshold.expand(6)
    assert torch.equal(case.run(), plain)


def test_opcheck():
    torch.library.opcheck(torch.ops.cats_llm.gated_mlp.default, operands())
    torch.library.opcheck(torch.ops.cats_llm.gated_mlp.default, operands()[:6])
    torch.library.opcheck(torch.ops.cats_llm.linear.default, (torch.randn(2, 8), torch.randn(3, 8), torch.randn(3)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of Inductor itself
@torch.no_grad()
def test_compiles_as_one_operator(backend):
    case = make(2, 64, 50, torch.bfloat16)

    def layer(x, w_gate, w_up, w_down, threshold):
        h = gated_mlp(x * 2, w_gate, w_up, w_down, threshold, "gelu")
        return linear(h, w_gate) + 1

    args = case.x, case.w_gate, case.w_up, case.w_down, case.threshold
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*args), layer(*args))


def request(tokens=1, dtype=torch.bfloat16, activation="silu", device="cpu", row_major=False):
    w = torch.empty(6, 8, dtype=dtype, device=device)
    down = torch.empty(8, 6, dtype=dtype, device=device) if row_major else w.t()
    return Request(tokens, w, w, down, activation)


@torch.no_grad()
def test_the_backend_of_a_cpu_says_what_it_serves():
    backend = backend_of(torch.device("cpu"))
    assert backend is cpu.BACKEND
    assert backend.name == "cpu"
    for served in (request(), request(tokens=MAX_DECODE_TOKENS), request(dtype=torch.float32)):
        assert backend.supports(served)
    for other in (
        request(tokens=MAX_DECODE_TOKENS + 1),
        request(dtype=torch.float64),
        request(activation="tanh"),
        request(device="meta"),
        request(row_major=True),
    ):
        assert not backend.supports(other)
    with torch.enable_grad():
        assert not backend.supports(request())
