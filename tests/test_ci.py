"""What CI runs, and that browser tests cannot be skipped there unseen."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest_plugins = "pytester"
RUN = Path(__file__).parents[1] / ".ci" / "run"

SKIPPED = """
import pytest

@pytest.mark.browser
@pytest.mark.skipif(True, reason="no Chromium")
def test_by_mark():
    pass

@pytest.mark.browser
def test_by_call():
    pytest.skip("no page")

def test_elsewhere():
    pytest.skip("no GPU")
"""


@pytest.mark.parametrize("ci", [False, True])
def test_a_skipped_browser_test_fails_in_ci_alone(pytester, monkeypatch, ci):
    monkeypatch.delenv("CI", raising=False)
    if ci:
        monkeypatch.setenv("CI", "true")
    pytester.makeini("[pytest]\nmarkers = browser")
    pytester.makeconftest("from browser import pytest_runtest_makereport")
    pytester.makepyfile(SKIPPED)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    if not ci:
        result.assert_outcomes(skipped=3)
        return
    outcomes = result.parseoutcomes()
    assert outcomes.pop("skipped") == 1, "a test without a browser may be skipped"
    assert sum(outcomes.values()) == 2, outcomes
    result.stdout.fnmatch_lines_random(
        ["*a browser test must run. Skipped: no Chromium", "*a browser test must run. Skipped: no page"]
    )


@pytest.mark.skipif(not RUN.exists(), reason="not a clone: .ci is not part of the source distribution")
@pytest.mark.parametrize("there", [False, True])
def test_ci_runs_the_tests_with_a_browser(tmp_path, there):
    """With programs of our own in place of the real ones, which note how they are called."""
    for name in ("make", "apt-get", *(["chromium"] if there else [])):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} $* CI=$CI" >> "{tmp_path}/calls"\n')
        program.chmod(0o755)
    for name in ("bash", "sh", "dirname", "env"):
        (tmp_path / name).symlink_to(shutil.which(name))
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"PATH": str(tmp_path)}
    subprocess.run([str(RUN)], env=environment, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls.pop() == "make test CI=true"
    if there:
        assert calls == [], "Chromium is installed already"
    else:
        assert [call.split()[1] for call in calls] == ["update", "install"]
        assert " chromium " in calls[1]
