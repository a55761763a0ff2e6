"""The report in headless Chromium: no part is wider than a phone, and light and dark follow the reader's setting."""

import html
import json
import re
from pathlib import Path

import pytest

from browser import NEEDED, chromium
from cats_llm import bundled
from cats_llm.cli.main import main
from eval_files import BENCHES, eval_file, write
from profiles import profile

pytestmark = NEEDED

# asks the document in the frame what a reader would see
PROBE = """
<!DOCTYPE html><meta charset="utf-8">
<iframe style="width: %(width)dpx; height: 900px; border: 0" srcdoc="%(page)s"></iframe><pre></pre>
<script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, view = page.defaultView;
  const shown = e => e.getClientRects().length > 0;
  const box = e => e.getBoundingClientRect();
  const scrolls = e => e.closest(".scroll") !== null;
  const background = view.getComputedStyle(page.body).backgroundColor, ink = view.getComputedStyle(page.body).color;
  document.querySelector("pre").textContent = JSON.stringify({
    width: view.innerWidth,
    scrollWidth: page.documentElement.scrollWidth,
    outside: [...page.querySelectorAll("body *")].filter(
      e => shown(e) && !scrolls(e) && !e.closest("svg") && box(e).right > view.innerWidth + 1
    ).map(e => e.outerHTML.slice(0, 80)),
    wide: [...page.querySelectorAll(".wide")].filter(shown).length,
    narrow: [...page.querySelectorAll(".narrow")].filter(shown).length,
    figures: page.querySelectorAll("figure").length,
    smallest: Math.min(...[...page.querySelectorAll("svg text")].filter(shown).map(e => box(e).height)),
    headline: box(page.querySelector(".headline")).top,
    background, ink,
  });
};
</script>
"""


def results(folder):
    """A page of `cats report` with all kinds of files in it."""
    files = [write(folder / f"{name}.json", eval_file(model=name, layers=8)) for name in ("before", "after")]
    profile = folder / "profile.safetensors"
    text = str(bundled.calibration_text())
    size = ["--samples", "2", "--seq-length", "64"]
    assert main(["calibrate", str(bundled.model_path()), "--data", text, *size, "-o", str(profile)]) == 0
    out = folder / "report.html"
    assert main(["report", *map(str, [*files, profile, *BENCHES]), "-o", str(out)]) == 0
    return out


def demo(folder):
    """A page as `cats demo` makes it: one model, a text, a profile and continuations."""
    values = eval_file(tasks=(), relu=False, layers=8)
    values["continuations"] = {"Once upon a time": {v["name"]: "there was a fox " * 30 for v in values["variants"]}}
    profile(layers=8).save(folder / "profile.safetensors")
    files = [write(folder / "results.json", values), folder / "profile.safetensors"]
    assert main(["report", *map(str, files), "-o", str(folder / "report.html")]) == 0
    return folder / "report.html"


PAGES = {"results": (results, 8), "demo": (demo, 4)}  # and how many figures there are at least


@pytest.fixture(scope="module", params=PAGES)
def page(request, tmp_path_factory):
    make, figures = PAGES[request.param]
    return make(tmp_path_factory.mktemp("page")), figures


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_reader_sees_all_of_it(page, tmp_path, width, dark):
    page, figures = page
    probe = tmp_path / "probe.html"
    document = html.escape(page.read_text(encoding="utf-8"), quote=True)
    probe.write_text(PROBE % {"width": width, "page": document}, encoding="utf-8")
    options = ["--window-size=1400,1000", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    output, complaints = chromium(tmp_path, probe.as_uri(), "--dump-dom", *options)
    found = json.loads(html.unescape(re.search(r"<pre>(\{.*?\})</pre>", output, re.DOTALL)[1]))
    assert complaints == []
    assert found["width"] == width
    assert found["scrollWidth"] <= width
    assert found["outside"] == []
    shown, hidden = ("wide", "narrow") if width > 720 else ("narrow", "wide")
    assert (found[shown], found[hidden]) == (found["figures"], 0)
    assert found["figures"] >= figures
    assert found["smallest"] > 9, "text in figures is too small to read"
    assert found["headline"] < 200
    luminance = [sum(map(int, re.findall(r"\d+", found[key])[:3])) / 3 for key in ("background", "ink")]
    assert (luminance[0] < 60 and luminance[1] > 200) if dark else (luminance[0] > 200 and luminance[1] < 60)


def test_the_page_is_drawn(page, tmp_path):
    from PIL import Image

    page, _ = page
    picture = Path(tmp_path / "page.png")
    chromium(tmp_path, page.as_uri(), "--hide-scrollbars", "--window-size=390,8000", f"--screenshot={picture}")
    with Image.open(picture) as image:
        assert image.size == (390, 8000)
        colours = [colour for _, colour in image.convert("RGB").getcolors(1 << 24)]
    for wanted in ((0, 99, 166), (217, 119, 6)):  # of the figures; edges of thin lines are mixed
        assert min(sum(abs(a - b) for a, b in zip(colour, wanted, strict=True)) for colour in colours) < 12
