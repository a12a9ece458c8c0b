"""What a log shows of steps, and what one that ends the training says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memshare.training.step_result import LogInterval, OutOfMemory, StepResult, memory_told


def test_a_gpu_that_is_full_is_told_with_what_to_do() -> None:
    full = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB"
    )
    with pytest.raises(OutOfMemory) as told, memory_told():
        raise full
    assert str(told.value).startswith(
        "CUDA out of memory. Tried to allocate 20.00 GiB. Lower training.graph_tokens, then "
    )
    assert str(told.value).endswith("and run the same command again")  # the loop does nothing else
    assert told.value.__cause__ is full
    with pytest.raises(RuntimeError, match=r"^another$"), memory_told():
        raise RuntimeError("another")


def step(loss: float, **more: Any) -> StepResult:
    given = {"parts": {}, "tokens": 0, "padded": 0, "stop": False, "flops": 0.0} | more
    return StepResult(loss=loss, **given)


def test_a_line_of_the_log_tells_of_all_steps_since_the_last_one() -> None:
    shown = LogInterval()
    shown.add(step(1.0, tokens=100, padded=120, flops=6e12), 1.0)
    shown.add(step(4.0, tokens=50, padded=60, flops=2e12), 4.0)
    shown.add(step(1.0, tokens=300, padded=320, flops=7e12), 5.0)
    want = {
        "loss": 2.0, "tokens_per_second": 45.0, "real_token_share": 0.9,
        "model_tflops_per_second": 1.5,
    }  # fmt: skip
    assert shown.figures() == pytest.approx(want)
    shown.add(step(0.0), 2.0)  # one that had nothing to teach: nothing was encoded
    assert shown.figures() == dict.fromkeys(want, 0.0)


def test_a_line_has_the_parts_of_the_loss_and_the_share_of_the_peak() -> None:
    shown = LogInterval()
    shown.add(step(2.0, parts={"info_nce": 1.0, "kl": 2.0}, flops=3.0, peak=4.0), 1.0)
    shown.add(step(1.0, parts={"info_nce": 0.5, "kl": 1.0}, flops=3.0, peak=4.0), 2.0)
    figures = shown.figures()
    assert (figures["loss"], figures["loss/info_nce"], figures["loss/kl"]) == (1.5, 0.75, 1.5)
    assert figures["mfu"] == 0.5
