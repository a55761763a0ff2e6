"""Names and other text of result files, made fit to be shown."""

import re

from cats_llm.number_format import MISSING

# what neither HTML nor XML nor UTF-8 can hold: control characters but tab and newline, and half a surrogate pair
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """Replace characters that would make the document invalid."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def label(text: str, length: int = 28) -> str:
    """A name short enough for a title or a legend."""
    text = " ".join(clean(text).split()) or MISSING
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def short_name(model: str) -> str:
    """The last part of a path or of a name on the hub."""
    return model.replace("\\", "/").rstrip("/").rpartition("/")[2] or model
