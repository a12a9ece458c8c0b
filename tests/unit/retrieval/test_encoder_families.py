"""The families that retrievers on the hub are made of, in the folders that they come in.

Each as sentence-transformers saves or saved it: vectors are the same, training goes through, and
what comes of it is the same to sentence-transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

from memshare.config import EncoderConfig, LoRAConfig, TrainingConfig
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.errors import EncoderError
from memshare.training.batching import Batches
from memshare.training.gather import World
from memshare.training.lora import merge_adapters
from memshare.training.select import select
from memshare.training.step import ContrastiveStep
from memshare.training.towers import prepare
from tests.tiny import tiny_encoder
from tests.training_data import examples

TEXTS = ["How do I bake bread?", "x", "", " two  spaces\n", "naïve — “quotes” 🙂", "over; " * 99]
WIDTH: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LONG: Any = {**WIDTH, "intermediate_size": 64, "max_position_embeddings": 66}
GEMMA: Any = {
    **LONG, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16, "pad_token_id": 0,
    "use_bidirectional_attention": True, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
FAMILIES: dict[str, Callable[[int], Any]] = {
    "mpnet": lambda size: tf.MPNetModel(tf.MPNetConfig(vocab_size=size, **LONG)),
    "distilbert": lambda size: tf.DistilBertModel(
        tf.DistilBertConfig(vocab_size=size, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    ),
    "xlm-roberta": lambda size: tf.XLMRobertaModel(
        tf.XLMRobertaConfig(vocab_size=size, pad_token_id=0, **LONG)
    ),
    "modernbert": lambda size: tf.ModernBertModel(
        tf.ModernBertConfig(vocab_size=size, local_attention=8, pad_token_id=0, bos_token_id=2,
                            eos_token_id=3, cls_token_id=2, sep_token_id=3, **LONG)
    ),
    "nomic": lambda size: tf.NomicBertModel(tf.NomicBertConfig(vocab_size=size, **LONG)),
    "t5": lambda size: tf.T5EncoderModel(
        tf.T5Config(vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ),
    "gemma": lambda size: tf.Gemma3TextModel(tf.Gemma3TextConfig(vocab_size=size, **GEMMA)),
}  # fmt: skip
PLAIN = torch.nn.Identity()
DENSE: dict[str, Callable[[], list[Any]]] = {
    "t5": lambda: [Dense(32, 48, bias=False, activation_function=PLAIN)],  # as GTR
    "gemma": lambda: [Dense(32, 64, False, PLAIN), Dense(64, 40, False, PLAIN)],  # EmbeddingGemma
    "mpnet": lambda: [Dense(32, 32)],  # as LaBSE: with tanh
}


def published(family: str, path: Path) -> Path:
    """The folder of a random encoder of this family, whose every weight counts."""
    tokenizer = Encoder.from_folder(tiny_encoder(path / "bert")).tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = FAMILIES[family](len(tokenizer))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        after = DENSE.get(family, list)()
    model.save_pretrained(path / "bare")
    tokenizer.save_pretrained(path / "bare")
    modules = [Transformer(str(path / "bare"), max_seq_length=40), Pooling(32, "mean")]
    theirs = SentenceTransformer(
        modules=[*modules, *after, Normalize()], device="cpu", prompts={"query": "q: "}
    )
    theirs.save(str(path / "published"))
    return path / "published"


def peer(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def close(left: Any, right: Any) -> None:
    np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "lora"), [*((family, False) for family in FAMILIES), ("gemma", True), ("t5", True)]
)
def test_it_is_read_learns_and_is_written(family: str, lora: bool, tmp_path: Path) -> None:
    folder = published(family, tmp_path)
    ours = Encoder.from_folder(folder, device="cpu")
    before, theirs = ours.encode_queries(TEXTS), peer(folder)
    assert before.shape[1] == ours.dim == theirs.get_embedding_dimension()
    close(before, theirs.encode_query(TEXTS))
    close(ours.encode(TEXTS, side="memory"), theirs.encode_document(TEXTS))

    config = TrainingConfig(
        batch_size=4, batch_tokens=64, graph_tokens=128, dropout=False,
        lora=LoRAConfig(enabled=lora, r=2, dropout=0.0),
    )  # fmt: skip
    prepare(ours, config, seed=3)
    data = Batches(select(examples(8), config).items, ours, global_batch=8, seed=0)
    step = ContrastiveStep(ours, data.table, config, World(ours.device), seed=0)
    for number in range(2):  # of adapters, half is zero at first
        step.backward(data.batch(0), number)
        learning = {n: p for n, p in ours.model.named_parameters() if p.requires_grad}
        assert [name for name, p in learning.items() if p.grad is None] == []
        assert family not in DENSE or any("dense_after_pooling" in name for name in learning)
        with torch.no_grad():
            for parameter in learning.values():
                parameter -= parameter.grad
                parameter.grad = None
    after = ours.encode_queries(TEXTS)
    merge_adapters(ours)
    close(ours.encode_queries(TEXTS), after)
    assert np.abs(after - before).max() > 1e-3

    ours.save(tmp_path / "trained")
    close(peer(tmp_path / "trained").encode_query(TEXTS), after)
    again = Encoder.from_folder(tmp_path / "trained", device="cpu")
    close(again.encode_queries(TEXTS), after)
    assert again.query_fingerprint() == ours.query_fingerprint()


def test_dense_layers_are_part_of_a_tower(tmp_path: Path) -> None:
    ours = Encoder.from_folder(published("gemma", tmp_path), device="cpu")
    first = ours.memory_fingerprint()
    ours.split()
    with torch.no_grad():
        ours.tower("query").dense_after_pooling[1].linear.weight.add_(1.0)
    assert ours.memory_fingerprint() == first != ours.query_fingerprint()
    ours.save(tmp_path / "two")
    theirs, again = peer(tmp_path / "two"), Encoder.from_folder(tmp_path / "two", device="cpu")
    close(theirs.encode_query(TEXTS), ours.encode_queries(TEXTS))
    close(theirs.encode_document(TEXTS), ours.encode(TEXTS, side="memory"))
    close(again.encode(TEXTS, side="memory"), ours.encode(TEXTS, side="memory"))
    names = {key for key in ours.model.state_dict() if "dense" in key}
    assert len(names) == 4
    weights = json.loads((tmp_path / "two" / "query_2_Dense" / "config.json").read_text())
    assert (weights["in_features"], weights["out_features"]) == (32, 64)


def test_an_activation_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    folder = published("mpnet", tmp_path)
    before = Encoder.from_folder(folder).query_fingerprint()
    path = folder / "2_Dense" / "config.json"
    config = json.loads(path.read_text())
    plain = "torch.nn.modules.linear.Identity"
    path.write_text(json.dumps({**config, "activation_function": plain}))
    assert Encoder.from_folder(folder).query_fingerprint() != before


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"activation_function": "custom.Swish"}, "activation_function is custom.Swish; known"),
        ({"use_residual": True}, "with use_residual; known, without it"),
        ({"module_input_name": "token_embeddings"}, "module_input_name token_embeddings"),
        ({"in_features": 31}, "can't be loaded as a Dense module"),
        ({"in_features": None}, "can't be loaded as a Dense module"),
    ],
)
def test_dense_layers_that_are_refused(tmp_path: Path, wrong: Any, told: str) -> None:
    folder = published("mpnet", tmp_path)
    path = folder / "2_Dense" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    with pytest.raises(EncoderError, match=told):
        Encoder.from_folder(folder)


def test_dense_layers_that_do_not_fit_or_are_pickled_are_refused(tmp_path: Path) -> None:
    folder = published("gemma", tmp_path)
    modules = folder / "modules.json"
    whole = json.loads(modules.read_text())
    modules.write_text(json.dumps([*whole[:2], whole[3], whole[4]]))
    with pytest.raises(EncoderError, match="3_Dense: takes 64 numbers, and there are 32"):
        Encoder.from_folder(folder)
    modules.write_text(json.dumps(whole))
    (folder / "3_Dense" / "model.safetensors").rename(folder / "3_Dense" / "pytorch_model.bin")
    with pytest.raises(EncoderError, match=r"3_Dense: no weights as safetensors \(pickled"):
        Encoder.from_folder(folder)


def test_lengths_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    """Where a folder does not say how long texts may be they were cut at 256 tokens."""
    folder = published("xlm-roberta", tmp_path)
    about, tokenizer = folder / "sentence_bert_config.json", folder / "tokenizer_config.json"
    told = json.loads(tokenizer.read_text())
    config = json.loads((folder / "config.json").read_text())
    weights = tf.XLMRobertaModel(tf.XLMRobertaConfig(**{**config, "max_position_embeddings": 402}))
    weights.save_pretrained(folder)
    about.unlink()
    for length, expected in ((None, 401), (10**30, 401), (30, 30)):
        tokenizer.write_text(json.dumps({**told, "model_max_length": length or 10**30}))
        if length is None:
            tokenizer.write_text(
                json.dumps({k: v for k, v in told.items() if k != "model_max_length"})
            )
        ours = Encoder.load(EncoderConfig(model=str(folder), device="cpu"))
        assert ours.max_length == expected
    old = folder / "sentence_xlm-roberta_config.json"  # as before version 2
    old.write_text('{"max_seq_length": 20}')
    assert Encoder.from_folder(folder).max_length == peer(folder).max_seq_length == 20


def test_a_language_model_is_pooled_as_its_folder_says(tmp_path: Path) -> None:
    folder = published("gemma", tmp_path)
    path = folder / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "architectures": ["Gemma3ForCausalLM"]})
    )
    close(Encoder.from_folder(folder).encode_queries(TEXTS), peer(folder).encode_query(TEXTS))
    for name in ("modules.json", "config_sentence_transformers.json"):
        (folder / name).unlink()
    with pytest.raises(EncoderError, match="language model, not an encoder"):
        Encoder.from_folder(folder)


def test_an_encoder_tells_how_it_reads_texts(tmp_path: Path) -> None:
    folder = published("distilbert", tmp_path)
    assert str(Encoder.from_folder(folder)) == (
        "encoder: distilbert, 32 dimensions, mean pooling, at most 40 tokens, 'q: ' before "
        "queries and '' before memories"
    )
    own = {"pooling": "mean", "query_prefix": "q: ", "memory_prefix": "m: "}
    path: Any = {"model": str(folder), "device": "cpu"}
    assert "set" not in str(Encoder.load(EncoderConfig(**path, **own)))
    other = str(
        Encoder.load(EncoderConfig(**path, **{**own, "pooling": "cls", "query_prefix": ""}))
    )
    assert "; encoder.pooling is set, and its folder has 'mean'; encoder.query_pr" in other
    assert other.endswith("encoder.query_prefix is set, and its folder has 'q: '")
    modules, about = folder / "modules.json", folder / "config_sentence_transformers.json"
    modules.write_text(json.dumps(json.loads(modules.read_text())[:2]))
    about.write_text(json.dumps({"similarity_fn_name": "cosine"}))
    assert "dot product" not in str(Encoder.from_folder(folder))
    about.write_text(json.dumps({"similarity_fn_name": "dot"}))
    assert "by dot product; here they are made unit vectors" in str(Encoder.from_folder(folder))
    about.write_text(json.dumps({"prompts": {"sts_query": "s: ", "web_query": "w: "}}))
    told = "its folder's prompts sts_query, web_query are not used; encoder.query_prefix and"
    assert told in str(Encoder.from_folder(folder))
