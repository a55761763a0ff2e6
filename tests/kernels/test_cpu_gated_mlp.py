"""Every instruction set that this CPU runs, against the definition in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from cats_llm.kernels import definition, operators
from cats_llm.kernels.definition import ACTIVATIONS
from kernel_cases import DTYPES, ISAS, Case, make, use_isa
from marks import needs_kernels

pytestmark = needs_kernels
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=ISAS, autouse=True)
def isa(request, one_thread):
    torch.manual_seed(0)
    with use_isa(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_shapes(dtype):
    for d, f in itertools.product([1, 3, 63, 65, 100], repeat=2):
        make(1, d, f, dtype).check()
        make(3, d, f, dtype, bias=True).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", range(1, 18))
def test_numbers_of_tokens(dtype, n):
    make(n, 72, 130, dtype).check()
    make(n, 129, 37, dtype, quantile=0.9, per_neuron=True).check()
    make(n, 2100, 13, dtype).check()  # more columns than tokens take at a time


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_neuron", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_activations_thresholds_and_biases(activation, dtype, per_neuron, bias):
    for n in (1, 5):
        make(n, 96, 200, dtype, activation, 0.7, per_neuron, bias).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("padding", "offset"), [(0, 1), (3, 0), (5, 7)])
def test_unaligned_views_with_gaps(dtype, padding, offset):
    for n in (1, 6):
        make(n, 70, 67, dtype, padding=padding, offset=offset).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_of_a_fused_matrix(dtype):
    case = make(2, 65, 33, dtype)
    case.w_gate, case.w_up = torch.cat([case.w_gate, case.w_up]).chunk(2)
    assert case.w_up.storage_offset()
    case.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_alive_and_all_dead(dtype):
    for n, bias in itertools.product([1, 4], [False, True]):
        case = make(n, 65, 50, dtype, bias=bias)
        case.threshold = torch.tensor(0.0)
        case.check()
        case.threshold = torch.tensor(INF)
        y = case.check()
        assert torch.equal(y, torch.zeros_like(y) if case.b_down is None else case.b_down.expand_as(y))


def test_skipped_weights_are_never_used():
    case = make(2, 64, 100, torch.float32, quantile=0.8)
    dead = (case.activations().abs() < case.threshold).all(0)
    assert dead.sum() > 30
    case.w_up[dead] = NAN
    case.w_down.t()[dead] = NAN
    assert case.run().isfinite().all()


def diagonal(gate: torch.Tensor, activation: str, threshold: float) -> torch.Tensor:
    """CATS_t(act(gate)) as the kernel computes it: every weight matrix is diagonal, so y is what the gate became."""
    eye = torch.eye(len(gate), dtype=gate.dtype)
    w_gate = torch.where(eye == 1, gate, 0.0)
    return operators.gated_mlp(
        torch.ones(len(gate), dtype=gate.dtype), w_gate, eye, eye.t(), torch.tensor(threshold), activation
    )


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_are_accurate_to_a_few_ulp(activation):
    for gate in (
        torch.linspace(-9, 9, 700),
        torch.randn(300) * 1e-3,
        torch.tensor([-90.0, -88.0, 0.0, 1e-30, 88, 3e38]),
    ):
        exact = ACTIVATIONS[activation](gate.double())
        if activation == "gelu":  # the formula of PyTorch cancels for large negative x even in float64
            exact = gate.double() * torch.special.erfc(gate.double() * -(0.5**0.5)) / 2
        elif activation == "gelu_tanh":
            z = 2 * (2 / torch.pi) ** 0.5 * (gate.double() + 0.044715 * gate.double() ** 3)
            exact = gate.double() * torch.sigmoid(z)
        error = (diagonal(gate, activation, 0.0).double() - exact).abs()
        ulp = 2.0**-23 * exact.abs().clamp(min=1e-6)  # no threshold is as small
        assert (error / ulp).max() < 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_threshold_is_compared_in_float32_before_rounding(dtype):
    # in bfloat16 both activations are the same number; a threshold between them must separate them
    gate = torch.tensor([-1.25, -1.28125], dtype=dtype)
    exact = F.silu(gate.float()).abs()
    y = diagonal(gate, "silu", float(exact.mean()))
    assert (y != 0).tolist() == (exact >= exact.mean()).tolist()


def test_the_threshold_itself_is_kept():
    t = torch.tensor(0.1)
    assert diagonal(t.view(1), "relu", t.item()).item() == t.item()
    assert diagonal(torch.nextafter(t, torch.tensor(0.0)).view(1), "relu", t.item()).item() == 0


def test_the_gate_is_rounded_to_the_dtype_of_the_weights():
    # 1 + 2^-8 + 2^-16 rounds up to 1 + 2^-7 in bfloat16, 1 + 2^-8 to the even neighbour 1
    x = torch.tensor([[1, 2**-8, 2**-16], [1, 2**-8, 0]], dtype=torch.bfloat16)
    w = torch.ones(1, 3, dtype=torch.bfloat16)
    t = torch.tensor(1 + 2**-8)
    y = operators.gated_mlp(x, w, w, w.t(), t, "relu")
    assert (y[0] != 0).all()
    assert (y[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_infinite_gates_behave_as_in_the_definition(dtype, activation):
    gate = torch.tensor([NAN, INF, -INF, 1.0], dtype=dtype)
    for t in (0.0, 0.5, INF):
        for g in gate:
            one = torch.ones(1, 1, dtype=dtype)
            args = (one[0], g.view(1, 1), one, one, torch.tensor(t), activation)
            torch.testing.assert_close(operators.gated_mlp(*args), definition.gated_mlp(*args), equal_nan=True)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("n", [2, 7])
def test_a_poisoned_token_shows_and_spares_the_others(value, n):
    case = make(n, 66, 40, torch.bfloat16)
    clean = case.run()
    case.x[1, 5] = value
    y = case.run()
    assert y[1].isnan().all()
    others = [i for i in range(n) if i != 1]
    torch.testing.assert_close(y[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype):
    n, d, f = 4, 320, 900
    x, gate, up, down = (torch.randn(s).mul(s[1] ** -0.5).to(dtype) for s in [(n, d), (f, d), (f, d), (f, d)])
    x = x * 4
    t = torch.tensor(0.0)
    exact = definition.gated_mlp(x.double(), gate.double(), up.double(), down.double().t(), t)
    ours, plain = (
        (run(x, gate, up, down.t(), t).double() - exact).norm() for run in (operators.gated_mlp, definition.gated_mlp)
    )
    assert ours <= 2 * plain


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype):
    for n, (d, out), bias in itertools.product([1, 2, 5, 17], [(1, 1), (65, 3), (100, 131)], [False, True]):
        x, w = torch.randn(n, d).to(dtype), torch.randn(out, d + 1).to(dtype)[:, 1:]
        b = torch.randn(out).to(dtype) if bias else None
        exact = F.linear(x.double(), w.double(), b.double() if bias else None)
        y = operators.linear(x, w, b)
        assert y.shape == (n, out)
        scale = x.double().abs() @ w.double().abs().t() + 1
        assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * scale).all()


def test_read_touches_every_byte():
    for size in (0, 1, 511, 512, 300_001):
        data = torch.zeros(size, dtype=torch.uint8)
        assert operators.read_checksum(data) == 0
        for i in {0, size // 2, size - 1} if size else ():
            data[i] = 1
            assert operators.read_checksum(data) != 0, i
            data[i] = 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_output_is_written_and_bits_do_not_depend_on_threads(threads, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        for n, dtype in itertools.product([1, 3, 16], DTYPES):
            case = random_case(n, 200, 1500, dtype)
            torch.set_num_threads(1)
            alone, alone_linear = case.run(), operators.linear(case.x, case.w_gate)
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
            for _ in range(3):
                assert torch.equal(case.run(), alone)
                assert torch.equal(operators.linear(case.x, case.w_gate), alone_linear)
    finally:
        torch.use_deterministic_algorithms(False)


def random_case(n: int, d: int, f: int, dtype: torch.dtype) -> Case:
    x, gate, up, down = (torch.randn(s).to(dtype) for s in [(n, d), (f, d), (f, d), (f, d)])
    return Case(x, gate, up, down.t(), torch.tensor(1.0))
