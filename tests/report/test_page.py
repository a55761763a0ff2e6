"""The report: what goes in is what is shown, whatever goes in."""

import itertools
import json
import math
import re
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest

from cats_llm.report import (
    Continuation,
    LayerDistribution,
    MissingExtraError,
    Report,
    Variant,
    render_html,
    require_extra,
    write_html,
)
from cats_llm.report import html as page
from cats_llm.report.density import axis_range, density, zero_share
from cats_llm.report.figures import MAX_PANELS, histograms, looks, quality, shown_layers, sparsity_by_layer
from cats_llm.report.figures import thresholds_by_layer as thresholds_figure
from cats_llm.report.svg import inline_svg
from cats_llm.report.wording import change, clean, findings, label, number, percent, target
from demo_reports import dense, distribution, report, variant
from pages import HOSTILE, check_page, parse, shown_number


def table(html):
    """The rows of the results: cells as shown."""
    rows = parse(html).select("table.results tbody tr")
    return [[cell.get_text().strip() for cell in row.find_all(["th", "td"])] for row in rows]


def text_of(figure):
    return parse(inline_svg(figure, "f", "")).get_text(" ")


# data


@pytest.mark.parametrize("made", [report(), Report("nothing"), report(layers=1)])
def test_json_gives_back_the_data(made):
    text = json.dumps(made.to_json(), allow_nan=False)
    assert Report.from_json(json.loads(text)) == made
    for part in [*made.distributions, *made.variants, *made.continuations]:
        assert type(part).from_json(json.loads(json.dumps(part.to_json()))) == part


def test_json_has_no_word_for_nan():
    odd = variant(0.5, perplexity=math.inf, kl=math.nan, measured_sparsity={0: math.nan, 1: 0.5})
    back = Variant.from_json(json.loads(json.dumps(odd.to_json(), allow_nan=False)))
    assert back.perplexity is None
    assert back.kl is None
    assert math.isnan(back.measured_sparsity[0])
    assert back.measured_sparsity[1] == 0.5


@pytest.mark.parametrize("values", [{}, {"title": "x", "titel": "x"}, {"title": "x", "variants": [{"name": "y"}]}])
def test_json_of_something_else_is_refused(values):
    with pytest.raises(ValueError, match=r"this is no (Report|Variant)"):
        Report.from_json(values)


@pytest.mark.parametrize(
    ("edges", "counts", "maximum"),
    [
        ([0.0, 1.0], [1], 2.0),
        ([1.0, 0.5], [1, 1], 2.0),
        ([0.0, 1.0], [1, -1], 2.0),
        ([0.0, 1.0], [1, 1], 0.5),
        ([-1.0, 1.0], [1, 1], 2.0),
        ([0.0, math.nan], [1, 1], 2.0),
        ([0.0, 1.0], [1, 1], math.inf),
    ],
)
def test_what_is_no_distribution_is_refused(edges, counts, maximum):
    with pytest.raises(ValueError, match="layer 3"):
        LayerDistribution(3, edges, counts, maximum)


def test_names_of_variants_differ():
    with pytest.raises(ValueError, match="different names"):
        Report("x", variants=[variant(0.5), variant(0.5)])


# the density


@pytest.mark.parametrize("zeros", [0, 7000])
@pytest.mark.parametrize("scale", [1e-6, 0.1, 1e3])
def test_density_integrates_to_the_share_inside_the_axis(scale, zeros):
    made = distribution(scale=scale, zeros=zeros)
    low, high = axis_range([made])
    bins = np.geomspace(low, high, 81)
    area = (density(made, bins) * np.diff(np.log10(bins))).sum()
    # every activation counted one by one at its group's edge; the two groups that the axis cuts may differ
    values = np.repeat(made.edges, made.counts)
    inside = ((values >= low) & (values < high)).sum() / len(values)
    assert area == pytest.approx(inside, abs=2.01 * max(made.counts[1:]) / len(values))
    everything = np.geomspace(made.edges[1] / 2, made.maximum * 2, 50)
    area = (density(made, everything) * np.diff(np.log10(everything))).sum()
    assert area == pytest.approx(1 - made.counts[0] / made.total, rel=1e-9)
    assert zero_share(made) == made.counts[0] / made.total


def test_density_equals_numpys_histogram_where_bins_are_groups():
    values = np.random.default_rng(0).lognormal(-2, 1, 20000)
    bins = np.geomspace(values.min(), values.max(), 51)
    bins[-1] = values.max()
    counts = np.histogram(values, bins)[0]
    made = LayerDistribution(0, bins[:-1].tolist(), counts.tolist(), float(bins[-1]))
    expected = counts / len(values) / np.diff(np.log10(bins))
    np.testing.assert_allclose(density(made, bins), expected, rtol=1e-9)


@pytest.mark.parametrize(
    "made",
    [
        LayerDistribution(0, [], [], 0.0),
        LayerDistribution(0, [0.0], [50], 0.0),
        LayerDistribution(0, [0.0, 1.0], [0, 0], 1.0),
        LayerDistribution(0, [2.0], [50], 2.0),
        LayerDistribution(0, [0.0, 0.278], [1, 999], 0.278),
        LayerDistribution(0, [0.0, 1e-38, 1e-6, 1e3], [1, 2, 3, 1], 3e38),
        LayerDistribution(0, np.geomspace(1e-9, 9, 20000).tolist(), [17] * 20000, 12.0),
    ],
)
def test_odd_distributions_are_drawn(made):
    low, high = axis_range([made])
    assert 0 < low < high < math.inf
    assert np.isfinite(density(made, np.geomspace(low, high, 80))).all()
    check_page(render_html(report(distributions=[made])))


def test_a_share_of_zeros_is_told():
    # as ReLU has them
    assert "58.4 % zero" in text_of(histograms(report(distributions=[distribution(zeros=7000)]))).replace("\xa0", " ")


# figures


@pytest.mark.parametrize("wide", [True, False])
def test_thresholds_are_drawn_where_they_are(wide):
    made = report()
    figure = histograms(made, wide=wide)
    assert len(figure.axes) == 4
    for layer, axes in enumerate(figure.axes):
        lines = [line.get_xdata()[0] for line in axes.lines]
        assert lines == [v.thresholds[layer] for v in made.sparse]
        assert axes.get_xlim()[0] < min(lines) < max(lines) < axes.get_xlim()[1]
        assert axes.get_title(loc="left") == f"layer {layer}"


def test_a_threshold_far_off_does_not_stretch_the_axis():
    far = variant(0.5, thresholds=dict.fromkeys(range(4), 1.2e-38))
    low, _ = histograms(report(variants=[far])).axes[0].get_xlim()
    assert low > 1e-5


@pytest.mark.parametrize("count", [1, 2, 12, 13, 80])
def test_layers_shown_are_all_or_evenly_spaced(count):
    shown = [d.layer for d in shown_layers([LayerDistribution(i, [0.0], [1], 0.0) for i in reversed(range(count))])]
    assert len(shown) == min(count, MAX_PANELS)
    assert shown[0] == 0
    assert shown[-1] == count - 1
    steps = {b - a for a, b in itertools.pairwise(shown)}
    assert not steps or max(steps) - min(steps) <= 1


def test_figures_plot_the_numbers():
    made = report()
    for axes, v in zip(sparsity_by_layer(made).axes, made.sparse, strict=True):
        _, calibration, heldout = axes.lines
        np.testing.assert_allclose(calibration.get_ydata(), [100 * x for x in v.calibration_sparsity.values()])
        np.testing.assert_allclose(heldout.get_ydata(), [100 * x for x in v.measured_sparsity.values()])
        low, high = axes.get_ylim()
        assert low <= min(heldout.get_ydata())
        assert max(heldout.get_ydata()) <= high
    for line, v in zip(thresholds_figure(made).axes[0].lines, made.sparse, strict=True):
        assert line.get_ydata().tolist() == list(v.thresholds.values())
    perplexity, kl = quality(made).axes
    np.testing.assert_allclose(perplexity.lines[0].get_ydata(), [v.perplexity for v in made.variants])
    np.testing.assert_allclose(kl.lines[0].get_ydata(), [0, *(v.kl for v in made.sparse)])
    np.testing.assert_allclose(kl.lines[0].get_xdata(), [100 * v.gate_sparsity for v in made.variants])


@pytest.mark.parametrize("draw", [histograms, thresholds_figure, quality])
def test_a_long_legend_takes_nothing_from_the_panels(draw):
    few, many = (report(variants=[dense(), *(variant(k / n) for k in range(n))]) for n in (3, 20))
    heights = []
    for made in (few, many):
        figure = draw(made, wide=False)
        figure.draw_without_rendering()
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[1] > 0.8 * heights[0]


def test_looks_tell_any_number_of_variants_apart():
    for count in (0, 1, 6, 7, 30):
        variants = [variant(0.5, name=str(i)) for i in range(count)]
        assert len({look.colour for look in looks(variants).values()}) == count


def test_figures_leave_the_users_settings_alone():
    import matplotlib

    def settings():
        return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}

    before = settings()
    with matplotlib.rc_context({"lines.linewidth": 17, "svg.fonttype": "path"}):
        odd = render_html(report())
    assert render_html(report()) == odd
    assert settings() == before


# the page


def test_page_is_self_contained_and_deterministic():
    html = render_html(report())
    soup = check_page(html)
    assert html == render_html(report())
    assert len(soup.find_all("figure")) == 4
    assert len(soup.find_all("svg")) == 8
    # text in the figures is text
    assert "layer 3" in soup.find_all("svg")[2].get_text(" ")


def test_page_is_the_same_in_another_process():
    script = "import sys, json; from cats_llm.report import *; "
    script += "sys.stdout.buffer.write(render_html(Report.from_json(json.load(sys.stdin))).encode())"
    script += "; assert 'matplotlib.pyplot' not in sys.modules"
    text = json.dumps(report().to_json())
    done = subprocess.run([sys.executable, "-c", script], input=text.encode(), capture_output=True, check=True)
    assert done.stdout.decode() == render_html(report())


def test_table_shows_the_numbers_that_went_in():
    made = report()
    made.variants.append(variant(0.999, perplexity=123456.7, kl=9.87, top1_agreement=0.00012))
    html = render_html(made)
    assert [row[0] for row in table(html)] == [v.name for v in made.variants]
    for row, v in zip(table(html), made.variants, strict=True):
        shares = [v.target_sparsity, v.gate_sparsity, v.ffn_sparsity, v.model_sparsity, v.top1_agreement]
        for text, value in zip([*row[1:5], row[8]], shares, strict=True):
            if value is None:
                assert text == "–"
            else:
                assert shown_number(text) == pytest.approx(100 * value, abs=0.0501)
                assert (shown_number(text) in (0, 100)) == (value in (0, 1))
        assert shown_number(row[5]) == pytest.approx(v.perplexity, rel=5e-4)
        if v is not made.dense:
            assert shown_number(row[7]) == pytest.approx(v.kl, rel=5e-3)
            assert row[6] == change(v.perplexity, 17.533)
    assert table(html)[1][6] == "+6.2\xa0%"
    # and to the last digit for machines
    exact = [float(element["value"]) for element in parse(html).select("table.results data")]
    columns = "target_sparsity gate_sparsity ffn_sparsity model_sparsity perplexity kl top1_agreement"
    values = [getattr(v, column) for v in made.variants for column in columns.split()]
    assert exact == [value for value in values if value is not None]


@pytest.mark.parametrize("layers", [1, 3, 80])
def test_any_number_of_layers(layers):
    soup = check_page(render_html(report(layers=layers)))
    told = "12 of 80 layers are shown, evenly spaced: 0, 7, 14," in soup.get_text()
    assert told == (layers == 80)


@pytest.mark.parametrize(
    "changes",
    [
        {"distributions": []},
        {"variants": []},
        {"variants": [dense()]},
        {"variants": [variant(0.5)]},
        {"variants": [dense(), variant(0.5, kl=None, top1_agreement=None)]},
        {"variants": [dense(), variant(0.5, perplexity=None, kl=None)]},
        {"variants": [dense(perplexity=math.nan), variant(0.5, kl=math.nan, perplexity=math.inf, gate_sparsity=None)]},
        {"variants": [dense(perplexity=0.0), variant(0.5)]},
        {"variants": [dense(), variant(0.9, perplexity=1e300, kl=80.0), variant(0.5, perplexity=1e-9)]},
        {"variants": [dense(), variant(0.5, thresholds={}, calibration_sparsity={}, measured_sparsity={})]},
        {"variants": [dense(), variant(0.5, target_sparsity=None)]},
        {"variants": [dense(), variant(0.5, measured_sparsity={0: math.nan, 3: 0.5}, thresholds={0: math.nan})]},
        {"variants": [dense(), variant(0.5, thresholds=dict.fromkeys(range(4), 0.0))]},
        {"variants": [dense(), *(variant(k / 20) for k in range(20))]},
        {"continuations": []},
        {"continuations": [Continuation("", {}), Continuation("x", {"unknown": "y", "cats-90": ""})]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_is_missing_the_rest_is_shown(changes):
    made = report(**changes)
    soup = check_page(render_html(made))
    assert len(soup.select("table.results tbody tr")) == len(made.variants)


def test_nothing_at_all():
    soup = check_page(render_html(Report("")))
    assert not soup.find_all("figure")
    assert "No model was evaluated." in soup.get_text()


def test_hostile_text_is_text():
    line = "word" * 5000
    made = report(
        title=HOSTILE,
        model={HOSTILE: HOSTILE},
        variants=[dense(name=HOSTILE + "0"), variant(0.5, name=HOSTILE), variant(0.7, name='_x" id="y" onload="z')],
        continuations=[Continuation(HOSTILE, {HOSTILE: HOSTILE}), Continuation(line, {HOSTILE: line})],
        command=f"cats demo {HOSTILE}",
        created=HOSTILE,
    )
    html = render_html(made)
    soup = check_page(html)
    seen = HOSTILE.replace("\x00", "�").replace("\x1b", "�").replace("\ud800", "�")
    assert soup.find("title").get_text() == seen
    assert soup.select(".prompt")[0].get_text() == seen
    assert soup.select(".prompt")[1].get_text() == line
    assert not [element for element in soup.find_all() if element.has_attr("onload")]
    assert "49" not in soup.select_one(".prompt").get_text()
    # in legends too
    assert "<script>alert(1)</script>" in soup.find("svg").get_text()


# words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(17.533), "17.53"),
        (number(8.012, 3), "8.01"),
        (number(9.9996), "10.00"),
        (number(123456.7), "123,457"),
        (number(2.5e9), "2.50 × 10⁹"),
        (number(3.2e-7, 3), "3.20 × 10⁻⁷"),
        (number(0.06152, 3), "0.0615"),
        (number(-1.5, 2), "−1.5"),
        (number(0.0), "0"),
        (number(math.nan), "–"),
        (number(None), "–"),
        (percent(0.49951), "50.0 %"),
        (percent(0.0), "0 %"),
        (percent(1.0), "100 %"),
        (percent(0.9999), "99.99 %"),
        (percent(0.0002), "0.02 %"),
        (percent(math.inf), "–"),
        (target(0.5), "50 %"),
        (target(0.333), "33.3 %"),
        (target(0.07), "7 %"),
        (target(None), "–"),
        (change(18.6, 17.533), "+6.1 %"),
        (change(9.0, 10.0), "−10.0 %"),
        (change(50.0, 10.0), "+400 %"),
        (change(1000.0, 10.0), "× 100"),
        (change(1.0, None), "–"),
        (change(math.inf, 1.0), "–"),
        (label("a\nb  c"), "a b c"),
        (label("x" * 99), "x" * 27 + "…"),
        (label(""), "–"),
        (clean("a\x00b\ud800\n"), "a�b�\n"),
    ],
)
def test_wording(text, expected):
    assert text.replace("\xa0", " ") == expected


def test_findings():
    found = [sentence.replace("\xa0", " ") for sentence in findings(report())]
    assert found == [
        "At 50 % gate sparsity perplexity rises from 17.53 to 18.63 (+6.2 %), and the most likely next token is the "
        "dense model’s in 92 % of cases.",
        "At 90 % it is 29.04 (+65.6 %), and the most likely next token is the dense model’s in 73 % of cases.",
    ]
    better = [dense(), variant(0.5, perplexity=16.0, top1_agreement=None)]
    assert "falls from 17.53 to 16.00 (−8.7\xa0%)." in findings(report(variants=better))[0]
    same = [dense(), variant(0.5, perplexity=17.533, top1_agreement=1.0)]
    assert "stays at 17.53, and" in findings(report(variants=same))[0]
    assert "100\xa0% of cases" in findings(report(variants=same))[0]
    assert findings(report(variants=[dense()])) == [
        "The dense model’s perplexity is 17.53; no sparse variant was evaluated."
    ]


# files and dependencies


def test_write(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    write_html(report(), path)
    assert path.read_text(encoding="utf-8") == render_html(report())
    assert list(tmp_path.iterdir()) == [path]
    write_html(Report("x"), str(path))
    assert "No model was evaluated" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("step", ["render_html", "fsync", "replace"])
def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(page if step == "render_html" else page.os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_html(Report("x"), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_one_clear_sentence(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    message = re.escape("the report needs matplotlib and jinja2: pip install 'cats-llm[report]'")
    for call in (require_extra, lambda: render_html(Report("x")), lambda: write_html(Report("x"), tmp_path / "x")):
        with pytest.raises(MissingExtraError, match=f"^{message}$"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_data_needs_no_extra():
    script = """
import sys
import cats_llm  # whose own dependencies may look for these
sys.modules.update(dict.fromkeys(["matplotlib", "jinja2"]))
from cats_llm.report import Report
from cats_llm.report.html import write_html
assert Report.from_json(Report("x").to_json()) == Report("x")
try:
    import cats_llm.report.figures
except ImportError as error:
    assert "pip install" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_templates_are_part_of_the_package():
    assert files("cats_llm.report").joinpath("templates", "base.html").is_file()
