"""FLOPs against torch's own counter of what a forward and backward pass does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memshare.config import LoRAConfig
from memshare.retrieval.dense import Dense
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.ragged import Ragged
from memshare.training.flops import ModelCost, _peak, bf16_peak
from memshare.training.lora import add_adapters
from tests.tiny import tiny_encoder


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return Encoder.from_folder(tiny_encoder(tmp_path / "tiny"), device="cpu")


def counted(encoder: Encoder, tokens: int, *, backward: bool) -> float:
    """What torch counts for two texts of so many tokens, attention's products written out."""
    encoder.model.set_attn_implementation("eager")
    inputs = encoder.collate(Ragged.of([[5] * tokens] * 2))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        vectors = encoder.embed(inputs)
        if backward:
            vectors.sum().backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("tokens", [4, 60])
def test_equal_to_what_torch_counts(encoder: Encoder, tokens: int) -> None:
    cost = ModelCost.of(encoder.model)
    lengths = np.array([tokens, tokens])
    assert cost.step(lengths) == counted(encoder, tokens, backward=True)
    assert cost.forward(lengths) == counted(encoder, tokens, backward=False)


def test_frozen_weights_cost_no_gradient(encoder: Encoder) -> None:
    whole = ModelCost.of(encoder.model)
    assert whole.weights == whole.trainable > 0
    add_adapters(encoder, "query", LoRAConfig(enabled=True, r=2, alpha=4, dropout=0.0), seed=0)
    adapted = ModelCost.of(encoder.tower("query"))
    assert adapted.trainable == adapted.weights - whole.weights > 0
    lengths = np.array([20, 20])
    # torch skips the gradient for the first layer's input: nothing before it learns.
    first = 4 * 2 * 2 * 20 * (3 * encoder.dim * encoder.dim)
    done = counted(encoder, 20, backward=True)
    assert done <= adapted.step(lengths) <= done + first
    assert adapted.step(lengths) < whole.step(lengths)


def test_what_comes_after_the_pooling_is_no_tokens_work(encoder: Encoder) -> None:
    without = ModelCost.of(encoder.model)
    layer = Dense(torch.nn.Linear(encoder.dim, 2 * encoder.dim), torch.nn.Tanh())
    encoder.model.add_module("dense_after_pooling", torch.nn.Sequential(layer))
    assert ModelCost.of(encoder.model) == without


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None), ("NVIDIA RTX A1000", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert _peak(name) == peak


def test_a_cpu_has_no_peak() -> None:
    assert bf16_peak(torch.device("cpu")) is None
