"""Texts without padding against the same texts padded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

from memshare.config import LoRAConfig
from memshare.retrieval import packing
from memshare.retrieval.encoder import Encoder, pool_embeddings
from memshare.retrieval.encoder_format import Pooling
from memshare.retrieval.ragged import Ragged
from memshare.training.lora import add_adapters
from tests.tiny import tiny_encoder

LISTS = [[5, 9, 7, 6], [8] * 31, [9, 10, 11, 12, 40, 41, 42], [3], [11, 11]]
ROWS = Ragged.of(LISTS)


def enable(model: Any, **how: bool) -> bool:
    options = {"half": False, "dropout": False, **how}
    return packing.enable([model], torch.device("cpu"), **options)


def gradients(encoder: Encoder, vectors: Tensor) -> dict[str, Tensor]:
    """Those of a sum that weighs every entry of every vector differently."""
    encoder.model.zero_grad(set_to_none=True)
    (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()  # type: ignore[no-untyped-call]
    named = encoder.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("lora", [False, True])
def test_equal_to_padded_texts(tmp_path: Path, pooling: Pooling, lora: bool) -> None:
    encoder = Encoder.from_folder(tiny_encoder(tmp_path / "tiny", pooling=pooling), device="cpu")
    if lora:
        add_adapters(encoder, "query", LoRAConfig(enabled=True, r=4, alpha=8, dropout=0.0), seed=1)
    padded = encoder.embed(encoder.collate(ROWS))
    want = gradients(encoder, padded)
    assert enable(encoder.tower("query"))
    packed = encoder.embed(encoder.pack(ROWS))
    got = gradients(encoder, packed)
    assert torch.allclose(packed, padded, atol=1e-6)
    assert want.keys() == got.keys() and all(("lora" in name) == lora for name in want)
    assert max(float((got[name] - want[name]).abs().max()) for name in want) < 1e-5
    assert max(float(value.abs().max()) for value in want.values()) > 1e-2


def test_a_text_does_not_see_its_neighbours(tmp_path: Path) -> None:
    encoder = Encoder.from_folder(tiny_encoder(tmp_path / "tiny"), device="cpu")
    enable(encoder.model)
    alone = encoder.embed(encoder.pack(Ragged.of(LISTS[2:3])))
    assert torch.allclose(encoder.embed(encoder.pack(ROWS))[2:3], alone, atol=1e-6)


def test_a_model_that_packs_pads_as_before_and_is_saved_as_before(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "tiny")
    encoder = Encoder.from_folder(folder, device="cpu")
    texts = ["tea of rain", "iron", "when the moss is big"]
    before, known = encoder.encode(texts), encoder.query_fingerprint()
    enable(encoder.model)
    assert (encoder.encode(texts) == before).all()
    assert encoder.query_fingerprint() == known
    encoder.save(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (
        folder / "config.json"
    ).read_bytes()
    assert (Encoder.from_folder(tmp_path / "again", device="cpu").encode(texts) == before).all()


@pytest.mark.parametrize(
    "lists", [LISTS, [[5, 1, 7, 1, 1, 6], [8] * 9, [1, 9, 1], [1]]], ids=["texts", "with <pad> in"]
)
def test_positions_of_a_family_that_counts_them_from_its_padding_token(
    lists: list[list[int]],
) -> None:
    """Where a text has that token itself, as one about tokenizers may, it is not counted."""
    torch.manual_seed(3)
    config = RobertaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip
    model = RobertaModel(config, add_pooling_layer=False).eval()
    rows = Ragged.of(lists)
    ids, mask = (torch.from_numpy(part) for part in rows.padded(1))
    want = pool_embeddings(model(ids, attention_mask=mask).last_hidden_state, mask, "mean")
    assert enable(model)
    batch = packing.collate(rows, torch.device("cpu"))
    hidden = packing.forward(model, **batch)
    assert hidden.shape == (len(rows.ids), 32)
    got = torch.nn.functional.normalize(packing.pool(hidden, batch["borders"], "mean"), dim=-1)
    assert torch.allclose(got, want, atol=1e-6)


def test_other_families_are_left_as_they_are() -> None:
    model = DistilBertModel(DistilBertConfig(vocab_size=60, dim=32, n_layers=1, n_heads=4))
    before = copy.deepcopy(model.config.to_dict())
    assert not enable(model)
    assert model.config.to_dict() == before


def test_attention_with_dropout_is_not_packed(tmp_path: Path) -> None:
    model = Encoder.from_folder(tiny_encoder(tmp_path / "tiny"), device="cpu").model
    assert model.config.attention_probs_dropout_prob > 0
    assert not enable(model, dropout=True)
    model.config.attention_probs_dropout_prob = 0.0
    assert enable(model, dropout=True)


def test_a_gpu_packs_in_half_precision_alone(tmp_path: Path) -> None:
    model = Encoder.from_folder(tiny_encoder(tmp_path / "tiny"), device="cpu").model
    gpu = torch.device("cuda")
    assert not packing.enable([model], gpu, half=False, dropout=False)
    assert packing.enable([model], gpu, half=True, dropout=False)
