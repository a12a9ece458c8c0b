"""Decoders as encoders, in the form of Qwen3-Embedding's folder: the last token's vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer
from tokenizers import processors
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from memshare.config import EncoderConfig, LoRAConfig, TrainingConfig
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.errors import EncoderError
from memshare.training.batching import Batches
from memshare.training.gather import World
from memshare.training.select import select
from memshare.training.step import ContrastiveStep
from memshare.training.towers import prepare
from tests.tiny_lm import tiny_lm
from tests.training_data import examples

PLAIN: Any = {  # sentence-transformers 6 would put texts into a chat template where there is one
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
TEXTS = ["How do I bake bread?", "x", "", "naïve — “quotes” 🙂", "over; " * 99, "春眠不觉晓"]
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose tokenizer ends each text with ``END``, and nothing more."""
    path = tiny_lm(tmp_path_factory.mktemp("decoder") / "lm")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.convert_tokens_to_ids(END))]
    )
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(path)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(40)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def published(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that sentence-transformers makes of it."""
    path = tmp_path_factory.mktemp("published") / "encoder"
    _peer(folder, **PLAIN).save(str(path))
    return path


def _peer(folder: Path, **how: Any) -> SentenceTransformer:
    bare = Transformer(str(folder), max_seq_length=48, **how)
    return SentenceTransformer(
        modules=[bare, Pooling(32, "lasttoken"), Normalize()], device="cpu",
        prompts={"query": "Instruct: find\nQuery:", "document": ""},
    )  # fmt: skip


def close(left: Any, right: Any, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=0, atol=atol)


def test_vectors_are_those_of_sentence_transformers(published: Path, tmp_path: Path) -> None:
    theirs = SentenceTransformer(str(published), device="cpu")
    ours = Encoder.from_folder(published, device="cpu")
    assert (ours.pooling, ours.max_length, ours.dim) == ("lasttoken", 48, 32)
    close(ours.encode_queries(TEXTS), theirs.encode_query(TEXTS))
    close(ours.encode(TEXTS, side="memory"), theirs.encode_document(TEXTS))
    ours.save(tmp_path / "again")
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    close(again.encode(TEXTS, prompt_name="query"), ours.encode_queries(TEXTS))
    reloaded = Encoder.from_folder(tmp_path / "again", device="cpu")
    assert reloaded.query_fingerprint() == ours.query_fingerprint()


def test_a_text_that_is_cut_keeps_its_last_token(published: Path) -> None:
    ours = Encoder.from_folder(published, device="cpu")
    end = ours.tokenizer.convert_tokens_to_ids(END)
    rows = ours.tokenize_to_ids(TEXTS)
    assert max(map(len, rows)) == 48
    assert {row[-1] for row in rows} == {end}


def test_a_bare_language_model_is_one_where_it_is_told_to_be(folder: Path) -> None:
    config = EncoderConfig(model=str(folder), pooling="lasttoken", max_length=48, device="cpu")
    close(Encoder.load(config).encode(TEXTS), _peer(folder, **PLAIN).encode(TEXTS))


def test_one_that_wants_a_chat_template_is_refused(folder: Path, tmp_path: Path) -> None:
    """Its vectors would be others than ours."""
    _peer(folder).save(str(tmp_path / "chat"))
    with pytest.raises(EncoderError, match="chat template"):
        Encoder.from_folder(tmp_path / "chat")


@pytest.mark.parametrize("lora", [False, True])
def test_it_learns_in_bounded_memory_as_without(published: Path, lora: bool) -> None:
    """Cached gradients are the direct ones; adapters fit its layers without being named."""

    def gradients(graph_tokens: int) -> list[torch.Tensor]:
        encoder = Encoder.from_folder(published, device="cpu")
        config = TrainingConfig(
            batch_size=4, batch_tokens=64, graph_tokens=graph_tokens, dropout=False,
            lora=LoRAConfig(enabled=lora, r=2, dropout=0.0),
        )  # fmt: skip
        prepare(encoder, config, seed=3)
        data = Batches(select(examples(8), config).items, encoder, global_batch=8, seed=0)
        step = ContrastiveStep(encoder, data.table, config, World(encoder.device), seed=0)
        step.backward(data.batch(0), 0)
        return [p.grad for p in encoder.model.parameters() if p.grad is not None]

    cached, direct = gradients(0), gradients(100_000)
    assert len(cached) == len(direct) > 10
    assert max(float(g.abs().max()) for g in direct) > 1e-3
    for one, other in zip(cached, direct, strict=True):
        close(one, other)
