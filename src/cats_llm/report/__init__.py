"""The results of calibration and evaluation as one self-contained HTML file.

Plain data goes in, so nothing here knows a model. matplotlib and jinja2 are imported when something is drawn, not
before: the data can be made, saved and read without them.
"""

from cats_llm.report.data import Continuation, LayerDistribution, Report, Variant
from cats_llm.report.extra import MissingExtraError, require_extra
from cats_llm.report.html import render_html, write_html

__all__ = [
    "Continuation",
    "LayerDistribution",
    "MissingExtraError",
    "Report",
    "Variant",
    "render_html",
    "require_extra",
    "write_html",
]
