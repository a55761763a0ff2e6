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
ALL_MAY_USE = {"dtypes", "errors", "options", "outputs", "distributed", "checkpoint", "versions"}
GROUND_FLOOR = {"kernels", "dtypes", "errors", "options", "outputs", "distributed"}
MAY_IMPORT = {
    "errors": set(),
    "options": {"errors"},
    "outputs": {"errors"},
    "distributed": set(),
    "versions": set(),
    "dtypes": set(),
    "kernels": {"dtypes"},
    "checkpoint": set(),
    "model": {"kernels"},
    "integrations": {"kernels", "model"},
    "rows": set(),
    "chat": set(),
    "text": {"chat", "rows"},
    "loading": {"model"},
    "bundled": set(),
    "continuation": {"chat", "integrations", "model"},
    "benchmark": {"calibration", "integrations", "kernels", "model"},
    "calibration": {"kernels", "model"},
    "evaluation": {"calibration", "kernels", "model", "text"},
    "training": {"calibration", "chat", "evaluation", "loading", "model", "rows", "text"},
    "report": set(),
    "recipes": set(),
}


def test_import_is_light():
    script = (
        "import sys, torch\n"
        "from transformers import PreTrainedModel\n"  # which brings Triton along where it is installed
        "before = set(sys.modules)\n"
        "import cats_llm\n"
        "heavy = {'matplotlib', 'lm_eval', 'datasets', 'pyarrow', 'peft', 'typer', 'rich', 'triton'}\n"
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


TESTS = Path(__file__).parent


@pytest.mark.parametrize("file", sorted(TESTS.rglob("test_*.py")), ids=lambda file: file.stem)
def test_tests_import_no_tests(file):
    """What several of them need stands in a helper module or in conftest.py."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    assert [name for name in names if name.startswith("test_")] == []
