"""Freed memory is taken again without asking the system for it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Touch and free 64 MB often: how often did the system have to hand out a page?
MEASURE = """
import resource, sys
import torch
from memshare.training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")
def test_pages_are_taken_once() -> None:
    faults = [
        int(subprocess.check_output([sys.executable, "-c", MEASURE, how]))
        for how in ("default", "keep")
    ]
    assert faults[1] < 100 < faults[0]
