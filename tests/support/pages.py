"""Reading pages as a test does, and text that would break a careless one."""

import re

from bs4 import BeautifulSoup

HOSTILE = "<script>alert(1)</script>{{ 7*7 }}{% raw %}&amp;\"'>]]>--> 漢字 مرحبا 👩‍💻 \x00\x1b \ud800 $\\frac{x}$ _"


def parse(html):
    return BeautifulSoup(html, "html.parser")


def shown_number(text):
    return float(text.replace("−", "-").replace(",", "").replace("%", "").replace("\xa0", ""))


def check_page(html):
    """What holds for every report: well formed, alone, ids unique, references resolved."""
    soup = parse(html)
    ids = [element["id"] for element in soup.find_all(id=True)]
    assert len(ids) == len(set(ids))
    for attribute in ("src", "href", "xlink:href", "action", "srcset"):
        for element in soup.find_all(attrs={attribute: True}):
            value = element[attribute]
            assert value == "data:," or (value[0] == "#" and value[1:] in ids), value
    for reference in re.findall(r"url\(([^)]*)\)", html):
        assert reference[0] == "#"
        assert reference[1:] in ids
    assert "@import" not in html
    assert soup.find("script") is None
    assert soup.find("meta", attrs={"name": "viewport"})
    html.encode("utf-8")
    # void of what a broken number leaves behind
    assert not re.search(r"\b(nan|inf|None)\b", soup.get_text())
    for svg in soup.find_all("svg"):
        assert not re.search(r"\b(nan|inf)\b", str(svg))
    return soup
