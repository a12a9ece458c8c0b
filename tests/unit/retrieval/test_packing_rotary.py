"""Families with rotary positions without padding: decoders, and ModernBERT with its windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from memshare.retrieval import packing
from memshare.retrieval.encoder import pool_embeddings
from memshare.retrieval.ragged import Ragged

CPU = torch.device("cpu")
LISTS = [[5, 9, 7, 6], [8] * 31, list(range(10, 30)), [3], [11, 11], list(range(3, 12))]
ROWS = Ragged.of(LISTS)
SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
DECODER = {"num_key_value_heads": 2, "head_dim": 8}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(4)
    if family == "modernbert":  # all tokens in each third layer, four to either side in the others
        windows = {"local_attention": 8, "global_attn_every_n_layers": 3}
        return ModernBertModel(ModernBertConfig(**SIZES, **windows, num_hidden_layers=4))
    more = {**DECODER, **(SLIDING if "sliding" in family else {}), "num_hidden_layers": 3}
    if family.startswith("qwen2"):
        return Qwen2Model(Qwen2Config(**SIZES, **more))
    return Qwen3Model(Qwen3Config(**SIZES, **more))


def padded(model: PreTrainedModel, side: str, pooling: Any) -> Tensor:
    """Unit vectors by transformers' own attention and masks."""
    width = max(map(len, LISTS))
    filled = [[0] * (width - len(row)) for row in LISTS]
    rows = [row + gap if side == "right" else gap + row
            for row, gap in zip(LISTS, filled, strict=True)]  # fmt: skip
    ids = torch.tensor(rows)
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    return pool_embeddings(hidden, mask, pooling)


def packed(model: PreTrainedModel, pooling: str, rows: Ragged = ROWS) -> Tensor:
    batch = packing.collate(rows, CPU)
    hidden = packing.forward(model, **batch)
    assert hidden.shape == (len(rows.ids), 32)
    return normalize(packing.pool(hidden, batch["borders"], pooling), dim=-1)


def gradients(model: PreTrainedModel, vectors: Tensor) -> dict[str, Tensor]:
    """Those of a sum that weighs every entry of every vector differently."""
    model.zero_grad(set_to_none=True)
    (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def enable(model: PreTrainedModel, *, dropout: bool = False) -> bool:
    return packing.enable([model], CPU, half=False, dropout=dropout)


@pytest.mark.parametrize(
    ("family", "pooling"),
    [("modernbert", "cls"), ("modernbert", "mean"), ("qwen2", "lasttoken"), ("qwen3", "lasttoken"),
     ("qwen2 sliding", "lasttoken"), ("qwen3 sliding", "mean")],
)  # fmt: skip
def test_equal_to_padded_texts(family: str, pooling: str) -> None:
    model = make(family).eval()
    side = "left" if pooling == "lasttoken" else "right"
    want = padded(model, side, pooling)
    wanted = gradients(model, want)
    assert enable(model)
    got = packed(model, pooling)
    assert torch.allclose(got, want, atol=2e-6)
    found = gradients(model, got)
    assert wanted.keys() == found.keys()
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) < 1e-5
    assert max(float(value.abs().max()) for value in wanted.values()) > 1e-2
    again = padded(model, side, pooling)  # a model that packs still pads
    assert torch.allclose(again, want, atol=2e-6)


@pytest.mark.parametrize("family", ["modernbert", "qwen3"])
def test_a_text_does_not_see_its_neighbours(family: str) -> None:
    model = make(family).eval()
    enable(model)
    alone = packed(model, "mean", Ragged.of(LISTS[2:3]))
    assert torch.allclose(packed(model, "mean")[2:3], alone, atol=2e-6)


def test_windows_and_causality_are_heeded() -> None:
    """Nothing of what a token must not see reaches it, and what is just within sight does."""
    module, size = torch.nn.Module(), 9
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 2, size, 4, generator=generator) for _ in range(2))
    seen = torch.eye(size).repeat(1, 2, 1, 1)  # what comes out are the weights themselves
    far = (torch.arange(size)[:, None] - torch.arange(size)).tolist()
    for causal in (False, True):
        module.is_causal = causal  # type: ignore[assignment]
        for window in (None, 3, 9, 20):
            out, _ = packing.attention(
                module, q, k, seen, None, text_lengths=torch.tensor([size]), sliding_window=window
            )
            for row, weights in enumerate(out[0, :, 0].tolist()):
                for column, weight in enumerate(weights):
                    away = far[row][column]
                    visible = (abs(away) < (window or size)) and not (causal and away < 0)
                    assert (weight > 0) == visible


@pytest.mark.parametrize("family", ["modernbert", "qwen2", "qwen3"])
def test_under_autocast_attention_is_in_half_precision(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the GPU's kernel asks for; rotary positions and norms alone are in float32."""
    model, seen = make(family).eval(), set()
    enable(model)
    whole = packing.scaled_dot_product_attention

    def watched(*inputs: Tensor, **how: Any) -> Tensor:
        seen.update(x.dtype for x in inputs)
        return whole(*inputs, **how)

    monkeypatch.setattr(packing, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", torch.bfloat16):
        half = packed(model, "mean")
    assert seen == {torch.bfloat16}
    assert float((half * packed(model, "mean")).sum(1).min().detach()) > 0.99


def test_a_decoder_that_is_configured_to_see_both_ways_is_padded() -> None:
    model = make("qwen3")
    model.config.is_causal = False
    assert not enable(model)


def test_attention_with_dropout_is_not_packed() -> None:
    model = make("modernbert")
    model.config.attention_dropout = 0.1
    assert not enable(model, dropout=True)
    assert enable(model, dropout=False)
    model.config.attention_dropout = 0.0
    assert enable(model, dropout=True)
