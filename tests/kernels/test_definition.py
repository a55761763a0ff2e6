"""The definition against float64 arithmetic written out neuron by neuron."""

import math

import pytest
import torch

from cats_llm.kernels import backends
from cats_llm.kernels.backend import Backend, Request
from cats_llm.kernels.backends import NO_KERNELS, backend_of
from cats_llm.kernels.definition import ACTIVATIONS, cats_activation, gate_activation, gated_mlp, keep_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

SCALAR = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
}


def test_the_registry_of_activations_and_this_test_agree():
    assert set(ACTIVATIONS) == set(SCALAR)


@pytest.mark.parametrize("name", sorted(SCALAR))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_neuron", [False, True])
def test_cats_activation_equals_scalar_arithmetic(name, dtype, per_neuron):
    torch.manual_seed(0)
    gate = (torch.randn(7, 13) * 2).to(dtype)
    threshold = torch.rand(13) if per_neuron else torch.tensor(0.3)
    out = cats_activation(gate, threshold, ACTIVATIONS[name])
    assert out.dtype == dtype
    for i in range(7):
        for j in range(13):
            a = SCALAR[name](gate[i, j].item())
            t = threshold[j].item() if per_neuron else threshold.item()
            if abs(abs(a) - t) > 1e-6:
                expected = a if abs(a) >= t else 0.0
                assert out[i, j].item() == pytest.approx(expected, rel=2 * torch.finfo(dtype).eps, abs=1e-7)


def test_the_threshold_itself_is_kept():
    t = torch.tensor(0.1)  # not representable in bfloat16
    assert cats_activation(t.view(1), t, ACTIVATIONS["relu"]).item() == t.item()
    below = torch.nextafter(t, torch.tensor(0.0))
    assert cats_activation(below.view(1), t, ACTIVATIONS["relu"]).item() == 0.0


def test_bfloat16_is_compared_before_rounding():
    # these two activations are the same bfloat16 number; a threshold between them must separate them
    gate = torch.tensor([-1.25, -1.28125], dtype=torch.bfloat16)
    exact = torch.nn.functional.silu(gate.float()).abs()
    assert exact[0] != exact[1]
    assert exact.bfloat16()[0] == exact.bfloat16()[1]
    out = cats_activation(gate, exact.mean(), ACTIVATIONS["silu"])
    assert (out != 0).sum() == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_propagate(dtype):
    gate = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0], dtype=dtype)
    for t in (0.0, 0.5, float("inf")):
        out = cats_activation(gate, torch.tensor(t), ACTIVATIONS["relu"])
        assert out[0].isnan(), f"a threshold of {t} hid a NaN"
        assert out[1] == float("inf")
        assert out[2] == 0
        assert out[3] == (1.0 if t <= 1 else 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(SCALAR))
def test_threshold_zero_is_the_activation(name, dtype):
    gate = torch.linspace(-8, 8, 333, dtype=dtype)
    a = ACTIVATIONS[name](gate.to(torch.promote_types(dtype, torch.float32))).to(dtype)
    assert torch.equal(cats_activation(gate, torch.tensor(0.0), ACTIVATIONS[name]), a)


def test_empty_input():
    w = torch.randn(5, 3)
    y = gated_mlp(torch.empty(0, 3), w, w, w.t(), torch.tensor(0.1))
    assert y.shape == (0, 3)


def test_the_gradient_is_exact_where_kept_and_zero_elsewhere():
    gate = torch.randn(64, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(0.2)
    cats_activation(gate, t, ACTIVATIONS["silu"]).sum().backward()
    s = torch.sigmoid(gate.detach())
    derivative = s * (1 + gate.detach() * (1 - s))
    keep = (gate.detach() * s).abs() >= 0.2
    torch.testing.assert_close(gate.grad, derivative * keep)
    assert 0 < keep.sum() < 64


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 16, 33)])
def test_gated_mlp_equals_loops_in_float64(shape, bias):
    n, d, f = shape
    torch.manual_seed(1)
    x, w_gate, w_up, w_down = (torch.randn(s, dtype=torch.float64) for s in [(n, d), (f, d), (f, d), (d, f)])
    b_gate, b_up, b_down = (torch.randn(s, dtype=torch.float64) if bias else None for s in [(f,), (f,), (d,)])
    t = torch.tensor(0.4)
    y = torch.zeros(n, d, dtype=torch.float64)
    for i in range(n):
        for j in range(f):
            a = SCALAR["silu"]((x[i] @ w_gate[j] + (b_gate[j] if bias else 0)).item())
            if abs(a) >= 0.4:
                y[i] += a * (x[i] @ w_up[j] + (b_up[j] if bias else 0)) * w_down[:, j]
        if bias:
            y[i] += b_down
    torch.testing.assert_close(gated_mlp(x, w_gate, w_up, w_down, t, "silu", b_gate, b_up, b_down), y)


def test_keep_mask_and_gate_activation_compare_in_float32():
    gate = torch.tensor([0.1], dtype=torch.float64)
    assert gate_activation(gate, ACTIVATIONS["relu"]).dtype == torch.float64
    # 0.1 in float64 rounds to the float32 threshold 0.1, so it is kept
    assert keep_mask(gate, torch.tensor(0.1)).item()


def test_a_device_has_its_own_backend_or_one_that_supports_nothing(monkeypatch):
    class Fast(Backend):
        name, built = "fast", True

        def supports(self, request):
            return request.tokens == 1

    w = torch.randn(4, 3)
    request = Request(1, w, w, w.t(), "silu")
    device = torch.device("meta")  # where no kernels will ever be
    assert backend_of(device) is NO_KERNELS
    assert not NO_KERNELS.supports(request)
    assert not NO_KERNELS.supports_linear(w[:1], w)
    assert not NO_KERNELS.supports_act_and_mul(w, w)
    assert NO_KERNELS.neuron_major(w) is w
    monkeypatch.setitem(backends._BACKENDS, "meta", Fast())
    assert backends.names().count("fast") == 1
    assert backend_of(device).supports(request)
    assert not backend_of(device).supports(request._replace(tokens=2))
    assert torch.equal(backend_of(device).neuron_major(w), w)
    assert backend_of(device).neuron_major(w).t().is_contiguous()
    assert backends.names()[-1] == "plain"
