"""What the commands share."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from ich_det2.cli import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(24):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(12 * 2**20).fill_(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_was_freed_is_used_again():
    def faults(way):
        argv = [sys.executable, "-c", FAULTS, way]
        out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        return [int(line) for line in out.split()]

    # 48 MiB are filled with zeros each time, or the first times, until a place is found.
    stock, kept = faults("stock"), faults("kept")
    assert sum(kept[12:]) < sum(stock[12:]) / 4, (stock, kept)
