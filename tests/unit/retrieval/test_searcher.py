"""The searcher: swaps under load, freshness, deletions, deadlines, failures."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memshare.config import Config
from memshare.pool.errors import UnknownPool
from memshare.pool.store import PoolStore
from memshare.records import Memory, SearchAnswer
from memshare.retrieval import loader as loader_module
from memshare.retrieval import serving as serving_module
from memshare.retrieval.build import build_generation
from memshare.retrieval.encoder import Encoder, EncoderError
from memshare.retrieval.generation import current, load
from memshare.retrieval.placing import Choice, Placer
from memshare.retrieval.publish import activate, publish
from memshare.retrieval.searcher import Filter, Searcher, SearcherClosed, SearchTimeout
from memshare.retrieval.serving import Serving
from memshare.retrieval.shelf import numbers, stage_current, write_current
from tests.retrieving import fill, make_config, open_store, publish_now, sentence
from tests.swapping import Expected, mixed
from tests.tiny import tiny_encoder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("encoders")
    return [tiny_encoder(base / str(seed), seed=seed) for seed in range(2)]


@pytest.fixture
def encoders(folders: list[Path]) -> list[Encoder]:
    return [Encoder.from_folder(folder, device="cpu") for folder in folders]


@pytest.fixture
def config(tmp_path: Path, folders: list[Path]) -> Config:
    return make_config(tmp_path / "run", folders[0], ("p", "q"))


@pytest.fixture
def store(config: Config) -> Iterator[PoolStore]:
    with open_store(config) as opened:
        yield opened


@pytest.fixture
def searcher(store: PoolStore, config: Config) -> Iterator[Searcher]:
    with Searcher(store, config) as started:
        yield started


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def serves(searcher: Searcher, number: int) -> None:
    until(lambda: searcher.stats().generation == number)


def ids(answer: SearchAnswer) -> list[str]:
    return [hit.id for hit in answer.hits]


def find(searcher: Searcher, memory: Memory, k: int = 1000) -> list[str]:
    return ids(searcher.search(memory.pool, f"{memory.prompt}\n{memory.answer}", k))


def test_generation_zero_finds_what_brute_force_finds(
    store: PoolStore, searcher: Searcher, encoders: list[Encoder]
) -> None:
    memories = fill(store, "p", 40)
    searcher.wait_visible("p", memories[-1].seq, 60)
    answer = searcher.search("p", "river stone lamp", 5)
    vectors = encoders[0].encode_memories([(m.prompt, m.answer) for m in memories])
    order = np.argsort(-(vectors @ encoders[0].encode_queries(["river stone lamp"])[0]))
    assert answer.generation == 0
    assert ids(answer) == [memories[i].id for i in order[:5]]


def test_empty_pool_and_large_k(store: PoolStore, searcher: Searcher) -> None:
    assert searcher.search("p", "anything", 3, timeout=60) == SearchAnswer(0, ())
    memory = fill(store, "p", 3)[-1]
    searcher.wait_visible("p", memory.seq, 60)
    assert len(find(searcher, memory, k=10**6)) == 3


def test_pools_never_mix(store: PoolStore, searcher: Searcher) -> None:
    mine, theirs = fill(store, "p", 10), fill(store, "q", 10)
    searcher.wait_visible("p", mine[-1].seq, 60)
    searcher.wait_visible("q", theirs[-1].seq, 60)
    for memory in mine + theirs:
        own = mine if memory.pool == "p" else theirs
        assert set(find(searcher, memory)) == {other.id for other in own}


def test_unknown_pool_and_bad_k(searcher: Searcher) -> None:
    for call in (
        lambda: searcher.search("nowhere", "x", 1),
        lambda: searcher.wait_visible("nowhere", 1, 1),
        lambda: asyncio.run(searcher.asearch("nowhere", "x", 1)),
    ):
        with pytest.raises(UnknownPool, match="nowhere"):
            call()
    with pytest.raises(ValueError, match="k must be"):
        searcher.search("p", "x", 0)


def test_filters(store: PoolStore, searcher: Searcher) -> None:
    memories = fill(store, "p", 60)
    searcher.wait_visible("p", memories[-1].seq, 60)
    restrict = Filter("ann", created_after="2026-01-10", created_before="2026-02-20T00:00:00Z")
    expected = {
        m.id for m in memories if m.agent == "ann" and "2026-01-10" <= m.created_at < "2026-02-20T"
    }
    assert len(expected) > 3
    assert set(ids(searcher.search("p", "x", 1000, restrict))) == expected


def test_a_write_is_visible_after_wait_visible(store: PoolStore, searcher: Searcher) -> None:
    searcher.wait_ready(60)
    for i in range(10):
        memory = fill(store, "p", 1, seed=i)[0]
        searcher.wait_visible("p", memory.seq, 60)
        assert find(searcher, memory, 1) == [memory.id] or memory.id in find(searcher, memory)


def test_writes_by_others_are_found_by_polling(store: PoolStore, searcher: Searcher) -> None:
    searcher.wait_ready(60)
    memory = fill(store, "p", 1)[0]  # nobody notifies
    until(lambda: memory.id in find(searcher, memory))


def test_notify_is_quicker_than_the_poll(tmp_path: Path, folders: list[Path]) -> None:
    config = make_config(tmp_path, folders[0], poll_seconds=120)
    with open_store(config) as store, Searcher(store, config) as searcher:
        searcher.wait_ready(60)
        memory = fill(store, "p", 1)[0]
        searcher.notify("p")
        until(lambda: memory.id in find(searcher, memory))


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
    activate(config.generations_dir, "main", 1)  # back to the one whose index has them
    serves(searcher, 1)
    assert set(find(searcher, late[2])) == everything - away
    for memory in held:
        store.release(memory.id)
    searcher.wait_visible("p", store.last_seq("p"), 60)
    back = everything - {memory.id for memory in gone}
    assert set(find(searcher, late[2])) == back
    activate(config.generations_dir, "main", 2)
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
                activate(config.generations_dir, "main", 1 + i % 2)
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


def test_a_swap_leaves_nothing_of_the_old_one_and_reads_no_known_memory_again(
    store: PoolStore, config: Config, searcher: Searcher, encoders: list[Encoder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    memories = fill(store, "p", 30)
    publish_now(store, config, encoders[0])
    serves(searcher, 1)
    old = weakref.ref(searcher._worker.serving)
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
        config.generations_dir, "main", encoder=encoders[1], metrics={}, parent=1, keep=3,
        **built.parts(),
    )  # fmt: skip
    serves(searcher, 2)
    assert set(find(searcher, more[0])) == {m.id for m in memories[1:] + more}
    agents = {m.id for m in memories[1:] + more if m.agent == "ann"}
    assert set(ids(searcher.search("p", "x", 99, Filter("ann")))) == agents
    assert read == []
    gc.collect()
    until(lambda: old() is None)


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
        serves(searcher, current(config.generations_dir, "main") or 0)
        written = fill(store, "p", 6, seed=77)
        searcher.wait_visible("p", written[-1].seq, 60)
        activate(config.generations_dir, "main", 1)
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
        activate(config.generations_dir, "main", 1)  # pinned: CURRENT stays while damage is done
        two = publish_now(store, config, retrained(folders[0]))
        home = config.generations_dir / "main"
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
        activate(config.generations_dir, "main", 1)
        serves(searcher, 1)
        tokenizer = "encoder/query_0_Transformer/tokenizer.json"
        path = config.generations_dir / "main" / f"{two:06d}" / tokenizer
        path.write_bytes(path.read_bytes() + b" ")
        write_current(path.parents[3], stage_current(path.parents[3], two, pinned=False))
        until(lambda: "damaged" in (searcher.stats().generation_error or ""))
        assert searcher.search("p", "river stone", 3).generation == 1


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


def test_a_damaged_generation_is_refused_once_and_the_old_one_serves_on(
    store: PoolStore, config: Config, searcher: Searcher, encoders: list[Encoder],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    memory = fill(store, "p", 5)[0]
    publish_now(store, config, encoders[0])
    serves(searcher, 1)
    home = config.generations_dir / "main"
    publish_now(store, config, encoders[1], keep=9)
    serves(searcher, 2)
    activate(config.generations_dir, "main", 1)
    serves(searcher, 1)
    weights = home / "000002" / "encoder" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    (home / "CURRENT").write_text("2\n")
    until(lambda: searcher.stats().generation_error is not None)
    time.sleep(0.3)  # many polls
    assert find(searcher, memory) and searcher.stats().generation == 1
    assert "model.safetensors" in str(searcher.stats().generation_error)
    assert capsys.readouterr().err.count("serves on") == 1
    weights.write_bytes(data)
    activate(config.generations_dir, "main", 2)  # CURRENT written again: another try
    serves(searcher, 2)
    until(lambda: searcher.stats().generation_error is None)


def test_start_with_a_damaged_current(
    store: PoolStore, config: Config, encoders: list[Encoder]
) -> None:
    memory = fill(store, "p", 5)[0]
    publish_now(store, config, encoders[0])
    publish_now(store, config, encoders[1])
    (config.generations_dir / "main" / "000002" / "ids.npy").unlink()
    with Searcher(store, config) as searcher:
        searcher.wait_ready(60)
        assert searcher.search("p", "x", 9).generation == 1
        assert "ids.npy" in str(searcher.stats().generation_error)
    (config.generations_dir / "main" / "000001" / "ids.npy").unlink()
    with Searcher(store, config) as searcher:
        searcher.wait_ready(60)
        assert searcher.stats().generation == 0 and memory.id in find(searcher, memory)


def test_another_database_than_the_one_it_was_built_from(
    store: PoolStore, config: Config, encoders: list[Encoder], tmp_path: Path
) -> None:
    fill(store, "p", 20)
    publish_now(store, config, encoders[0])
    other = config.model_copy(update={"database_url": f"sqlite:///{tmp_path}/other.db"})
    with open_store(other) as fresh, Searcher(fresh, other) as searcher:
        memories = fill(fresh, "p", 3, seed=7)
        searcher.wait_visible("p", memories[-1].seq, 60)
        assert set(find(searcher, memories[0])) == {memory.id for memory in memories}


def test_a_pool_whose_generation_was_built_by_another_encoder(
    store: PoolStore, config: Config, encoders: list[Encoder]
) -> None:
    """The configuration names encoder 0; the generation's own, encoder 1, answers and fills up."""
    fill(store, "p", 5)
    publish_now(store, config, encoders[1])
    late = fill(store, "p", 5, seed=1)
    with Searcher(store, config) as searcher:
        searcher.wait_visible("p", late[-1].seq, 60)
        answer = searcher.search("p", "river stone", 10)
    triples = [(m.id, m.prompt, m.answer) for m in store.iter("p")]
    assert mixed(answer, 0, {1: Expected.of(encoders[1], ["river stone"], triples)}, 10) is None


def test_the_lease_of_what_serves_holds_and_is_given_back(
    store: PoolStore, config: Config, encoders: list[Encoder]
) -> None:
    fill(store, "p", 3)
    home = config.generations_dir / "main"
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
    load(config.generations_dir, "main", device="cpu").close()


def test_an_error_goes_to_its_caller_alone(
    searcher: Searcher, store: PoolStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fill(store, "p", 3)[0]
    searcher.wait_visible("p", store.last_seq("p"), 60)
    real = Encoder.encode_queries

    def picky(self: Encoder, prompts: Any) -> np.ndarray:
        if "poison" in prompts:
            raise EncoderError("no such text")
        return real(self, prompts)

    monkeypatch.setattr(Encoder, "encode_queries", picky)

    async def together() -> list[Any]:
        texts = ["a", "poison", "b", "c"] * 5
        calls = [searcher.asearch("p", text, 2) for text in texts]
        return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(together())
    assert [isinstance(result, EncoderError) for result in results] == [
        False,
        True,
        False,
        False,
    ] * 5
    assert all(len(result.hits) == 2 for i, result in enumerate(results) if i % 4 != 1)
    assert find(searcher, memory) and searcher.stats().failed == 5


def test_concurrent_searches_share_batches(searcher: Searcher, store: PoolStore) -> None:
    fill(store, "p", 3)
    searcher.wait_visible("p", 3, 60)
    before = searcher.stats()

    async def together() -> list[SearchAnswer]:
        return await asyncio.gather(*[searcher.asearch("p", f"{i}", 1 + i % 3) for i in range(128)])

    answers = asyncio.run(together())
    after = searcher.stats()
    assert [len(answer.hits) for answer in answers] == [1 + i % 3 for i in range(128)]
    assert after.answered - before.answered == 128
    assert after.batches - before.batches < 64 and after.queue_depth == 0


def test_deadlines(store: PoolStore, searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    searcher.wait_ready(60)
    free = threading.Event()
    real = Encoder.encode_queries

    def stuck(self: Encoder, prompts: Any) -> np.ndarray:
        free.wait(60)
        return real(self, prompts)

    monkeypatch.setattr(Encoder, "encode_queries", stuck)
    began = time.monotonic()
    with pytest.raises(SearchTimeout, match=r"0\.2 seconds: the searcher is busy"):
        searcher.search("p", "x", 1, timeout=0.2)
    with pytest.raises(SearchTimeout):
        asyncio.run(searcher.asearch("p", "x", 1, timeout=0.2))
    with pytest.raises(SearchTimeout, match="p is not at 99"):
        searcher.wait_visible("p", 99, 0.1)
    assert time.monotonic() - began < 30
    free.set()
    assert searcher.search("p", "x", 1, timeout=60).hits == ()


def test_close_answers_what_was_accepted(store: PoolStore, config: Config) -> None:
    fill(store, "p", 3)
    searcher = Searcher(store, config).start()
    searcher.wait_ready(60)
    futures = [searcher._submit(_query(i), 60) for i in range(200)]
    searcher.close()
    assert all(len(future.result(0).hits) == 2 for future in futures)
    with pytest.raises(SearcherClosed):
        searcher.search("p", "x", 1)
    with pytest.raises(SearcherClosed):
        searcher.wait_visible("p", 10**6, 5)
    searcher.close()


def _query(i: int) -> serving_module.Query:
    return serving_module.Query("p", f"question {i}", 2)


def test_an_encoder_that_is_not_there(store: PoolStore, config: Config, tmp_path: Path) -> None:
    missing = config.encoder.model_copy(update={"model": str(tmp_path / "missing" / "encoder")})
    with closing(Searcher(store, config.model_copy(update={"encoder": missing}))) as searcher:
        searcher.start()
        with pytest.raises(EncoderError, match="missing"):
            searcher.wait_ready(60)
        with pytest.raises(EncoderError, match="missing"):
            searcher.search("p", "x", 1)


def test_a_database_that_is_away_for_a_while(
    store: PoolStore, config: Config, searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memshare.pool.errors import PoolError

    memory = fill(store, "p", 3)[0]
    searcher.wait_visible("p", 3, 60)

    def away(*args: Any) -> Any:
        raise PoolError("the database is away")

    with monkeypatch.context() as patch:
        patch.setattr(PoolStore, "changes", away)
        late = fill(store, "p", 1, seed=5)[0]
        until(lambda: searcher.stats().feed_error is not None)
        assert "away" in str(searcher.stats().feed_error)
        assert len(find(searcher, memory)) == 3  # searches go on
        with pytest.raises(SearchTimeout, match="the database is away"):
            searcher.wait_visible("p", late.seq, 0.1)
    searcher.wait_visible("p", late.seq, 60)
    until(lambda: searcher.stats().feed_error is None)


def test_a_large_first_delta_becomes_an_index(
    store: PoolStore, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_module, "MAX_DELTA", 20)
    memories = fill(store, "p", 100)
    with Searcher(store, config) as searcher:
        searcher.wait_ready(60)
        assert searcher.stats().delta_rows == 0
        assert set(find(searcher, memories[0])) == {memory.id for memory in memories}
