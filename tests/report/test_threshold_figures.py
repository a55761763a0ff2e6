"""Histograms and thresholds: what was calibrated is what is drawn."""

import itertools
import math

import numpy as np
import pytest

from cats_llm.report import ReportInputs, render_page, style
from cats_llm.report.svg import inline_svg
from cats_llm.report.threshold_figures import axis_range, density, histograms, shown_layers, thresholds_by_layer
from pages import check_page, parse
from profiles import distribution, of_groups, profile

DISTRIBUTIONS = {layer: distribution(layer) for layer in range(4)}
THRESHOLDS = {f"cats k={k}": {layer: 0.05 + 0.1 * k + 0.01 * layer for layer in range(4)} for k in (0.5, 0.7, 0.9)}


@pytest.mark.parametrize("zeros", [0, 7000])
@pytest.mark.parametrize("scale", [1e-6, 0.1, 1e3])
def test_density_integrates_to_the_share_inside_the_axis(scale, zeros):
    made = distribution(scale=scale, zeros=zeros)
    low, high = axis_range([made])
    bins = np.geomspace(low, high, 81)
    area = (density(made, bins) * np.diff(np.log10(bins))).sum()
    # every activation counted one by one at its group's edge; the two groups that the axis cuts may differ
    edges, counts = made.edges.numpy(), made.counts.numpy()
    values = np.repeat(edges, counts)
    inside = ((values >= low) & (values < high)).sum() / len(values)
    assert area == pytest.approx(inside, abs=2.01 * max(counts[1:]) / len(values))
    everything = np.geomspace(edges[1] / 2, made.maximum * 2, 50)
    area = (density(made, everything) * np.diff(np.log10(everything))).sum()
    assert area == pytest.approx(1 - counts[0] / made.total, rel=1e-9)


def test_density_equals_numpys_histogram_where_bins_are_groups():
    values = np.random.default_rng(0).lognormal(-2, 1, 20000)
    bins = np.geomspace(values.min(), values.max(), 21).astype(np.float32).astype(np.float64)
    counts = np.histogram(values, [0.0, *bins[1:-1], np.inf])[0]
    made = of_groups([0.0, *bins[1:-1].tolist()], counts.tolist(), bins[-1])
    expected = counts / len(values) / np.diff(np.log10(bins))
    np.testing.assert_allclose(density(made, bins)[1:], expected[1:], rtol=1e-9)


@pytest.mark.parametrize(
    "made",
    [
        of_groups([0.0], [50], 0.0, zeros=50),
        of_groups([0.0, 0.278], [1, 999], 0.278),
        of_groups([0.0, 1e-38, 1e-6, 1e3], [1, 2, 3, 1], 3e38),
        of_groups([0.0, *np.geomspace(1e-9, 9, 20000).tolist()], [17] * 20001, 12.0),
    ],
)
def test_odd_distributions_are_drawn(made):
    low, high = axis_range([made])
    assert 0 < low < high < math.inf
    assert np.isfinite(density(made, np.geomspace(low, high, 80))).all()
    check_page(render_page(ReportInputs.of(profiles=[profile(distributions=[made])])))


def test_a_share_of_zeros_is_told():
    # as ReLU has them
    figure = histograms({0: distribution(zeros=7000)}, {})
    assert "58.3 % zero" in parse(inline_svg(figure, "f", "")).get_text(" ")


@pytest.mark.parametrize("wide", [True, False])
def test_thresholds_are_drawn_where_they_are(wide):
    figure = histograms(DISTRIBUTIONS, THRESHOLDS, wide=wide)
    assert len(figure.axes) == 4
    for layer, axes in enumerate(figure.axes):
        lines = [line.get_xdata()[0] for line in axes.lines]
        assert lines == [thresholds[layer] for thresholds in THRESHOLDS.values()]
        assert axes.get_xlim()[0] < min(lines) < max(lines) < axes.get_xlim()[1]
        assert axes.get_title(loc="left") == f"layer {layer}"
    axes = thresholds_by_layer(THRESHOLDS, wide=wide).axes[0]
    for line, thresholds in zip(axes.lines, THRESHOLDS.values(), strict=True):
        assert line.get_ydata().tolist() == list(thresholds.values())


def test_a_threshold_far_off_does_not_stretch_the_axis():
    far = dict.fromkeys(range(4), 1.2e-38)
    low, _ = histograms(DISTRIBUTIONS, {"cats": far}).axes[0].get_xlim()
    assert low > 1e-5


@pytest.mark.parametrize(
    "thresholds", [{}, {"a": {}}, {"a": {0: math.nan}}, {"a": dict.fromkeys(range(4), 0.0)}, {"a": {9: 0.1}}]
)
def test_odd_thresholds_are_drawn(thresholds):
    for draw in (lambda: histograms(DISTRIBUTIONS, thresholds), lambda: thresholds_by_layer(thresholds)):
        assert parse(inline_svg(draw(), "f", "")).find("svg")


@pytest.mark.parametrize("count", [1, 2, 12, 13, 80])
def test_layers_shown_are_all_or_evenly_spaced(count):
    shown = shown_layers(dict.fromkeys(reversed(range(count))))
    assert len(shown) == min(count, style.MAX_PANELS)
    assert shown[0] == 0
    assert shown[-1] == count - 1
    steps = {b - a for a, b in itertools.pairwise(shown)}
    assert not steps or max(steps) - min(steps) <= 1


@pytest.mark.parametrize("layers", [1, 3, 80])
def test_any_number_of_layers(layers):
    soup = check_page(render_page(ReportInputs.of(profiles=[profile(layers)])))
    told = "12 of 80 layers are shown, evenly spaced: 0, 7, 14," in soup.get_text()
    assert told == (layers == 80)


@pytest.mark.parametrize(
    "draw", [lambda thresholds, wide: histograms(DISTRIBUTIONS, thresholds, wide), thresholds_by_layer]
)
def test_a_long_legend_takes_nothing_from_the_panels(draw):
    heights = []
    for count in (3, 20):
        figure = draw({f"cats-{100 * k / count:.0f}": {0: 0.1} for k in range(count)}, wide=False)
        figure.draw_without_rendering()
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[1] > 0.8 * heights[0]


def test_looks_tell_any_number_of_variants_apart():
    for count in (0, 1, 6, 7, 30):
        looks = style.looks([str(i) for i in range(count)])
        assert len({look.colour for look in looks.values()}) == count
