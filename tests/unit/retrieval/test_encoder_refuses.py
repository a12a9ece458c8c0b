"""Encoders that are refused: missing, damaged or of another kind, each with what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

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
    told = EncoderConfig(model=str(tmp_path / "lm"), pooling="mean", device="cpu")
    assert Encoder.load(told).pooling == "mean"  # whoever says so means it
    image = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.ViTModel(image).save_pretrained(tmp_path / "image")
    with pytest.raises(EncoderError, match="image: "):
        Encoder.from_folder(tmp_path / "image")
    (folder / "config.json").write_text("{")
    with pytest.raises(EncoderError, match=r"config\.json: not JSON .*the folder is damaged"):
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
    pooling.write_text('{"embedding_dimension": 32, "pooling_mode": "mean"}')
    Encoder.from_folder(folder)
    whole = json.loads((folder / "modules.json").read_text())
    cnn = {"idx": 3, "name": "3", "path": "3_CNN", "type": "sentence_transformers.models.CNN"}
    own = {**whole[0], "type": "custom_st.Transformer"}
    for modules, told in (
        ([*whole, cnn], "has a CNN module"),
        ([own, *whole[1:]], r"custom_st\.Transformer is code of its own"),  # as jina-embeddings-v3
        ([whole[0], whole[2]], "its modules are Transformer, Normalize; "),
        ([whole[0], whole[2], whole[1]], "its modules are Transformer, Normalize, Pooling; "),
    ):
        (folder / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(EncoderError, match=told):
            Encoder.from_folder(folder)
    (folder / "modules.json").write_text(json.dumps(whole))
    (folder / "2_Normalize" / "config.json").write_text('{"module_input_name": "token_embeddings"}')
    with pytest.raises(EncoderError, match="Normalize module has module_input_name token_embed"):
        Encoder.from_folder(folder)


@pytest.mark.parametrize(
    ("about", "told"),
    [
        ({"tokenizer_args": {"add_special_tokens": False}}, "sets tokenizer_args {'add_special"),
        ({"config_kwargs": {"is_causal": False}}, "sets config_kwargs {'is_causal': False}"),
        ({"query_length": 8}, "sets query_length 8"),
        ({"transformer_task": "fill-mask"}, "a model for fill-mask"),
        (
            {"modality_config": {"text": {"method": "get_text_features",
                                          "method_output_name": "pooler_output"}}},
            "takes {'method': 'get_text_features'",
        ),
    ],
)  # fmt: skip
def test_texts_that_are_read_otherwise_are_refused(folder: Path, about: Any, told: str) -> None:
    """Nothing of it was looked at: the vectors were others than sentence-transformers'."""
    path = folder / "sentence_bert_config.json"
    harmless = {"model_args": {"add_pooling_layer": False, "trust_remote_code": True}}
    path.write_text(json.dumps({"max_seq_length": 64, **harmless}))
    Encoder.from_folder(folder)
    path.write_text(json.dumps({"max_seq_length": 64, **about}))
    with pytest.raises(EncoderError, match=told):
        Encoder.from_folder(folder)


def test_vectors_that_are_cut_are_refused(folder: Path) -> None:
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncate_dim": 16}))
    with pytest.raises(EncoderError, match="to 16 dimensions; take truncate_dim out of"):
        Encoder.from_folder(folder)


@pytest.mark.parametrize(
    ("family", "told"), [("bert", "if transformers' own bert computes"), ("new", "has no new")]
)
def test_a_models_own_code_is_neither_run_nor_passed_over(
    folder: Path, family: str, told: str
) -> None:
    """Nor does anything ask at the terminal whether to run it."""
    path = folder / "config.json"
    own = {"model_type": family, "auto_map": {"AutoModel": "modeling_new.NewModel"}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    (folder / "modeling_new.py").write_text("raise SystemExit('was run')")
    with pytest.raises(
        EncoderError, match=rf"modeling_new\.NewModel\), which is never run; .*{told}"
    ):
        Encoder.from_folder(folder)


def test_adapters_alone_and_models_of_more_than_texts_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(EncoderError, match="holds adapters"):
        Encoder.from_folder(folder)
    tokenizer = folder / "tokenizer.json", folder / "tokenizer_config.json"
    clip = transformers.CLIPConfig(
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    transformers.CLIPModel(clip).save_pretrained(tmp_path / "clip")
    for path in tokenizer:
        shutil.copy(path, tmp_path / "clip")
    with pytest.raises(EncoderError, match="clip is no model of texts alone"):
        Encoder.from_folder(tmp_path / "clip")
