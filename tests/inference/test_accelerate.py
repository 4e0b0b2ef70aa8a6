"""Runs engine_checks.py and export_checks.py, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("checks", ["engine_checks.py", "export_checks.py"])
def test_other_engines_answer_as_eager_does_or_are_refused(checks):
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    told = subprocess.run(
        [*argv, str(HERE / checks)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=HERE.parents[1],
    )
    assert told.returncode == 0, told.stdout[-5000:]
    assert " passed" in told.stdout
