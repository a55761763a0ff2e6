"""Result files of other commands as one self-contained HTML page, as figures and as tables.

matplotlib and jinja2 are imported when something is drawn, not before: results can be read and told without them.
"""

from cats_llm.report.inputs import ReportInputs, read_files
from cats_llm.report.optional_dependency import MissingExtraError, require_extra
from cats_llm.report.page import render_page, write_figures
from cats_llm.report.tables import markdown

__all__ = [
    "MissingExtraError",
    "ReportInputs",
    "markdown",
    "read_files",
    "render_page",
    "require_extra",
    "write_figures",
]
