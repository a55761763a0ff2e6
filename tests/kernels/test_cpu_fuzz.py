"""Random shapes, strides, values and thresholds against the definition in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cats_llm.kernels.definition import ACTIVATIONS
from cats_llm.kernels.operators import gated_mlp
from kernel_cases import DTYPES, ISAS, make, use_isa
from marks import needs_kernels

pytestmark = [
    needs_kernels,
    pytest.mark.usefixtures("one_thread"),
]

bounded = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
drawn = st.fixed_dictionaries(
    {
        "n": st.integers(1, 18),
        "d": st.integers(1, 300),
        "f": st.integers(1, 200),
        "dtype": st.sampled_from(DTYPES),
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
        "quantile": st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.99, 1.0]),
        "per_neuron": st.booleans(),
        "bias": st.booleans(),
        "padding": st.integers(0, 9),
        "offset": st.integers(0, 9),
    }
)


@bounded
@given(case=drawn, isa=st.sampled_from(ISAS or ["none"]), seed=st.integers(0, 2**32 - 1))
def test_any_case_equals_the_definition(case, isa, seed):
    torch.manual_seed(seed)
    with use_isa(isa):
        make(**case).check()


special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, 65504.0, 3e38, float("inf"), -float("inf"), float("nan")])


@bounded
@given(
    values=st.lists(special, min_size=4, max_size=4),
    threshold=st.sampled_from([0.0, 0.5, float("inf")]),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    isa=st.sampled_from(ISAS or ["none"]),
)
def test_special_values_give_what_ieee_arithmetic_gives(values, threshold, dtype, activation, isa):
    x, gate, up, down = (torch.tensor([[v]]).to(dtype) for v in values)
    with use_isa(isa):
        y = gated_mlp(x, gate, up, down.t(), torch.tensor(threshold), activation)
    g = (x.float() * gate.float()).to(dtype).float()
    a = ACTIVATIONS[activation](g.double()).float()
    if (not a.isnan() and a.abs() < threshold) or a == 0:
        assert (y == 0).all()
    else:
        expected = (a * (x.float() * up.float()) * down.float()).to(dtype)
        torch.testing.assert_close(
            y, expected, equal_nan=True, rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-37
        )
