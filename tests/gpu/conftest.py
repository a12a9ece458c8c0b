"""Tests that need a GPU: skipped where there is none, but `make gpu-check` fails there."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    if torch.cuda.is_available():
        return
    fault = f"torch {torch.__version__} sees no CUDA device"
    if os.environ.get("MEMSHARE_GPU_CHECK"):
        pytest.fail(fault)
    pytest.skip(fault)
