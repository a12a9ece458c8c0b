"""The training step on a GPU: equal to the CPU's in float32, close to it in bf16, cached or not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memshare.config import EncoderConfig, TrainingConfig
from memshare.retrieval import packing
from memshare.retrieval.encoder import Encoder
from memshare.training import checkpoint
from memshare.training.batching import Batches
from memshare.training.checkpoint import TrainState
from memshare.training.flops import bf16_peak
from memshare.training.gather import World
from memshare.training.optimizer import make_optimizer, update
from memshare.training.select import select
from memshare.training.step import ContrastiveStep
from memshare.training.towers import prepare
from tests.tiny import tiny_decoder, tiny_encoder
from tests.training_data import examples

pytestmark = pytest.mark.gpu

Autocast = Callable[[], AbstractContextManager[object]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny", dim=128)


def bf16() -> AbstractContextManager[object]:
    return torch.autocast("cuda", dtype=torch.bfloat16)


def one_step(
    folder: Path, device: str, *, autocast: Autocast = nullcontext, **changes: object
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients, on the CPU, of the first step."""
    settings = {"batch_size": 64, "dropout": False, "batch_tokens": 512, **changes}
    config = TrainingConfig(**settings)  # type: ignore[arg-type]
    encoder = Encoder.from_folder(folder, device=device)
    prepare(encoder, config, seed=0)
    data = Batches(select(examples(64), config).items, encoder, global_batch=64, seed=0)
    world = World(torch.device(encoder.device))
    engine = ContrastiveStep(encoder, data.table, config, world, seed=0, autocast=autocast)
    loss = engine.backward(data.batch(0), 0).loss
    named = encoder.model.named_parameters()
    return loss, {name: p.grad.cpu() for name, p in named if p.grad is not None}


def cosine(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    flat = [torch.cat([side[name].double().reshape(-1) for name in left]) for side in (left, right)]
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0))


def test_fp32_equals_the_cpu(folder: Path) -> None:
    loss, want = one_step(folder, "cpu")
    got_loss, got = one_step(folder, "cuda")
    assert got_loss == pytest.approx(loss, abs=1e-4)
    assert got.keys() == want.keys()
    assert max(float((got[n] - want[n]).abs().max()) for n in want) < 1e-4


def test_bf16_autocast_points_the_same_way_and_keeps_fp32_gradients(folder: Path) -> None:
    loss, want = one_step(folder, "cuda")
    got_loss, got = one_step(folder, "cuda", autocast=bf16)
    assert got_loss == pytest.approx(loss, rel=0.05)
    assert all(gradient.dtype == torch.float32 for gradient in got.values())
    assert cosine(got, want) > 0.98


@pytest.mark.parametrize("autocast", [nullcontext, bf16], ids=["fp32", "bf16"])
def test_cached_equals_kept_with_dropout_replayed(folder: Path, autocast: Autocast) -> None:
    kept_loss, kept = one_step(folder, "cuda", autocast=autocast, dropout=True)
    loss, cached = one_step(folder, "cuda", autocast=autocast, dropout=True, graph_tokens=0)
    assert loss == pytest.approx(kept_loss, rel=1e-3)
    assert cosine(cached, kept) > (0.9999 if autocast is nullcontext else 0.99)


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_texts_without_padding_equal_padded_ones(
    folder: Path, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "qwen3":
        folder = tiny_decoder(tmp_path / family)
    calls, flash = [], packing._flash

    def counted(*how: Any) -> Tensor:
        calls.append(how)
        return flash(*how)

    monkeypatch.setattr(packing, "_flash", counted)
    loss, packed = one_step(folder, "cuda", autocast=bf16)
    assert calls
    monkeypatch.setattr(packing, "_FAMILIES", frozenset())
    padded_loss, padded = one_step(folder, "cuda", autocast=bf16)
    assert loss == pytest.approx(padded_loss, rel=0.02)
    assert cosine(packed, padded) > 0.99


@pytest.mark.parametrize("heads", [4, 2], ids=["own", "shared"])  # of keys and values
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_within_texts_is_one_call_a_text(
    causal: bool, window: int | None, heads: int
) -> None:
    torch.manual_seed(0)
    module = torch.nn.Identity()
    module.is_causal = causal  # type: ignore[assignment]
    lengths = torch.tensor([1, 37, 8, 200])
    borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to("cuda", torch.int32)
    shape = (3, 1, 4, int(lengths.sum()), 32)  # query, key, value of 4 heads
    values = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    found = []
    for inputs in (values.clone(), values.float()):  # float32 has no such kernel
        inputs.requires_grad_()
        query, key, value = inputs
        out, _ = packing.attention(
            module, query, key[:, :heads], value[:, :heads], None, text_lengths=lengths,
            text_borders=borders, sliding_window=window,
        )  # fmt: skip
        out.float().square().sum().backward()
        assert inputs.grad is not None
        found.append((out.float(), inputs.grad.float()))
    for got, want in zip(*found, strict=True):
        assert float((got - want).abs().max()) < 0.05 * float(want.abs().max())


@pytest.mark.parametrize("graph_tokens", [0, 10**6], ids=["cached", "kept"])
def test_compiled_layers_equal_eager_ones(folder: Path, graph_tokens: int) -> None:
    loss, want = one_step(folder, "cuda", autocast=bf16, graph_tokens=graph_tokens)
    got_loss, got = one_step(folder, "cuda", autocast=bf16, graph_tokens=graph_tokens, compile=True)
    assert got_loss == pytest.approx(loss, rel=0.02)
    assert got.keys() == want.keys() and cosine(got, want) > 0.99


def test_encoding_in_bf16_packs_and_is_near_the_cpu(folder: Path) -> None:
    texts = [f"rain and {n} cups of tea " * (1 + n % 7) for n in range(300)]
    want = Encoder.load(EncoderConfig(model=str(folder), device="cpu")).encode(texts)
    encoder = Encoder.load(EncoderConfig(model=str(folder), device="cuda", precision="bf16"))
    got = encoder.encode(texts)
    assert encoder.model.config._attn_implementation == packing.NAME
    assert (got * want).sum(1).min() > 0.995


def test_memory_is_flat_in_the_batch(folder: Path) -> None:
    """Four times the queries: not twice the memory, since graphs are cached."""
    peaks = []
    for count in (512, 2048):
        config = TrainingConfig(batch_size=count, batch_tokens=4096, graph_tokens=0)
        encoder = Encoder.from_folder(folder, device="cuda")
        data = Batches(select(examples(count), config).items, encoder, global_batch=count, seed=0)
        engine = ContrastiveStep(
            encoder, data.table, config, World(torch.device("cuda")), seed=0, autocast=bf16
        )
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine.backward(data.batch(0), 0)
        similarities = 6 * 4 * min(count, 1024) * data.batch(0).docs  # they do grow
        peaks.append(torch.cuda.max_memory_allocated() - before - similarities)
    assert peaks[1] < 2 * max(peaks[0], 2**25)


def test_a_step_knows_the_devices_peak(folder: Path) -> None:
    config = TrainingConfig(batch_size=64, dropout=False)
    encoder = Encoder.from_folder(folder, device="cuda")
    data = Batches(select(examples(64), config).items, encoder, global_batch=64, seed=0)
    world = World(torch.device("cuda"))
    engine = ContrastiveStep(encoder, data.table, config, world, seed=0, autocast=bf16)
    result = engine.backward(data.batch(0), 0)
    assert result.tokens == result.padded  # packed
    assert result.peak == bf16_peak(world.device)


def test_training_learns_and_resumes(folder: Path, tmp_path: Path) -> None:
    config = TrainingConfig(batch_size=32, lr=1e-3)
    encoder = Encoder.from_folder(folder, device="cuda")
    data = Batches(select(examples(64), config).items, encoder, global_batch=32, seed=0)
    engine = ContrastiveStep(
        encoder, data.table, config, World(torch.device("cuda")), seed=0, autocast=bf16
    )
    optimizer = make_optimizer(encoder.model, config)
    losses = []
    for step in range(20):
        losses.append(engine.backward(data.batch(step), step).loss)
        update(optimizer, config.lr, config.max_grad_norm)
    assert losses[-1] < 0.5 * losses[0]
    saved = checkpoint.save(tmp_path, encoder.model, optimizer, TrainState(20, {}, 0, "id"))
    again = Encoder.from_folder(folder, device="cuda")
    other = make_optimizer(again.model, config)
    checkpoint.restore(saved, again.model, other)
    engine = ContrastiveStep(
        again, data.table, config, World(torch.device("cuda")), seed=0, autocast=bf16
    )
    assert engine.backward(data.batch(20), 20).loss < 0.5 * losses[0]
    assert update(other, config.lr, config.max_grad_norm) > 0
