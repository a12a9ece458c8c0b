"""What the speed benchmarks compare is the same computation, and the code runs without a GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_train
import pytest
import torch
import trainers
from torch._dynamo.exc import TorchDynamoException

from memshare.config import TrainingConfig
from tests.tiny import tiny_encoder


def test_both_sides_have_the_same_loss_and_gradient(tmp_path: Path) -> None:
    setup = trainers.Setup(str(tiny_encoder(tmp_path / "tiny")))
    words = [f"{a}{b}" for a in "abcdefgh" for b in "klmnop"]
    rows = [(w, f"{w} {w[::-1]} {w[0]}", f"{w[1]} {w} a") for w in words[:12]]
    config = TrainingConfig(batch_size=12, dropout=False, batch_tokens=64, graph_tokens=200)
    gradient, loss = trainers.gradient_difference(setup, rows, config)
    assert gradient < 1e-5 and loss < 1e-5


@pytest.fixture
def small_heap() -> Iterator[None]:
    """Garbage collections leave out what was there before, or take most of the time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("small_heap")
def test_the_gpu_benchmark_runs_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch can't compile: the rest stands. (test_towers compiles, half a minute.)"""

    def without_compiler(*args: Any) -> trainers.Run:
        if args[-1].compile:
            raise TorchDynamoException("no compiler")
        return trainers.ours_once(*args)

    monkeypatch.setattr(gpu_train, "ours_once", without_compiler)
    gpu_train.new_encoder(tmp_path, gpu_train.TINY, seed=0)
    setup = trainers.Setup(str(tmp_path), "cpu", bf16=True)
    sizes = {
        "steps": {2: 2, 4: 1}, "mini_batches": (2,), "batch_tokens": 64, "docs": 4, "middle": 5.0,
    }  # fmt: skip
    claims, details = gpu_train.measure(setup, 0, sizes)
    encoding = {"encode_docs_per_second", "encode_docs_per_second_float32"}
    assert claims.keys() == {"speedup_b2", "speedup_b4"} | encoding  # no GPU, no MFU
    assert all(value > 0 for value in claims.values())
    assert details["batch_2"]["ours"]["model_tflops_per_second"] > 0
    assert details["peer_mini_batch"] == 2
    assert details["compile_failed"] == "TorchDynamoException: no compiler"


@pytest.mark.parametrize("words", [[], ["--quick"], ["--device", "cpu"]])
def test_the_gpu_benchmark_refuses_without_a_gpu(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_train.py", *words])
    with pytest.raises(SystemExit, match=r"error: .*--quick"):
        gpu_train.main()
