"""Sphinx settings, and how docstrings written for readers of the source become pages.

`make docs` builds them with warnings as errors: a link or a name in a docstring that leads nowhere fails.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

from sphinx.util import logging

import cats_llm
from cats_llm.options import option_fields

HERE = Path(__file__).parent
SOURCE = Path(cats_llm.__file__).parent

project = "cats-llm"
author = copyright = "the authors of cats-llm"
version = release = cats_llm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"cats-llm {version}"
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# names of other projects that docstrings speak of
FOREIGN = {
    "AutoModelForCausalLM.from_pretrained", "PreTrainedConfig", "PreTrainedModel", "from_pretrained",
    "functools.partial", "generate", "json", "model.generate", "quantization_config", "save_pretrained", "torchrun",
}  # fmt: skip

# "a, b: text", said of two attributes or arguments at once
SEVERAL = re.compile(r"( +)([\w]+(?:, \w+)+)(: .*)")

log = logging.getLogger(__name__)


def _defined() -> dict[str, set[str]]:
    """Every module, class, function, constant and attribute of the package: its short name, and the full ones."""
    names: dict[str, set[str]] = {}

    def add(node: ast.AST, place: str) -> None:
        for child in ast.iter_child_nodes(node):
            targets: list[str] = []
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                targets = [child.name]
            elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                targets = [child.target.id]
            elif isinstance(child, ast.Assign):
                targets = [target.id for target in child.targets if isinstance(target, ast.Name)]
            for name in targets:
                names.setdefault(name, set()).add(f"{place}.{name}")
            if isinstance(child, ast.ClassDef):
                add(child, f"{place}.{child.name}")

    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE.parent).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        names.setdefault(module.rsplit(".", 1)[-1], set()).add(module)
        add(ast.parse(file.read_text(encoding="utf-8")), module)
    return names


DEFINED = _defined()
FULL = {full for names in DEFINED.values() for full in names}


def full_name(name: str) -> str | None:
    """Of a name in a docstring, as `fit`, `Profile.config` or `cats_llm.text.load_sequences`; "" if several have it."""
    if name in FULL:
        return name
    last = name.rsplit(".", 1)[-1]
    matches = [full for full in DEFINED.get(last, ()) if full.endswith(f".{name}")]
    return None if not matches else matches[0] if len(matches) == 1 else ""


def _text(line: str, place: str) -> str:
    """A line of a docstring, in Markdown's backticks, as reStructuredText."""
    parts = re.split(r"(``[^`]+``|`[^`]+`)", line)
    for i, part in enumerate(parts):
        if part.startswith("``"):
            continue
        if not part.startswith("`"):
            parts[i] = re.sub(r"(\*|\||(?<=\w)_(?=\W|$))", r"\\\1", part)
            continue
        name = part.strip("`")
        full = full_name(name) if re.fullmatch(r"[A-Za-z_][\w.]*", name) else ""
        if full is None and name not in FOREIGN:
            log.warning("%s speaks of %s, which is not in the package (any more)", place, part)
        parts[i] = f":py:obj:`{name} <{full}>`" if full and not name.startswith("_") else f"``{name}``"
    return "".join(parts)


def docstring(app, what, name, thing, options, lines) -> None:
    """Make of a docstring what Sphinx understands, and tell the options of a dataclass."""
    out: list[str] = []
    for line in lines:
        match = SEVERAL.fullmatch(line)
        out += [f"{match[1]}{one.strip()}{match[3]}" for one in match[2].split(",")] if match else [line]
    if what == "class" and hasattr(thing, "__dataclass_fields__"):
        fields = option_fields(thing)
        own = [field for key, field in fields.items() if key in thing.__dataclass_fields__]
        if own:
            out += ["", "Attributes:", *(f"    {field.name}: {field.option.help}" for field in own)]
    lines[:] = [_text(line, name) for line in out]
    if what == "property":  # napoleon would read the first line as "type: description"
        lines[0] = lines[0].replace(": ", "\N{RATIO} ")


def source_links(app, name, content) -> None:
    """Leave links out that lead to files of the repository which are no pages, if they are there."""

    def plain(match: re.Match[str]) -> str:
        file = HERE / match[2].split("#")[0]
        if not file.exists():
            log.warning("%s links to %s, which does not exist", name, match[2])
        return f"{match[1]} (`{file.resolve().relative_to(HERE.parent)}`)"

    content[0] = re.sub(r"\[([^\]]*)\]\((\.\./[^)]*)\)", plain, content[0])


def write_commands(app) -> None:
    """The page of all commands, from the commands themselves."""
    line = [sys.executable, "-m", "typer", "cats_llm.cli.main", "utils", "docs", "--name", "cats"]
    page = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    page = page.replace("# `cats`", "# The command line", 1)
    file = HERE / "commands.md"
    if not file.exists() or file.read_text(encoding="utf-8") != page:
        file.write_text(page, encoding="utf-8")


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", write_commands)
    app.connect("source-read", source_links)
    app.connect("autodoc-process-docstring", docstring, priority=100)  # before napoleon
