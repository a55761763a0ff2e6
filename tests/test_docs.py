"""What makes pages of docstrings: names become links, and a name that is no more stops the build."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest

from cats_llm.options import option

CONF = Path(__file__).parents[1] / "docs" / "conf.py"


@pytest.fixture(scope="module")
def conf():
    spec = importlib.util.spec_from_file_location("docs_conf", CONF)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def page(conf, monkeypatch):
    """Docstring to what Sphinx gets, and what was warned of."""
    said = []
    monkeypatch.setattr(conf.log, "warning", lambda text, *parts: said.append(text % parts))

    def make(text, what="function", thing=None):
        lines = text.splitlines()
        conf.docstring(None, what, "place", thing, None, lines)
        return lines, said

    return make


def test_a_name_of_the_package_is_a_link(page):
    lines, said = page("As `Profile.config`, `cats_llm.options.build`, `cats eval`, ``x`` and `save_pretrained` do.")
    assert lines == [
        "As :py:obj:`Profile.config <cats_llm.calibration.profile.Profile.config>`, "
        ":py:obj:`cats_llm.options.build <cats_llm.options.build>`, ``cats eval``, ``x`` and ``save_pretrained`` do."
    ]
    assert said == []


@pytest.mark.parametrize("name", ["Profile.nowhere", "cats_llm.nowhere.build", "Nobody"])
def test_a_name_that_is_no_more_is_a_warning(page, name):
    _, said = page(f"As `{name}` did.")
    assert said == [f"place speaks of `{name}`, which is not in the package (any more)"]


def test_signs_of_markup_are_only_signs(page):
    lines, _ = page("2 * a of |act(x)|, and trailing_ too: `a * b`")
    assert lines == [r"2 \* a of \|act(x)\|, and trailing\_ too: ``a * b``"]


def test_attributes_said_at_once_are_attributes_each(page):
    lines, _ = page("Attributes:\n    low, high: of a range.")
    assert lines == ["Attributes:", "    low: of a range.", "    high: of a range."]


def test_options_are_told_from_their_fields(page):
    @dataclass
    class Config:
        rate: float = option(1.0, help="A rate.")

    lines, _ = page("Doc.", "class", Config)
    assert lines == ["Doc.", "", "Attributes:", "    rate: A rate."]


def test_links_to_files_that_are_no_pages_are_checked(conf, monkeypatch):
    said = []
    monkeypatch.setattr(conf.log, "warning", lambda text, *parts: said.append(text % parts))
    content = ["See [the map](../CONTRIBUTING.md#map) and [nothing](../nothing.md); [a page](method.md)."]
    conf.source_links(None, "cpu", content)
    assert content == ["See the map (`CONTRIBUTING.md`) and nothing (`nothing.md`); [a page](method.md)."]
    assert said == ["cpu links to ../nothing.md, which does not exist"]
