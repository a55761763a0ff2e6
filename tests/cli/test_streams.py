"""Consoles as people have them: in other encodings, closed early, full, narrow; and texts that look like markup."""

import errno
import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.text import Text

from cats_llm import bundled
from cats_llm.calibration.profile import Profile
from cats_llm.cli import output, streams
from cats_llm.cli.main import main
from cats_llm.errors import CatsError
from cats_llm.evaluation.batch import out_of_memory

MODEL = str(bundled.model_path())
ODD = "[bold]caf\u00e9[/oops] :smile: \u65e5\u672c [x"


@pytest.fixture
def stdout(monkeypatch):
    """Make stdout a file, in an encoding, that can be read afterwards."""

    def redirect(encoding):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        return stream.buffer

    return redirect


@pytest.fixture
def stdin(monkeypatch):
    def redirect(content, encoding="utf-8", errors="strict"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding=encoding, errors=errors))

    return redirect


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "caf\u00e9 \u65e5\u672c"),
        ("cp1252", "caf\u00e9 \\u65e5\\u672c"),
        ("ascii", "caf\\xe9 \\u65e5\\u672c"),
        ("utf-16", "caf\u00e9 \u65e5\u672c"),
    ],
)
def test_what_an_encoding_lacks_is_printed_as_its_number(stdout, encoding, shown):
    written = stdout(encoding)
    prompt = "caf\u00e9 \u65e5\u672c"
    assert main(["generate", MODEL, "--prompt", prompt, "--max-new-tokens", "2"]) == 0
    assert written.getvalue().decode(encoding).replace("\ufeff", "").startswith(shown)


@pytest.mark.parametrize("command", [["--help"], ["eval", "--help"], ["env"], ["inspect", MODEL, "--no-measure"]])
def test_help_and_tables_in_ascii(stdout, command):
    written = stdout("ascii")
    assert main(command) == 0
    assert len(written.getvalue().decode("ascii").splitlines()) > 3


def test_errors_in_ascii(monkeypatch):
    stderr = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stderr)
    assert main(["inspect", "./caf\u00e9"]) == 1
    assert stderr.buffer.getvalue() == b"error: there is no folder ./caf\\xe9.\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((b"caf\xe9 au lait",), r"error: the prompt on stdin is not UTF-8 text \(byte 3\)"),
        ((b"caf\xe9", "utf-8", "surrogateescape"), r"error: the prompt is not UTF-8 text \(from character 4 on\)"),
        ((b"\x8d", "cp1252"), "error: the prompt on stdin is not CP1252 text"),
        ((b"",), "error: the prompt is empty"),
    ],
)
def test_a_prompt_from_stdin_that_is_no_text(stdin, capsys, content, message):
    stdin(*content)
    assert main(["generate", MODEL, "--prompt", "-"]) == 1
    error = capsys.readouterr().err
    assert re.match(message, error), error
    assert error.count("\n") == 1


def test_a_prompt_from_stdin(stdin, capsys, monkeypatch):
    stdin(b"\xef\xbb\xbfOnce upon a time\r\n")  # as PowerShell pipes it
    assert main(["generate", MODEL, "--prompt", "-", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time")
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", MODEL, "--prompt", "-"]) == 1
    assert "stdin is closed" in capsys.readouterr().err


def test_arguments_that_are_not_utf8(capsys, tmp_path):
    prompt = os.fsdecode(b"caf\xe9")
    assert main(["generate", MODEL, "--prompt", prompt]) == 1
    assert "error: the prompt is not UTF-8 text (from character 4 on)" in capsys.readouterr().err
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe9l")
    os.symlink(MODEL, folder)
    for command in (["inspect", folder], ["generate", folder, "--prompt", "x"], ["inspect", folder + "/nope"]):
        code = main(command)
        printed = capsys.readouterr()
        assert code in (0, 1)
        assert printed.err.count("\n") <= 2
        assert "Traceback" not in printed.err
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9sult.json"))
    assert main(["inspect", MODEL, "--no-measure", "--json", str(out)]) == 0
    json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture
def broken_stdout(monkeypatch, capsys):
    """Run a command with stdout as an open file; returns its exit code, and what it said on stderr."""

    def run(stream, command):
        with monkeypatch.context() as patch, stream:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(output.console, "quiet", False)  # which rich changes when nobody reads
            code = main(command)
            stream.flush()  # as Python does in the end
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "command", [["--help"], ["env"], ["generate", MODEL, "--prompt", "x", "--max-new-tokens", "9"]]
)
def test_output_that_nobody_reads_ends_the_command_in_silence(broken_stdout, command):
    read, write = os.pipe()
    os.close(read)
    assert broken_stdout(io.TextIOWrapper(io.FileIO(write, "wb"), encoding="utf-8"), command) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("command", [["--help"], ["env"], ["report", "--help"]])
def test_output_to_a_full_disk_is_one_sentence(broken_stdout, command):
    code, error = broken_stdout(io.TextIOWrapper(io.FileIO("/dev/full", "wb")), command)
    assert (code, error) == (1, "error: could not read or write: No space left on device.\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_process_ends_without_complaint():
    """What Python itself would say when it closes its streams."""
    with Path("/dev/full").open("w") as full:
        line = [Path(sys.executable).parent / "cats", "--help"]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: could not read or write: No space left on device.\n")


def test_closed_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["env"]) == 0
    assert main(["inspect", "./nope"]) == 1


def test_texts_of_users_are_printed_as_they_are(capsys, tmp_path):
    folder = tmp_path / "[bold]m[" / ":smile: [x]"
    folder.parent.mkdir()
    folder.symlink_to(MODEL)
    assert main(["inspect", str(folder), "--no-measure"]) == 0
    assert capsys.readouterr().out.startswith(f"{folder}: ")
    assert main(["inspect", f"./{ODD}"]) == 1
    assert capsys.readouterr().err == f"error: there is no folder ./{ODD}.\n"
    rows = output.table(ODD, "[red]n")
    rows.add_row(ODD, ":x:")
    output.show(rows)
    output.show(ODD)
    output.show(Text(ODD, "bold"))
    printed = capsys.readouterr().out
    assert printed.count(ODD) == 4
    assert "[red]n" in printed
    assert ":x:" in printed


def test_narrow_terminals_lose_nothing():
    values = ["a_rather_long_name_of_a_variant_of_a_model", "1234567.8901234", "12345.678 ± 0.123"]
    rows = output.table("variant", "perplexity", "difference")
    rows.add_row(*values)
    for width in (40, 12, 1):
        console = Console(file=io.StringIO(), width=width, markup=False)
        console.print(rows)
        printed = console.file.getvalue()
        assert "\u2026" not in printed, f"cut off at {width} columns"
        if width == 40:
            assert sorted(c for c in printed if c.isalnum()) == sorted(
                c for value in [*values, "variant", "perplexity", "difference"] for c in value if c.isalnum()
            )


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"COLUMNS": "40"}, {"COLUMNS": "x"}])
def test_terminals_of_all_kinds(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, markup=False)
        rows = output.table("a", "b")
        rows.add_row("x", "y")
        console.print(rows)
        assert "x" in console.file.getvalue()


def test_warnings_of_the_log_are_printed_once(capsys, monkeypatch):
    def warn():
        logging.getLogger("cats_llm.anything").warning("%s rows", 3)
        logging.getLogger("cats_llm.anything").info("not this")

    with streams.show_log():
        warn()
    assert capsys.readouterr().err == "warning: 3 rows\n"
    monkeypatch.setenv("RANK", "1")
    with streams.show_log():
        warn()
    assert capsys.readouterr().err == "", "every process says the same"


FAULTS = {
    "GPU memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "out of memory (CUDA"),
    "CUDA": (RuntimeError("CUDA error: out of memory"), "out of memory"),
    "memory": (MemoryError(), "out of memory (MemoryError)"),
    "disk": (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "could not read or write /x/y: No space left"),
    "name": (UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed"), r"'caf\udce9' is no UTF-8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_machine_are_one_sentence(monkeypatch, capsys, fault):
    error, message = FAULTS[fault]

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("cats_llm.loading.load_model", fail)
    assert main(["generate", MODEL, "--prompt", "x"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}"), printed
    assert printed.count("\n") == 1


def test_memory_of_the_machine():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.parametrize("error", [TypeError("ours"), OSError("without a number"), RuntimeError("ours")])
def test_faults_of_ours_are_seen_whole(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("cats_llm.loading.load_model", fail)
    with pytest.raises(type(error), match=str(error)):
        main(["generate", MODEL, "--prompt", "x"])


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cats_llm.loading.load_model", interrupt)
    assert main(["generate", MODEL, "--prompt", "x"]) == 130
    assert capsys.readouterr().err.strip() == "error: interrupted; no output was written."


def test_profiles_under_names_that_are_not_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/profil\xe9.safetensors")
    Path(path).write_bytes(b"x")
    with pytest.raises(CatsError, match="is not UTF-8, and safetensors opens no other; rename it"):
        Profile.load(path)
