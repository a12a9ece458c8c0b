"""Freed memory is taken again without asking the system for it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Touch and free 64 MB again and again: how many pages did the system hand out at the end?
MEASURE = """
import resource, sys
import torch
from memshare.training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    blocks = [torch.ones(2**20) for _ in range(16)]
    return sum(float(block[0]) for block in blocks)
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")
def test_pages_are_taken_once() -> None:
    # By itself, glibc adapts its threshold to what was freed before: set, it stays where it is.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    faults = [
        int(subprocess.check_output([sys.executable, "-c", MEASURE, how], env=environment))
        for how in ("default", "keep")
    ]
    assert faults[1] < 1000 < faults[0]  # 64 MB are 16,384 pages
