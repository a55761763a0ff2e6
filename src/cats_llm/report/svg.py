"""A matplotlib Figure as SVG that can stand inside an HTML page beside others."""

import io
import re
from xml.etree import ElementTree

from cats_llm.report.style import Figure, style

_REFERENCE = re.compile(r"url\(#([^)]*)\)")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
# at most: text in all figures of a wide page is then of one size
_PIXELS_PER_POINT = 1.36
_GEOMETRY = {"d", "x", "y", "x1", "x2", "y1", "y2", "width", "height", "points", "transform"}


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element: text is text, in the font of the page; equal figures give equal markup.

    Args:
        figure: drawn in `style`.
        name: begins every id, so that two figures of a page share none.
        description: what a screen reader says.
    """
    buffer = io.StringIO()
    with style(**{"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    # a tree, since in the text of a legend nothing is an id
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # its style rules would hold for the whole page; the template has them
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    referenced: dict[str, str] = {}
    for element in root.iter():
        # namespaces are for XML; in HTML an <svg> brings its own
        element.tag = _local(element.tag)
        element.attrib = {_local(key): value for key, value in element.attrib.items()}
        for key, value in element.attrib.items():
            for old in [value[1:]] if key == "href" else _REFERENCE.findall(value):
                referenced.setdefault(old, f"{name}-{len(referenced)}")
    for element in root.iter():
        element.attrib = {key: _rewrite(key, value, referenced) for key, value in element.attrib.items()}
        if element.get("id") not in referenced.values():
            element.attrib.pop("id", None)
        # indentation, which between the lines of a text would be a space
        element.tail = None
        if element.tag != "text" and element.text and not element.text.strip():
            element.text = None
    box = root.get("viewBox", "")
    width = float(box.split()[2]) * _PIXELS_PER_POINT
    root.attrib = {"viewBox": box, "style": f"max-width: {width:.0f}px", "role": "img", "aria-label": description}
    return ElementTree.tostring(root, encoding="unicode")


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _rewrite(key: str, value: str, referenced: dict[str, str]) -> str:
    if key == "id":
        return referenced.get(value, value)
    if key == "href":
        return f"#{referenced[value[1:]]}"
    if key == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
    elif key in _GEOMETRY:
        # a hundredth of a point is enough to draw with
        value = _NUMBER.sub(lambda match: f"{float(match[0]):.2f}", " ".join(value.split()))
    return _REFERENCE.sub(lambda match: f"url(#{referenced[match[1]]})", value)
