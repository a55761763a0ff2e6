"""The GPU kernels against the definition in float64: on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch

from cats_llm.kernels.definition import ACTIVATIONS, cats_activation
from cats_llm.kernels.gpu import dispatch
from cats_llm.kernels.gpu.config import GemvConfig, SmallBatchConfig, Tile
from kernel_cases import DTYPES, Case, affine, grid, make, matrix

# NumPy, under Triton's interpreter, warns of what a GPU computes silently
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cpu" if dispatch.INTERPRETED else "cuda"
SMALL_ONE = GemvConfig(Tile(16, 32, 4, 1), Tile(2, 0, 4, 1, programs=2))
SMALL_FEW = SmallBatchConfig(Tile(16, 32, 4, 2), Tile(16, 32, 4, 2, programs=2), Tile(16, 32, 4, 2, programs=2))


def on_device(tensor):
    """The tensor with its strides and its alignment, on the device."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    offset = tensor.storage_offset()
    size = offset + 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.full((max(size, 1),), float("nan"), dtype=tensor.dtype, device=DEVICE)
    return memory.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


def unit(dtype: torch.dtype) -> float:
    """The relative error of rounding to a type; Triton's interpreter truncates to bfloat16."""
    return torch.finfo(dtype).eps / (1 if dispatch.INTERPRETED and dtype == torch.bfloat16 else 2)


def run(case: Case, config=None):
    if config is None:
        config = SMALL_ONE if case.x[..., 0].numel() == 1 else SMALL_FEW
    arguments = {name: on_device(value) for name, value in case.arguments().items()}
    return dispatch.gated_mlp(**arguments, config=config).cpu()


def check(case: Case, config=None) -> torch.Tensor:
    y, (expected, scale) = run(case, config), case.expected()
    assert y.shape == case.x.shape
    assert y.dtype == case.x.dtype
    # gates, activations and products are rounded to the model's dtype, as PyTorch does
    u = unit(y.dtype)
    bound = u * expected.abs() + (4 * u + 2e-6) * scale + torch.finfo(y.dtype).tiny
    wrong = (y.double() - expected).abs() > bound
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} wrong"
    return y


def case(*args, **kwargs) -> Case:
    # no activation is so near the threshold that rounding could move it across
    return make(*args, clear=0.03, **kwargs)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_it_is_the_definition(tokens, dtype, activation):
    check(case(tokens, 40, 37, dtype, activation))


@pytest.mark.parametrize("quantile", [0.0, 0.9, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_any_sparsity_from_none_to_all(tokens, bias, quantile):
    c = case(tokens, 48, 64, torch.float32, quantile=quantile, bias=bias)
    y = check(c)
    if quantile > 1:
        assert torch.equal(y, (c.b_down if bias else torch.zeros(48)).expand(tokens, 48))


@pytest.mark.parametrize(("d", "f"), [(1, 1), (1, 7), (7, 1), (33, 65), (64, 130), (129, 31)])
@pytest.mark.parametrize("tokens", [1, 2])
def test_odd_shapes(tokens, d, f):
    check(case(tokens, d, f, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 4])
def test_unaligned_views_of_larger_memory(tokens, dtype):
    check(case(tokens, 24, 40, dtype, padding=3, offset=1, bias=True))


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_threshold_for_every_neuron(tokens):
    check(case(tokens, 32, 50, torch.float32, per_neuron=True))


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("kept", ["first block", "last block", "one", "every 17th", "all but one", "second half"])
def test_active_neurons_in_any_pattern(kept, tokens):
    c = case(tokens, 32, 150, torch.float32, quantile=0.0)
    j = torch.arange(150)
    alive = {
        "first block": j < 16,
        "last block": j >= 144,
        "one": j == 77,
        "every 17th": j % 17 == 0,
        "all but one": j != 3,
        "second half": j >= 75,
    }[kept]
    c.threshold = torch.where(alive, 0.0, 1e30)
    check(c)


@pytest.mark.parametrize("tokens", [1, 3])
def test_skipped_neurons_are_not_read(tokens):
    c = case(tokens, 40, 60, torch.float32)
    expected, _ = c.expected()
    skipped = (c.activations().abs() < c.threshold.double()).all(0)
    assert 0 < skipped.sum() < 60
    c.w_up[skipped] = float("nan")
    c.w_down[:, skipped] = float("inf")
    torch.testing.assert_close(run(c).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3])
def test_nan_propagates(tokens):
    c = case(tokens, 40, 60, torch.float32)
    c.w_gate[7, 3] = float("nan")
    c.x[..., 3] = 1
    assert run(c).isnan().all()
    c = case(tokens, 40, 60, torch.float32)
    c.x[0, 0] = float("nan")
    y = run(c)
    assert y[0].isnan().all()
    assert tokens == 1 or y[1:].isfinite().all()


def test_a_token_that_skips_a_neuron_does_not_see_its_infinities():
    c = case(2, 32, 40, torch.float32)
    a = c.activations()
    mixed = ((a[0].abs() >= c.threshold.double()) & (a[1].abs() < c.threshold.double())).nonzero()[0, 0]
    c.w_up[mixed] = float("inf")
    y = run(c)
    assert not y[0].isfinite().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_threshold_itself_is_kept_and_the_next_number_is_not(tokens):
    c = case(tokens, 32, 40, torch.float32, activation="relu")
    value = c.activations().max().float()
    for threshold, kept in ((value, True), (torch.nextafter(value, torch.tensor(9e9)), False)):
        c.threshold = threshold
        assert bool(check(c).any()) == kept


def test_no_tokens_and_many():
    c = case(0, 16, 20, torch.float32)
    c.threshold = torch.tensor(0.1)
    assert run(c).shape == (0, 16)
    c = case(36, 16, 20, torch.float32)
    check(c)
    c.x = c.x.view(3, 12, 16)
    check(c)


@pytest.mark.parametrize(
    "config",
    [
        GemvConfig(Tile(16, 128, 4, 2), Tile(1, 0, 2, 1, programs=1)),
        GemvConfig(Tile(32, 16, 4, 1), Tile(4, 0, 4, 3, programs=300)),
        SmallBatchConfig(Tile(32, 16, 2, 1), Tile(32, 64, 4, 3, programs=300), Tile(64, 16, 4, 2, programs=300)),
    ],
)
def test_every_config_gives_the_same(config):
    check(case(1, 100, 70, torch.float32, bias=True), config)


def test_the_same_bits_again():
    c = case(1, 64, 100, torch.float32)
    first = run(c)
    assert all(torch.equal(run(c), first) for _ in range(3))


def test_wrong_arguments_say_what_is_wrong():
    c = case(1, 16, 20, torch.float32)
    good = {name: on_device(value) for name, value in c.arguments().items()}
    wrong = {
        "x must be": {"x": good["x"].double()},
        "w_gate has the wrong shape": {"w_gate": good["w_gate"][:, :8]},
        "w_up must have the dtype": {"w_up": good["w_up"].half()},
        "neuron-major": {"w_down": good["w_down"].contiguous()},
        "threshold must be float32": {"threshold": good["threshold"].double()},
        r"shape \(\) or \(f,\)": {"threshold": torch.zeros(3, device=DEVICE)},
        "unknown activation": {"activation": "tanh"},
        "b_down must be": {"b_down": torch.zeros(3, device=DEVICE)},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            dispatch.gated_mlp(**(good | change))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(tokens, dtype, bias):
    x, w = grid(tokens, 50, dtype=dtype, denominator=2), matrix(37, 50, dtype, padding=2, offset=1)
    b = grid(37, dtype=dtype) if bias else None
    y = dispatch.linear(on_device(x), on_device(w), on_device(b)).cpu()
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), affine(x, w, b), rtol=unit(dtype), atol=1e-6)


def test_linear_keeps_leading_dimensions_and_refuses_what_does_not_fit():
    w = torch.randn(5, 7, device=DEVICE)
    assert dispatch.linear(torch.randn(2, 3, 7, device=DEVICE), w).shape == (2, 3, 5)
    assert dispatch.linear(torch.randn(7, device=DEVICE), w).shape == (5,)
    assert dispatch.linear(torch.randn(0, 7, device=DEVICE), w).shape == (0, 5)
    with pytest.raises(ValueError, match="wrong shape"):
        dispatch.linear(torch.randn(1, 8, device=DEVICE), w)
    with pytest.raises(ValueError, match="bias must be"):
        dispatch.linear(torch.randn(1, 7, device=DEVICE), w, torch.zeros(4, device=DEVICE))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_neuron", [False, True])
def test_product_is_the_definition(dtype, activation, per_neuron):
    both = torch.randn(2, 9, 2 * 70).to(dtype)
    gate, up = both.chunk(2, dim=-1)  # strided, as a fused projection gives it
    threshold = torch.rand(70) if per_neuron else torch.tensor(0.3)
    h = dispatch.act_and_mul(gate.to(DEVICE), up.to(DEVICE), threshold.to(DEVICE), activation).cpu()
    expected = cats_activation(gate, threshold, ACTIVATIONS[activation]) * up
    assert h.dtype == dtype
    torch.testing.assert_close(h, expected, rtol=4 * unit(dtype) + 1e-6, atol=2e-7)


def test_product_of_nothing_and_with_nan():
    t = torch.tensor(0.3, device=DEVICE)
    nothing = torch.empty(0, 8, device=DEVICE)
    assert dispatch.act_and_mul(nothing, nothing, t, "silu").shape == (0, 8)
    gate = torch.tensor([[float("nan"), 0.0, -1.0]], device=DEVICE)
    h = dispatch.act_and_mul(gate, torch.ones(1, 3, device=DEVICE), t, "relu")
    assert h.isnan().tolist() == [[True, False, False]]
