"""Forward passes that run side by side."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cats_llm import CatsError
from cats_llm.calibration.criteria.sequential import run_layer_by_layer


class Stack(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return Stack()


def runs(stack, inputs, outputs):
    def call(i):
        return lambda: outputs.__setitem__(i, stack(inputs[i]))

    return [call(i) for i in range(len(inputs))]


def test_passes_compute_what_they_do_alone_and_are_seen_layer_by_layer(stack):
    inputs = [torch.randn(n, 4) for n in (3, 1, 5)]
    outputs, seen = {}, []
    run_layer_by_layer(list(stack.layers), runs(stack, inputs, outputs), lambda place, xs: seen.append((place, xs)))
    assert [place for place, _ in seen] == [0, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1], inputs, strict=True))
    with torch.no_grad():
        for i, x in enumerate(inputs):
            assert torch.equal(outputs[i], stack(x))
            assert not outputs[i].requires_grad


def test_all_passes_go_on_with_what_was_decided(stack):
    inputs = [torch.randn(2, 4) for _ in range(3)]
    outputs = {}

    @torch.no_grad()
    def decide(place, xs):
        stack.layers[place].bias.fill_(float(torch.cat(xs).mean()))

    run_layer_by_layer(list(stack.layers), runs(stack, inputs, outputs), decide)
    whole = torch.cat(inputs)
    with torch.no_grad():
        for layer in stack.layers:
            bias = whole.mean()
            whole = whole + whole @ layer.weight.T + bias
    torch.testing.assert_close(torch.cat([outputs[i] for i in range(3)]), whole)


@pytest.mark.parametrize("place", [0, 2])
def test_an_error_of_a_pass_comes_through_and_ends_all(stack, place):
    before = threading.active_count()
    inputs = [torch.randn(2, 4), torch.randn(2, 5), torch.randn(2, 4)]
    if place:
        inputs[1] = torch.randn(2, 4)
        stack.layers[place].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises((RuntimeError, ZeroDivisionError), match=r"shape|division"):
        run_layer_by_layer(list(stack.layers), runs(stack, inputs, {}), lambda *_: None)
    assert threading.active_count() == before
    assert not any(layer._forward_pre_hooks for layer in stack.layers)


def test_an_error_of_the_decision_ends_all(stack):
    before = threading.active_count()

    def decide(place, _):
        if place == 1:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_layer_by_layer(list(stack.layers), runs(stack, [torch.randn(2, 4)] * 4, {}), decide)
    assert threading.active_count() == before


def test_a_pass_that_skips_a_layer_is_noticed(stack):
    with pytest.raises(CatsError, match="does not call MLP 1 once"):
        run_layer_by_layer(
            [*list(stack.layers)[::2], stack.layers[1]], runs(stack, [torch.randn(2, 4)], {}), lambda *_: 0
        )


def test_each_pass_finds_its_own_state(stack):
    """What a pass leaves in a common place before a layer is there when it goes on."""
    mask = SimpleNamespace(sparse=None)
    found = []

    class Noting(nn.Module):
        def forward(self, x):
            found.append((mask.sparse, float(x[0, 0])))
            return x

    inner = Noting()

    def call(i):
        def run():
            mask.sparse = i
            inner(torch.full((1, 1), float(i)))

        return run

    run_layer_by_layer([inner], [call(i) for i in range(4)], lambda *_: None, mask)
    assert found == [(i, float(i)) for i in range(4)]


def test_nothing_to_run(stack):
    seen = []
    run_layer_by_layer(list(stack.layers), [], lambda place, xs: seen.append((place, xs)))
    assert seen == [(0, []), (1, []), (2, [])]
