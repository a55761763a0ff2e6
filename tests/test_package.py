"""The package as a whole: what importing it costs, and that its parts depend one way."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import cats_llm

SOURCE = Path(cats_llm.__file__).parent

# what each part of the package may import of it, beside itself and what all may use
GROUND_FLOOR = {"kernels", "dtypes", "errors", "options", "outputs", "distributed", "number_format"}
ALL_MAY_USE = GROUND_FLOOR - {"kernels"} | {"formats", "progress", "checkpoint", "versions"}
MAY_IMPORT = {
    "errors": set(),
    "options": {"errors"},
    "outputs": {"errors"},
    "distributed": {"errors"},
    "formats": set(),
    "progress": set(),
    "number_format": set(),
    "versions": set(),
    "dtypes": set(),
    "kernels": {"dtypes", "outputs"},
    "checkpoint": set(),
    "model": {"kernels"},
    "integrations": {"kernels", "model"},
    "rows": set(),
    "chat": set(),
    "text": {"chat", "rows"},
    "gguf_files": {"model"},
    "loading": {"gguf_files", "model"},
    "conversion": {"gguf_files", "loading"},
    "bundled": set(),
    "inspection": {"bundled", "calibration", "evaluation", "integrations", "loading", "model"},
    "continuation": {"chat", "integrations", "model"},
    "benchmark": {"calibration", "integrations", "kernels", "loading", "model"},
    "calibration": {"conversion", "kernels", "loading", "model", "text"},
    "evaluation": {"calibration", "kernels", "loading", "model", "text"},
    "training": {"calibration", "chat", "evaluation", "loading", "model", "rows", "text"},
    "report": {"calibration"},
    "demo": {
        "bundled",
        "calibration",
        "continuation",
        "conversion",
        "evaluation",
        "loading",
        "model",
        "report",
        "text",
    },
    "recipes": {"benchmark", "bundled", "calibration", "evaluation", "kernels", "loading", "model", "text", "training"},
}


def test_import_is_light():
    script = (
        "import sys, torch\n"
        "from transformers import PreTrainedModel\n"  # which brings Triton along where it is installed
        "before = set(sys.modules)\n"
        "import cats_llm\n"
        "heavy = {'matplotlib', 'lm_eval', 'datasets', 'pyarrow', 'peft', 'typer', 'rich', 'triton', 'gguf'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)), torch.cuda.is_initialized())"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output == "[] False\n"


def test_version():
    assert cats_llm.__version__ == version("cats-llm")


def test_everything_public_is_there_and_sorted():
    assert cats_llm.__all__ == sorted(cats_llm.__all__)
    assert all(getattr(cats_llm, name).__doc__ for name in cats_llm.__all__)


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda f: f.relative_to(SOURCE).as_posix())
def test_imports_point_one_way(file):
    part = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    if part not in MAY_IMPORT:  # the cli and the package's front may import all
        assert part in {"cli", "__init__"}
        return
    imported = {
        node.module.split(".")[1]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cats_llm.")
    }
    allowed = MAY_IMPORT[part] | {part} | (set() if part in GROUND_FLOOR else ALL_MAY_USE)
    assert imported <= allowed, f"{file} imports {sorted(imported - allowed)}"


def module_name(file):
    parts = ("cats_llm", *file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): ast.parse(file.read_text(encoding="utf-8")) for file in SOURCE.rglob("*.py")}


def imported_modules(nodes, when_run=True):
    """The modules of this package that statements import; when they run, or (else) within functions and for types."""
    names = set()
    for node in nodes:
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.ImportFrom) and when_run:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            # of a package a module is taken, or a name
            names |= parts & MODULES.keys() or {str(node.module)}
        elif isinstance(node, ast.Import) and when_run:
            names |= {alias.name for alias in node.names}
        elif for_types or function:
            names |= set() if when_run else imported_modules(ast.walk(node))
        else:
            names |= imported_modules(ast.iter_child_nodes(node), when_run)
    # the front of the package imports its parts, which is how all of them begin
    return names & (MODULES.keys() - {"cats_llm"})


def circles(graph):
    """The groups of modules of which each imports all others, by way of others."""
    reach = {module: set(others) for module, others in graph.items()}
    for middle in graph:
        for module in graph:
            if middle in reach[module]:
                reach[module] |= reach[middle]
    return {frozenset(other for other in reach[m] if m in reach[other]) for m in graph if m in reach[m]}


def test_no_modules_import_each_other():
    at_start = {name: imported_modules([tree]) for name, tree in MODULES.items()}
    assert circles(at_start) == set()


def test_nor_within_functions_or_for_types():
    later = {name: imported_modules([tree]) | imported_modules([tree], False) for name, tree in MODULES.items()}
    assert circles(later) == set()


TESTS = Path(__file__).parent


@pytest.mark.parametrize("file", sorted(TESTS.rglob("test_*.py")), ids=lambda file: file.stem)
def test_tests_import_no_tests(file):
    """What several of them need stands in a helper module or in conftest.py."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    assert [name for name in names if name.startswith("test_")] == []
