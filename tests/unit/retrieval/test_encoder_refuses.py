"""Encoders that are refused: missing, damaged or of another kind, each with what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from memshare.config import EncoderConfig
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.encoder_folder import resolve_encoder
from memshare.retrieval.errors import EncoderError
from tests.tiny import tiny_encoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_encoder(tmp_path / "tiny", query_prefix="query: ", memory_prefix="passage: ")


def test_missing_folder_and_unreachable_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = str(tmp_path / "absent")
    with pytest.raises(EncoderError, match="absent: no such folder"):
        resolve_encoder(absent)
    with pytest.raises(EncoderError, match="absent: no such folder"):
        Encoder.load(EncoderConfig(model=absent))
    with pytest.raises(EncoderError, match="runs/encoder: no such encoder folder"):
        Encoder.from_folder("runs/encoder")  # never taken for a hub name
    assert resolve_encoder("some-org/some-model") == "some-org/some-model"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        EncoderError, match="some-org/some-model: neither a folder here nor a model"
    ):
        Encoder.load(EncoderConfig(model="some-org/some-model"))


def test_not_an_encoder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EncoderError, match=r"no config\.json"):
        Encoder.from_folder(tmp_path / "empty")
    lm = transformers.Qwen2Config(
        vocab_size=2000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(lm).save_pretrained(tmp_path / "lm")
    Encoder.from_folder(folder).tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(EncoderError, match="language model, not an encoder"):
        Encoder.from_folder(tmp_path / "lm")
    image = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.ViTModel(image).save_pretrained(tmp_path / "image")
    with pytest.raises(EncoderError, match="image: "):
        Encoder.from_folder(tmp_path / "image")
    (folder / "config.json").write_text("{")
    with pytest.raises(EncoderError, match="can't be loaded as an encoder"):
        Encoder.from_folder(folder)


def test_pickled_torn_and_missing_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(EncoderError, match="can't be loaded as an encoder"):
        Encoder.from_folder(folder)
    weights.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match=r"pickled \.bin files are never read"):
        Encoder.from_folder(folder)
    from safetensors.torch import save_file

    state = {k: v for k, v in model.state_dict().items() if "layer.1.output" not in k}
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match="weights are missing"):
        Encoder.from_folder(folder)


def test_foreign_modules_and_pooling_are_refused(folder: Path) -> None:
    pooling = folder / "1_Pooling" / "config.json"
    for bad in (
        {"word_embedding_dimension": 32, "pooling_mode_max_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"embedding_dimension": 32, "pooling_mode": "weightedmean"},
        {"embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": False},
    ):
        pooling.write_text(json.dumps(bad))
        with pytest.raises(EncoderError, match="only mean, cls and lasttoken over all tokens"):
            Encoder.from_folder(folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules.append(
        {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.Dense"}
    )
    (folder / "modules.json").write_text(json.dumps(modules[:1] + modules[2:]))
    with pytest.raises(EncoderError, match="Dense module"):
        Encoder.from_folder(folder)
