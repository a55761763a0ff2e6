"""The divergence of two models' predictions, and its gradient, against plain PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F

from cats_llm.model.predictions import kl_divergence

ROWS = 4  # fewer than there are positions, and no divisor of their number


@pytest.fixture
def drawn():
    """Logits of two models, (3, 7, 50), and which of the positions count."""
    generator = torch.Generator().manual_seed(0)
    logits, expected = (3 * torch.randn(3, 7, 50, generator=generator) for _ in range(2))
    return logits, expected, torch.rand(3, 7, generator=generator) < 0.6


def plain(logits, expected, positions):
    p, q = (F.log_softmax(x.double(), -1) for x in (logits, expected))
    return (q.exp() * (q - p)).sum(-1)[positions].sum()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_value_and_gradient_are_those_of_the_formula(drawn, dtype, tolerance):
    logits, expected, positions = drawn
    logits, expected = logits.to(dtype), expected.to(dtype)
    mine, theirs = (logits.clone().requires_grad_() for _ in range(2))
    found, right = kl_divergence(positions, mine, expected, ROWS), plain(theirs, expected, positions)
    assert found.item() == pytest.approx(right.item(), rel=1e-5)
    (found / 17).backward()
    (right / 17).backward()
    assert mine.grad.dtype == dtype
    assert not mine.grad[~positions].any(), "a position that does not count has a gradient"
    error = (mine.grad.double() - theirs.grad.double()).norm() / theirs.grad.double().norm()
    assert error < tolerance


def test_what_is_learned_from_gets_no_gradient(drawn):
    logits, expected, positions = drawn
    expected.requires_grad_()
    kl_divergence(positions, logits.requires_grad_(), expected, ROWS).backward()
    assert expected.grad is None
    with torch.no_grad():
        assert not kl_divergence(positions, logits, expected, ROWS).requires_grad
    assert kl_divergence(torch.zeros_like(positions), logits, expected).item() == 0
