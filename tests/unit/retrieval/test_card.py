"""Model cards: what a published generation says of itself, and what it must not say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer

from memshare import __version__
from memshare.config import Config, TrainingConfig
from memshare.pool.store import PoolStore
from memshare.retrieval.card import CARD, base_model, model_card
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.generation import verify_generation
from memshare.retrieval.text import memory_text
from tests.retrieving import fill, make_config, open_store, publish_now
from tests.tiny import tiny_encoder

TRAINING: dict[str, Any] = {
    "status": "trained", "examples": 9, "pools": {"a|b": 7, "p": 2}, "labels": ["likelihood"],
    "scorers": ["lm@1234"], "round": 3, "steps": 12, "tokens": 3456, "processes": 2, "seed": 5,
    "encoder": "/home/someone/secret-place", "settings": TrainingConfig().model_dump(mode="json"),
    "wandb": {"id": "x", "mode": "online", "dir": "/home", "url": "https://wandb.example/team/x"},
}  # fmt: skip
GATE: dict[str, Any] = {
    "passed": True, "reason": "not worse", "queries": 41,
    "next": {"MRR@10": 0.61234, "nDCG@10": 0.5}, "current": {"MRR@10": 0.25, "nDCG@10": 0.125},
    "bm25": {"MRR@10": 0.375, "nDCG@10": 0.0625},
}  # fmt: skip
METRICS = {"base_model": "org/base", "training": TRAINING, "gate": GATE}


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    folder = tiny_encoder(tmp_path / "tiny", query_prefix="ask: ", memory_prefix='told "me": ')
    return Encoder.from_folder(folder, device="cpu")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path / "run", tmp_path / "tiny", pools=("p", "a|b"))


@pytest.fixture
def store(config: Config) -> Iterator[PoolStore]:
    with open_store(config) as opened:
        fill(opened, "p", 12)
        fill(opened, "a|b", 5, seed=1)
        yield opened


def encoder_folder(config: Config, number: int) -> Path:
    return config.retriever_dir / f"{number:06d}" / "encoder"


def test_a_generations_card_tells_its_data_figures_and_run(
    store: PoolStore, config: Config, encoder: Encoder
) -> None:
    publish_now(store, config, encoder, metrics=METRICS)
    manifest = verify_generation(config.retriever_dir, 1)
    assert f"encoder/{CARD}" in manifest.files
    card = ModelCard.load(encoder_folder(config, 1) / CARD)
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction", "memshare"],
    }
    said = card.text
    assert __version__ in said and "32 dimensions" in said and "main" in said
    assert "on 9 examples\n(7 of pool a\\|b, 2 of pool p)" in said and "round 3" in said
    assert "labelled by likelihood (scorer: lm@1234)" in said
    assert "| p | 12 | 12 |\n" in said and "| a\\|b | 5 | 5 |\n" in said
    assert "On 41 held-out questions" in said
    assert (
        "| this one | 0.6123 | 0.5000 |\n| the one that served before | 0.2500 | 0.1250 |" in said
    )
    assert "| BM25 | 0.3750 | 0.0625 |" in said
    assert "<https://wandb.example/team/x>" in said
    assert "hard_negatives: 3" in said
    assert '"ask: " and "told \\"me\\": "' in said


def test_a_card_holds_no_memory_and_no_path(
    store: PoolStore, config: Config, encoder: Encoder
) -> None:
    publish_now(store, config, encoder, metrics=METRICS)
    said = (encoder_folder(config, 1) / CARD).read_text()
    for pool in config.pools:
        for memory in store.iter(pool):
            assert memory.prompt not in said and memory.answer not in said
            assert memory.id not in said
    assert "secret-place" not in said and "/home" not in said


def test_sentence_transformers_loads_a_published_encoder_by_its_prompts(
    store: PoolStore, config: Config, encoder: Encoder
) -> None:
    publish_now(store, config, encoder, metrics=METRICS)
    theirs = SentenceTransformer(str(encoder_folder(config, 1)), device="cpu")
    questions, pairs = ["river stone 1", "salt"], [("wolf lamp", "green cloud")]
    texts = [memory_text(*pair) for pair in pairs]
    assert np.allclose(theirs.encode_query(questions), encoder.encode_queries(questions), atol=1e-5)
    assert np.allclose(theirs.encode_document(texts), encoder.encode_memories(pairs), atol=1e-5)


def test_an_unchanged_encoder_is_linked_and_its_card_is_new(
    store: PoolStore, config: Config, encoder: Encoder
) -> None:
    publish_now(store, config, encoder, metrics=METRICS)
    gate = {**GATE, "queries": 77}
    publish_now(store, config, encoder, parent=1, metrics={**METRICS, "gate": gate})
    one, two = (encoder_folder(config, number) for number in (1, 2))
    assert (one / "model.safetensors").samefile(two / "model.safetensors")
    assert "On 41 held-out" in (one / CARD).read_text()
    assert "On 77 held-out" in (two / CARD).read_text()
    for number in (1, 2):
        verify_generation(config.retriever_dir, number)


def test_a_trainings_card_tells_of_the_step_that_was_exported(encoder: Encoder) -> None:
    """It has no gate: what it evaluated itself are its figures, and its last step may be none."""
    best, start = ({"MRR@10": m, "nDCG@10": n, "P@1": 0.9} for m, n in ((0.75, 0.5), (0.25, 0.125)))
    told = {"queries": 64, "best_step": 8, "best": best, "start": start, "stopped_early": False}
    said = model_card(encoder, {"training": {**TRAINING, "evaluation": told}})
    assert "12 steps, " in said and "after step 8 of these, the best on 64 held-out queries" in said
    assert "| before the first step | 0.2500 | 0.1250 |\n| after step 8 | 0.7500 | 0.5000 |" in said
    assert "MRR@10" not in model_card(encoder, {"training": {**TRAINING, "evaluation": None}})


def test_a_card_tells_that_its_encoder_had_learned_from_other_texts_before(
    encoder: Encoder, tmp_path: Path
) -> None:
    """They, too, may be in the weights, and no card but the earlier one names them."""
    given = {**TRAINING, "labels": ["given"], "scorers": ["given"], "encoder": str(tmp_path)}
    first = model_card(encoder, {"training": given})
    (tmp_path / CARD).write_text(first)
    second = model_card(encoder, {"training": given})
    assert "had been trained by memshare before" in second and str(tmp_path) not in second
    assert "trained by memshare before" not in first


def test_a_card_tells_that_training_was_in_vain(encoder: Encoder) -> None:
    found = {"MRR@10": 0.5, "nDCG@10": 0.25}
    told = {"queries": 64, "best_step": 0, "best": found, "start": found, "stopped_early": True}
    said = model_card(encoder, {"training": {**TRAINING, "evaluation": told}})
    assert "None of these steps made it better" in said and "after step" not in said
    assert said.count("| 0.5000 | 0.2500 |") == 1


def test_the_card_of_a_training_on_a_data_set_tells_of_texts_not_of_memories(
    encoder: Encoder,
) -> None:
    found = {"MRR@10": 0.5, "nDCG@10": 0.25}
    told = {"queries": 64, "best_step": 8, "best": found, "start": found, "stopped_early": False}
    given = {"labels": ["given"], "scorers": ["given"], "evaluation": told}
    said = model_card(encoder, {"training": {**TRAINING, **given}})
    assert "# Retriever\n" in said and "memor" not in said.replace("memory-sharing", "")
    assert "on 9 examples\n(7 of a\\|b, 2 of p) with\nthe labels that they came with." in said
    assert "all held-out texts of its data set." in said
    mined = {**given, "labels": ["given"], "scorers": ["given:label"]}
    assert "its own judged candidates" in model_card(encoder, {"training": {**TRAINING, **mined}})


@pytest.mark.parametrize(
    "gate",
    [{"passed": True, "reason": "no held-out queries", "queries": 0}, {"passed": True}, None],
)
def test_nothing_is_said_of_what_is_not_known(encoder: Encoder, gate: Any) -> None:
    said = model_card(encoder, {"gate": gate})
    assert "base_model" not in said and "MRR@10" not in said and "Weights & Biases" not in said
    assert "Not trained by memshare" in said
    assert ("None: no held-out queries." in said) == (gate is not None and "reason" in gate)


def test_the_base_model_is_handed_down_by_our_cards_only(encoder: Encoder, tmp_path: Path) -> None:
    assert base_model("org/model") == "org/model"
    assert base_model("all-MiniLM-L6-v2") == "sentence-transformers/all-MiniLM-L6-v2"
    assert base_model("/no/such/folder") is None
    assert base_model(str(tmp_path)) is None  # no card
    (tmp_path / CARD).write_text(model_card(encoder, {"base_model": "org/model"}))
    assert base_model(str(tmp_path)) == "org/model"
    (tmp_path / CARD).write_text("---\nbase_model: org/other\ntags: [bert]\n---\nhello")
    assert base_model(str(tmp_path)) is None
    (tmp_path / CARD).write_text("---\n{broken: [\n---\n")
    assert base_model(str(tmp_path)) is None
