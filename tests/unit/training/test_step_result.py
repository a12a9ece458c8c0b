"""What a step that ends the training says."""

from __future__ import annotations

import pytest
import torch

from memshare.training.step_result import OutOfMemory, memory_told


def test_a_gpu_that_is_full_is_told_with_what_to_do() -> None:
    full = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB"
    )
    with pytest.raises(OutOfMemory) as told, memory_told():
        raise full
    assert str(told.value).startswith(
        "CUDA out of memory. Tried to allocate 20.00 GiB. Lower training.graph_tokens, then "
    )
    assert told.value.__cause__ is full
    with pytest.raises(RuntimeError, match=r"^another$"), memory_told():
        raise RuntimeError("another")
