"""Runs engine_checks.py, in a process of its own."""

import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).with_name("engine_checks.py")


def test_other_engines_answer_as_eager_does_or_are_refused():
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    told = subprocess.run(
        [*argv, str(CHECKS)], capture_output=True, text=True, timeout=600, cwd=CHECKS.parents[2]
    )
    assert told.returncode == 0, told.stdout[-5000:]
    assert " passed" in told.stdout
