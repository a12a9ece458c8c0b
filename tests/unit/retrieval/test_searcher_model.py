"""Random interleavings of write, delete, hold, publish, roll-back and crash against a model.

The model: what is searchable are the living memories that are not held, and what answers is the
generation that CURRENT names, with that generation's encoder, whatever happened before.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from memshare.records import NewMemory
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.publish import activate, unpin
from memshare.retrieval.searcher import Searcher
from tests.retrieving import WORDS, make_config, open_store, publish_now
from tests.tiny import tiny_encoder

texts = st.lists(st.sampled_from(WORDS), min_size=2, max_size=4).map(" ".join)
SECONDS = 30.0


class Served(RuleBasedStateMachine):
    """``alive``: id to (prompt, answer, held); ``made``: generation to its encoder's number."""

    folders: tuple[Path, ...]
    encoders: tuple[Encoder, ...]
    template: Path  # an empty pool's database: migrating each time would take most of the time

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="memshare-model-"))
        self.config = make_config(self.home, self.folders[0], keep=100)
        shutil.copy(self.template, self.home / "pool.db")
        self.store = open_store(self.config)
        self.searcher = Searcher(self.store, self.config).start()
        self.alive: dict[str, tuple[str, str, bool]] = {}
        self.given: list[str] = []
        self.made = {0: 0}
        self.number = 0
        self.pinned = False

    @rule(prompts=st.lists(texts, min_size=1, max_size=3))
    def write(self, prompts: list[str]) -> None:
        new = [NewMemory("p", prompt, f"of {prompt}") for prompt in prompts]
        for memory, result in zip(new, self.store.append(new), strict=True):
            if result.status == "stored":
                self.alive[result.id] = (memory.prompt, memory.answer, False)
                self.given.append(result.id)

    @rule(place=st.integers(0, 5), kind=st.sampled_from(["delete", "hold", "release"]))
    def alter(self, place: int, kind: str) -> None:
        id = self.given[place] if place < len(self.given) else "unknown"
        if getattr(self.store, kind)(id):
            prompt, answer, _ = self.alive.pop(id)
            if kind != "delete":
                self.alive[id] = (prompt, answer, kind == "hold")

    @rule(which=st.integers(0, 1))
    def publish(self, which: int) -> None:
        number = publish_now(self.store, self.config, self.encoders[which])
        self.made[number] = which
        if not self.pinned:
            self.number = number

    @rule(place=st.integers(0, 5))
    def roll(self, place: int) -> None:
        """Back or forward to any generation there is, which pins it."""
        published = sorted(set(self.made) - {0})
        if published:
            self.number, self.pinned = published[place % len(published)], True
            activate(self.config.generations_dir, "main", self.number)

    @rule()
    def let_go(self) -> None:
        unpin(self.config.generations_dir, "main")
        self.pinned = False

    @rule()
    def crash(self) -> None:
        """All that a searcher knows is derived: a new one must come to the same."""
        self.searcher.close()
        self.searcher = Searcher(self.store, self.config).start()

    @invariant()
    def answers_like_the_model(self) -> None:
        self.searcher.wait_ready(SECONDS)
        deadline = time.monotonic() + SECONDS
        while self.searcher.stats().generation != self.number:
            assert time.monotonic() < deadline, self.searcher.stats()
            time.sleep(0.005)
        self.searcher.wait_visible("p", self.store.last_seq("p"), SECONDS)
        answer = self.searcher.search("p", "green river", 100)
        assert answer.generation == self.number
        searchable = {id: row for id, row in self.alive.items() if not row[2]}
        found = [hit.id for hit in answer.hits]
        assert sorted(found) == sorted(searchable)
        if found:
            encoder = self.encoders[self.made[self.number]]
            pairs = [searchable[id][:2] for id in found]
            own = encoder.encode_memories(pairs) @ encoder.encode_queries(["green river"])[0]
            similarities = [hit.similarity for hit in answer.hits]
            np.testing.assert_allclose(similarities, own, atol=1e-4)
            assert similarities == sorted(similarities, reverse=True)

    def teardown(self) -> None:
        self.searcher.close()
        self.store.close()
        shutil.rmtree(self.home)


def test_the_searcher_behaves_like_the_model(tmp_path: Path) -> None:
    made = tuple(tiny_encoder(tmp_path / str(seed), seed=seed) for seed in range(2))
    with open_store(make_config(tmp_path / "empty", made[0])):
        pass

    class Here(Served):
        folders = made
        encoders = tuple(Encoder.from_folder(folder, device="cpu") for folder in made)
        template = tmp_path / "empty" / "pool.db"

    run_state_machine_as_test(
        Here, settings=settings(max_examples=12, stateful_step_count=10, deadline=None)
    )
