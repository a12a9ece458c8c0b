"""Canaries: chosen questions on which no generation may be worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memshare.config import Config, GateConfig
from memshare.pool.store import PoolStore
from memshare.records import Memory
from memshare.retrieval.build import build_generation
from memshare.retrieval.canaries import Canary, CanaryError, judge_canaries, read_canaries
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.gate_run import gate_built
from memshare.retrieval.serving import Serving
from tests.retrieving import fill, make_config, open_store
from tests.tiny import tiny_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("canaries") / "encoder")


@pytest.fixture
def config(tmp_path: Path, folder: Path) -> Config:
    return make_config(tmp_path / "run", folder, ("p", "q"))


def deaf(folder: Path) -> Encoder:
    """An encoder that hardly tells texts apart."""
    import torch

    encoder = Encoder.from_folder(folder, device="cpu")
    table = encoder.model.embeddings.word_embeddings.weight
    with torch.no_grad():
        table.copy_(table.mean(dim=0, keepdim=True).expand_as(table))
    return encoder


def write(path: Path, memories: list[Memory]) -> Path:
    rows = [{"pool": m.pool, "question": m.prompt, "relevant": [m.id, "unknown"]} for m in memories]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def serving(store: PoolStore, encoder: Encoder) -> Serving:
    made = Serving.frozen(encoder, ["p", "q"])
    made.catch_up(store)
    return made


def test_a_worse_generation_is_refused_and_an_equal_one_passes(
    config: Config, folder: Path, tmp_path: Path
) -> None:
    good, bad = Encoder.from_folder(folder, device="cpu"), deaf(folder)
    with open_store(config) as store:
        asked = [*fill(store, "p", 30)[:4], *fill(store, "q", 30)[:4]]
        path = write(tmp_path / "canaries.jsonl", asked)
        guarded = config.model_copy(update={"gate": GateConfig(canaries=path)})
        for encoder, passes in ((good, True), (bad, False)):
            built = build_generation(store, config, encoder)
            verdict = gate_built(store, guarded, encoder, built, [], lambda *_: [])
            assert verdict.passed is passes
            assert verdict.record()["canaries"]["questions"] == 8
            assert ("canaries: nDCG@10 against current: -" in verdict.reason) is not passes


def test_a_loss_within_the_margin_passes(config: Config, folder: Path) -> None:
    with open_store(config) as store:
        memories = fill(store, "p", 30)
        canaries = [Canary("p", memory.prompt, (memory.id,)) for memory in memories[:5]]
        rivals = {
            "current": serving(store, Encoder.from_folder(folder, device="cpu")),
            "next": serving(store, deaf(folder)),
        }
        strict = judge_canaries(store, GateConfig(margin=0.0), canaries, rivals)
        loose = judge_canaries(store, GateConfig(margin=1.0), canaries, rivals)
    assert len(strict.failures) == 2 and loose.failures == ()
    assert strict.figures == loose.figures


def test_canaries_without_memories_are_left_out_and_none_left_is_no_pass(
    config: Config, folder: Path
) -> None:
    with open_store(config) as store:
        one, two, three = fill(store, "p", 3)
        canaries = [Canary("p", memory.prompt, (memory.id,)) for memory in (one, two, three)]
        canaries.append(Canary("elsewhere", "a question", (one.id,)))
        rivals = dict.fromkeys(
            ("current", "next"), serving(store, Encoder.from_folder(folder, device="cpu"))
        )
        store.delete(one.id)
        store.hold(two.id)
        left = judge_canaries(store, GateConfig(), canaries, rivals)
        assert left.failures == () and left.figures["questions"] == 1
        store.hold(three.id)
        none = judge_canaries(store, GateConfig(), canaries, rivals)
        assert none.failures == ("none of the 4 canaries has a relevant memory left: renew them",)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has none in it"),
        ('{"pool": "p", "question": "q"}', ":1: KeyError"),
        ('\n{"pool": "p", "question": " ", "relevant": ["a"]}', ":2: .*must be texts"),
        ('{"pool": "p", "question": "q", "relevant": []}', "list of ids"),
        ('{"pool": "p", "question": "q", "relevant": "abc"}', "list of ids"),
        ("[1]", ":1:"),
        ("{", ":1:"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "canaries.jsonl"
    path.write_text(text)
    with pytest.raises(CanaryError, match=problem):
        read_canaries(path)
    with pytest.raises(CanaryError, match="can't be read"):
        read_canaries(tmp_path / "missing")


def test_a_line_ends_with_its_line(tmp_path: Path) -> None:
    """JSON may hold what else Python takes for the end of one: web pages have it."""
    path = tmp_path / "canaries.jsonl"
    path.write_text('{"pool": "p", "question": "a\u2028b\u0085c", "relevant": ["x"]}\n\n')
    assert read_canaries(path) == [Canary("p", "a\u2028b\u0085c", ("x",))]
