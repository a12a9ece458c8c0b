"""Random interleavings of write, delete, hold, publish, swap, roll-back and kill against a model.

The model: what is searchable are the living memories of the pool that are not held, and what
answers is the generation that CURRENT names, with that generation's encoder. Nothing waits for the
searcher but the rule `settle`, where it must have come to just that. Between, while generations
load and changes are taken in, an answer may be of any moment since the position that the searcher
told before it; never of an earlier one.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from memshare.records import AppendResult, NewMemory, SearchAnswer
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.publish import activate, unpin
from tests.retrieving import WORDS, make_config, open_store, publish_now
from tests.searching import SearcherProcess
from tests.tiny import tiny_encoder

POOLS = ("p", "q")
texts = st.lists(st.sampled_from(WORDS), min_size=2, max_size=4).map(" ".join)
some_pool = st.sampled_from(POOLS)
alterations = st.sampled_from(["delete", "hold", "release"])
delays = st.sampled_from([0.0, 0.003, 0.02, 0.2])  # seconds until a kill
QUESTION = "green river"
SECONDS = 30.0


class Served(RuleBasedStateMachine):
    """``states``: the searchable ids after each change of a pool; ``made``: generation to encoder.

    ``named``: what CURRENT named, in order.
    """

    folders: tuple[Path, ...]
    encoders: tuple[Encoder, ...]
    template: Path  # an empty pool's database: migrating each time would take most of the time
    met: ClassVar[Counter[str]]  # so that the test knows what it has tested

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="memshare-model-"))
        self.config = make_config(self.home, self.folders[0], POOLS, keep=100)
        shutil.copy(self.template, self.home / "pool.db")
        self.store = open_store(self.config)  # the trainer's, and the one to look into
        self.searcher = SearcherProcess(self.config)
        self.texts: dict[str, tuple[str, str]] = {}
        self.pool_of: dict[str, str] = {}
        self.held: set[str] = set()
        self.given: list[str] = []
        self.states: dict[str, list[frozenset[str]]] = {pool: [frozenset()] for pool in POOLS}
        self.told = dict.fromkeys(POOLS, 0)
        self.made = {0: 0}
        self.named = [0]
        self.seen = 0  # place in `named` of the generation that answered last
        self.pinned = False

    # What the model makes of a change

    def took(self, new: list[NewMemory], results: list[AppendResult]) -> None:
        """Results that name an unknown id: also those of a write whose first try was cut off."""
        for memory, result in zip(new, results, strict=True):
            if result.id not in self.texts:
                states = self.states[memory.pool]
                states.append(states[-1] | {result.id})
                assert result.seq == len(states) - 1
                self.texts[result.id] = (memory.prompt, memory.answer)
                self.pool_of[result.id] = memory.pool
                self.given.append(result.id)

    def changed(self, id: str, kind: str) -> None:
        states = self.states[self.pool_of[id]]
        states.append(states[-1] | {id} if kind == "release" else states[-1] - {id})
        (self.held.add if kind == "hold" else self.held.discard)(id)
        if kind == "delete":
            self.given.remove(id)

    def which(self, place: int, kind: str) -> tuple[str, bool]:
        """A memory, and whether that can be done to it."""
        if place >= len(self.given):
            return "unknown", False
        id = self.given[place]
        return id, kind == "delete" or (id in self.held) == (kind == "release")

    # Rules

    @rule(pool=some_pool, prompts=st.lists(texts, min_size=1, max_size=3))
    def write(self, pool: str, prompts: list[str]) -> None:
        new = [NewMemory(pool, prompt, f"of {prompt}") for prompt in prompts]
        self.took(new, self.searcher.call("append", new))

    @rule(place=st.integers(0, 5), kind=alterations)
    def alter(self, place: int, kind: str) -> None:
        id, possible = self.which(place, kind)
        assert self.searcher.call(kind, id) == possible
        if possible:
            self.changed(id, kind)

    @rule(which=st.integers(0, 1))
    def publish(self, which: int) -> None:
        number = publish_now(self.store, self.config, self.encoders[which])
        self.made[number] = which
        if not self.pinned:
            self.named.append(number)

    @rule(place=st.integers(0, 5))
    def roll(self, place: int) -> None:
        """Back or forward to any generation there is, which pins it."""
        published = sorted(set(self.made) - {0})
        if published:
            self.named.append(published[place % len(published)])
            self.pinned = True
            activate(self.config.retriever_dir, self.named[-1])

    @rule()
    def let_go(self) -> None:
        unpin(self.config.retriever_dir)
        self.pinned = False

    @rule(
        doing=st.sampled_from(["nothing", "write", "alter"]), seconds=delays,
        pool=some_pool, prompt=texts, place=st.integers(0, 5), kind=alterations,
    )  # fmt: skip
    def kill(
        self, doing: str, seconds: float, pool: str, prompt: str, place: int, kind: str
    ) -> None:
        """In the middle of something that nobody is told the end of, so it is sent again."""
        new = [NewMemory(pool, f"{prompt} {n}", f"of {prompt}") for n in range(2)]
        id, possible = self.which(place, kind)
        if doing != "nothing":
            self.searcher.begin(*(("append", new) if doing == "write" else (kind, id)))
        time.sleep(seconds)
        self.searcher.kill()
        self.searcher = SearcherProcess(self.config)
        # What was acknowledged before its start is in effect in its first answer.
        self.told = {name: len(states) - 1 for name, states in self.states.items()}
        self.seen = len(self.named) - 1
        if doing == "write":
            results = self.searcher.call("append", new)
            fresh = {result.status for result in results if result.id not in self.texts}
            assert len(fresh) <= 1, "half of a write"
            self.met["writes that outlived their writer"] += "duplicate" in fresh
            self.took(new, results)
        elif doing == "alter":
            self.searcher.call(kind, id)  # False where the first try had been done
            if possible:
                self.changed(id, kind)

    @rule()
    def settle(self) -> None:
        """Left alone, the searcher comes to all that was done."""
        deadline = time.monotonic() + SECONDS
        while self.searcher.call("generation") != self.named[-1]:
            assert time.monotonic() < deadline, f"CURRENT is {self.named[-1]}"
            time.sleep(0.005)
        for pool, states in self.states.items():
            self.searcher.call("wait_visible", pool, len(states) - 1)
            answer = self.answer(pool)
            assert answer.generation == self.named[-1]
            assert {hit.id for hit in answer.hits} == states[-1]
        self.seen = len(self.named) - 1

    # What must hold of every answer

    @invariant()
    def answers_belong_together(self) -> None:
        for pool in POOLS:
            self.answer(pool)

    def answer(self, pool: str) -> SearchAnswer:
        position, answer = self.searcher.call("look", pool, QUESTION, 100)
        states = self.states[pool]
        self.met["answers before a swap that is due"] += answer.generation != self.named[-1]
        self.met["answers before a change that is due"] += position < len(states) - 1
        # What is in effect stays in effect, through swaps and kills.
        position = self.told[pool] = max(position, self.told[pool])
        found = [hit.id for hit in answer.hits]
        assert len(set(found)) == len(found)
        since = states[position:]
        assert frozenset.intersection(*since) <= set(found) <= frozenset.union(*since)
        assert answer.generation in self.named[self.seen :], "back to an older generation"
        self.seen = self.named.index(answer.generation, self.seen)
        self.check_similarities(answer)
        return answer

    def check_similarities(self, answer: SearchAnswer) -> None:
        """They are those of the generation that the answer names."""
        if answer.hits:
            encoder = self.encoders[self.made[answer.generation]]
            pairs = [self.texts[hit.id] for hit in answer.hits]
            own = encoder.encode_memories(pairs) @ encoder.encode_queries([QUESTION])[0]
            similarities = [hit.similarity for hit in answer.hits]
            np.testing.assert_allclose(similarities, own, atol=1e-4)
            assert similarities == sorted(similarities, reverse=True)

    def teardown(self) -> None:
        self.searcher.kill()
        self.store.close()
        shutil.rmtree(self.home)


def test_the_searcher_behaves_like_the_model(tmp_path: Path) -> None:
    made = tuple(tiny_encoder(tmp_path / str(seed), seed=seed) for seed in range(2))
    with open_store(make_config(tmp_path / "empty", made[0], POOLS)):
        pass

    class Here(Served):
        folders = made
        encoders = tuple(Encoder.from_folder(folder, device="cpu") for folder in made)
        template = tmp_path / "empty" / "pool.db"
        met: ClassVar[Counter[str]] = Counter()

    run_state_machine_as_test(
        Here, settings=settings(max_examples=12, stateful_step_count=20, deadline=None)
    )
    print(dict(Here.met))
    assert Here.met["answers before a swap that is due"]
    assert Here.met["answers before a change that is due"]
