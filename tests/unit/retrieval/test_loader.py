"""The loader: swaps under load, and what they keep and free."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from memshare.config import Config, IndexConfig
from memshare.pool.store import PoolStore
from memshare.records import Memory, SearchAnswer
from memshare.retrieval import loader as loader_module
from memshare.retrieval import serving as serving_module
from memshare.retrieval.build import build_generation
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.filters import Filter
from memshare.retrieval.generation import current, current_stamp, load
from memshare.retrieval.placing import Choice, Placer
from memshare.retrieval.publish import activate, publish
from memshare.retrieval.searcher import Searcher
from memshare.retrieval.serving import Serving
from memshare.retrieval.shelf import discard, numbers, stage_current, write_current
from tests.retrieving import (
    fill,
    find,
    ids,
    publish_now,
    sentence,
    serves,
    until,
)  # fmt: skip
from tests.swapping import Expected, mixed


def test_deleted_and_held_memories_stay_away_through_swaps(
    store: PoolStore, config: Config, searcher: Searcher, encoders: list[Encoder]
) -> None:
    memories = fill(store, "p", 12)
    publish_now(store, config, encoders[0])  # 1: knows all twelve
    serves(searcher, 1)
    late = fill(store, "p", 4, seed=1)  # in the delta of both
    gone = [memories[0], late[0]]
    held = [memories[1], late[1]]
    for memory in gone:
        store.delete(memory.id)
    for memory in held:
        store.hold(memory.id)
    away = {memory.id for memory in gone + held}
    everything = {memory.id for memory in memories + late}
    searcher.wait_visible("p", store.last_seq("p"), 60)
    assert set(find(searcher, late[2])) == everything - away
    publish_now(store, config, encoders[1])  # 2: built without them
    serves(searcher, 2)
    assert set(find(searcher, late[2])) == everything - away
    activate(config.retriever_dir, 1)  # back to the one whose index has them
    serves(searcher, 1)
    assert set(find(searcher, late[2])) == everything - away
    for memory in held:
        store.release(memory.id)
    searcher.wait_visible("p", store.last_seq("p"), 60)
    back = everything - {memory.id for memory in gone}
    assert set(find(searcher, late[2])) == back
    activate(config.retriever_dir, 2)
    serves(searcher, 2)
    assert set(find(searcher, late[2])) == back


def load_test(
    store: PoolStore, config: Config, encoders: list[Encoder], swaps: int
) -> tuple[list[str], int, set[int]]:
    """Search and write while generations alternate; problems, searches and generations seen."""
    rng = random.Random(0)
    memories = fill(store, "p", 30)
    questions = [sentence(rng) for _ in range(8)]
    publish_now(store, config, encoders[0], keep=9)
    publish_now(store, config, encoders[1], keep=9)
    triples = [(m.id, m.prompt, m.answer) for m in memories]
    expected = {
        number: Expected.of(encoder, questions, triples)
        for number, encoder in zip((1, 2), encoders, strict=True)
    }
    problems: list[str] = []
    seen: set[int] = set()
    count = 0
    lock = threading.Lock()
    stop = threading.Event()

    def search(searcher: Searcher, seed: int) -> None:
        nonlocal count
        mine = random.Random(seed)
        while not stop.is_set():
            question = mine.randrange(len(questions))
            try:
                answer = searcher.search("p", questions[question], 10, timeout=60)
                problem = mixed(answer, question, expected, 10)
            except Exception as error:
                problem = repr(error)
            with lock:
                count += 1
                seen.add(answer.generation)
                if problem is not None:
                    problems.append(problem)

    def write(searcher: Searcher) -> None:
        """What was visible stays visible, swap or not; what was deleted stays away."""
        deleted: list[str] = []
        for i in range(10**6):
            if stop.is_set():
                return
            kept, dropped = fill(store, "p", 2, seed=1000 + i)
            searcher.wait_visible("p", dropped.seq, 60)
            if not {kept.id, dropped.id} <= set(find(searcher, kept)):
                problems.append(f"write {i} was not visible")
            store.delete(dropped.id)
            deleted.append(dropped.id)
            searcher.wait_visible("p", store.last_seq("p"), 60)
            for _ in range(3):
                found = set(find(searcher, kept))
                if kept.id not in found:
                    problems.append(f"write {i} vanished")
                if found & set(deleted):
                    problems.append(f"a deleted memory came back at write {i}")
                stop.wait(0.02)

    with Searcher(store, config) as searcher:
        serves(searcher, 2)
        threads = [threading.Thread(target=search, args=(searcher, i)) for i in range(3)]
        threads.append(threading.Thread(target=write, args=(searcher,)))
        for thread in threads:
            thread.start()
        try:
            for i in range(swaps):
                activate(config.retriever_dir, 1 + i % 2)
                serves(searcher, 1 + i % 2)
                enough = count + 15
                until(lambda enough=enough: count >= enough)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        until(lambda: len(searcher.stats().swaps) == swaps + 1)
    return problems, count, seen


def test_swaps_under_load_never_mix_generations(
    store: PoolStore, config: Config, encoders: list[Encoder]
) -> None:
    problems, count, seen = load_test(store, config, encoders, swaps=8)
    assert problems == []
    assert count > 100 and seen == {1, 2}


@pytest.fixture
def no_collections() -> Iterator[None]:
    """As in a gateway, which keeps what was there at its start out of garbage collections."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collections")
def test_a_swap_leaves_nothing_of_the_old_one_and_reads_no_known_memory_again(
    store: PoolStore, config: Config, searcher: Searcher, encoders: list[Encoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    memories = fill(store, "p", 30)
    publish_now(store, config, encoders[0])
    serves(searcher, 1)
    serving = searcher._worker.serving
    assert serving is not None
    parts = (serving, serving.encoder.model, serving.shards["p"]._index)
    old = [weakref.ref(part) for part in parts]
    del serving, parts
    read: list[str] = []

    def no_pages(*_: Any, **__: Any) -> Iterator[Memory]:
        read.append("pages")
        return iter(())

    more = fill(store, "p", 5, seed=1)
    store.delete(memories[0].id)
    searcher.wait_visible("p", store.last_seq("p"), 60)
    built = build_generation(store, config, encoders[1])
    monkeypatch.setattr(store, "iter", no_pages)
    publish(
        config.retriever_dir, encoder=encoders[1], metrics={}, parent=1, keep=3,
        **built.parts(),
    )  # fmt: skip
    serves(searcher, 2)
    assert set(find(searcher, more[0])) == {m.id for m in memories[1:] + more}
    agents = {m.id for m in memories[1:] + more if m.agent == "ann"}
    assert set(ids(searcher.search("p", "x", 99, Filter("ann")))) == agents
    assert read == []
    until(lambda: not any(part() for part in old))


def test_a_roll_back_while_the_next_one_is_loaded_holds(
    store: PoolStore, config: Config, searcher: Searcher, encoders: list[Encoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What serves is CURRENT again before the swap, so there is none."""
    memory = fill(store, "p", 5)[0]
    publish_now(store, config, encoders[0])
    serves(searcher, 1)
    home, settle = config.retriever_dir, Serving.settle

    def then_back(serving: Serving, place: Any) -> None:
        settle(serving, place)
        activate(home, 1)

    before = len(searcher.stats().swaps)
    with monkeypatch.context() as patch:
        patch.setattr(Serving, "settle", then_back)
        publish_now(store, config, encoders[1])
        until(lambda: current(home) == 1 and searcher._loader._seen == current_stamp(home))
        assert len(searcher.stats().swaps) == before and find(searcher, memory)
    assert discard(home, 2)  # nobody reads it
    serves(searcher, 1)


def test_a_generation_loaded_aside_moves_up_after_its_swap(
    store: PoolStore, config: Config, searcher: Searcher, encoders: list[Encoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The loader's part; `test_gpu_room.py` has the choice, tests/gpu the move itself."""
    memories = fill(store, "p", 8)
    publish_now(store, config, encoders[0])
    serves(searcher, 1)
    old = weakref.ref(searcher._worker.serving)
    moved: list[tuple[int, str, bool, str]] = []

    def move_up(self: Serving, device: str, place: object) -> None:
        thread = threading.current_thread().name
        moved.append((self.number, device, old() is None, thread))

    monkeypatch.setattr(Serving, "move_up", move_up)
    aside = Choice("aside", "cpu", None, 1000)
    monkeypatch.setattr(Placer, "choose", lambda self, number, files: aside)
    publish_now(store, config, encoders[1])
    serves(searcher, 2)
    until(lambda: moved != [])
    assert moved == [(2, "cpu", True, "searcher-worker")]
    assert len(find(searcher, memories[0])) == 8


def retrained(folder: Path) -> Encoder:
    """The encoder with another query tower over the same memory tower."""
    encoder = Encoder.from_folder(folder, device="cpu")
    encoder.split()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in encoder.tower("query").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder


def test_a_new_query_tower_is_swapped_in_over_the_rows_that_serve(
    store: PoolStore, config: Config, folders: list[Path], encoders: list[Encoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rows_read: list[int] = []
    real = Serving.of.__func__  # type: ignore[attr-defined]

    def counted(cls: type[Serving], generation: Any, *rest: Any) -> Serving:
        rows_read.append(generation.number)
        return real(cls, generation, *rest)

    monkeypatch.setattr(Serving, "of", classmethod(counted))
    pair = [encoders[0], retrained(folders[0])]
    problems, count, seen = load_test(store, config, pair, swaps=4)
    assert problems == []
    assert count > 60 and seen == {1, 2}
    assert rows_read == [2]  # what it began with
    monkeypatch.setattr(loader_module, "MAX_DELTA", 5)  # the writer has left more than that
    with Searcher(store, config) as searcher:
        serves(searcher, current(config.retriever_dir) or 0)
        written = fill(store, "p", 6, seed=77)
        searcher.wait_visible("p", written[-1].seq, 60)
        activate(config.retriever_dir, 1)
        serves(searcher, 1)
    assert rows_read[1:] == [2, 1]


def test_a_query_tower_s_swap_reads_nothing_of_the_new_index(
    store: PoolStore, config: Config, folders: list[Path], encoders: list[Encoder]
) -> None:
    fill(store, "p", 5)
    publish_now(store, config, encoders[0])
    with Searcher(store, config) as searcher:
        serves(searcher, 1)
        fill(store, "p", 1, seed=5)
        activate(config.retriever_dir, 1)  # pinned: CURRENT stays while damage is done
        two = publish_now(store, config, retrained(folders[0]))
        home = config.retriever_dir
        index = home / f"{two:06d}" / "index.faiss"
        index.write_bytes(bytes(index.stat().st_size))
        write_current(home, stage_current(home, two, pinned=False))
        serves(searcher, two)
        assert searcher.search("p", "river stone", 6).generation == two
    with Searcher(store, config) as searcher:
        serves(searcher, 1)  # one that has to read it refuses it


def test_a_query_tower_of_a_damaged_generation_is_refused(
    store: PoolStore, config: Config, folders: list[Path], encoders: list[Encoder]
) -> None:
    fill(store, "p", 5)
    publish_now(store, config, encoders[0])
    with Searcher(store, config) as searcher:
        serves(searcher, 1)
        two = publish_now(store, config, retrained(folders[0]))
        serves(searcher, two)
        activate(config.retriever_dir, 1)
        serves(searcher, 1)
        tokenizer = "encoder/query_0_Transformer/tokenizer.json"
        path = config.retriever_dir / f"{two:06d}" / tokenizer
        path.write_bytes(path.read_bytes() + b" ")
        write_current(path.parents[3], stage_current(path.parents[3], two, pinned=False))
        until(lambda: "damaged" in (searcher.stats().generation_error or ""))
        assert searcher.search("p", "river stone", 3).generation == 1


def test_the_same_encoder_with_another_kind_of_index_brings_its_index(
    store: PoolStore, config: Config, searcher: Searcher, encoders: list[Encoder]
) -> None:
    fill(store, "p", 300)
    publish_now(store, config, encoders[0])
    serves(searcher, 1)
    index = IndexConfig(kind="ivf", approximate_from=100, nprobe=100)
    publish_now(store, config, encoders[0], index=index)
    serves(searcher, 2)
    serving = searcher._worker.serving
    assert serving is not None and serving.shards["p"]._index.kind == "ivf"


@pytest.mark.parametrize("fault", ["index", "label"])
def test_the_content_check_finds_a_planted_fault(
    store: PoolStore, config: Config, encoders: list[Encoder], fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Once in a while a batch takes its query vectors, or its name, from another generation."""
    real = Serving.answer
    calls = 0

    def faulty(self: Serving, queries: Any) -> list[SearchAnswer]:
        nonlocal calls
        calls += 1
        if self.number == 0 or calls % 4:
            return real(self, queries)
        if fault == "label":
            wrong = Serving(3 - self.number, self.encoder, self.shards)
        else:
            wrong = Serving(self.number, encoders[2 - self.number], self.shards)
        return real(wrong, queries)

    monkeypatch.setattr(Serving, "answer", faulty)
    problems, count, _ = load_test(store, config, encoders, swaps=2)
    # The planted fault must be seen in the answers; the writer's own checks can't tell.
    assert count > 20 and any("similarity" in problem for problem in problems)


def test_the_lease_of_what_serves_holds_and_is_given_back(
    store: PoolStore, config: Config, encoders: list[Encoder]
) -> None:
    fill(store, "p", 3)
    home = config.retriever_dir
    slow = config.model_copy(
        update={"retriever": config.retriever.model_copy(update={"poll_seconds": 1000.0})}
    )
    publish_now(store, config, encoders[0], keep=1)
    with Searcher(store, slow) as searcher:
        serves(searcher, 1)
        publish_now(store, config, encoders[0], keep=1)
        publish_now(store, config, encoders[0], keep=1)
        assert numbers(home) == [1, 3]
    publish_now(store, config, encoders[0], keep=1)
    assert numbers(home) == [4]
    load(config.retriever_dir, device="cpu").close()


def test_a_large_first_delta_becomes_an_index(
    store: PoolStore, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_module, "MAX_DELTA", 20)
    memories = fill(store, "p", 100)
    with Searcher(store, config) as searcher:
        searcher.wait_ready(60)
        assert searcher.stats().delta_rows == 0
        assert set(find(searcher, memories[0])) == {memory.id for memory in memories}
