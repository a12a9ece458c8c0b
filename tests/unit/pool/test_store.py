"""The store's whole interface, on a real database."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import sqlalchemy as sa

from memshare.pool import decisions
from memshare.pool.errors import InvalidMemory, PoolError, UnknownPool
from memshare.pool.store import PAGE, PoolStore
from memshare.records import Change, NewMemory


@pytest.fixture
def store(url: str) -> Iterator[PoolStore]:
    with PoolStore.open(url) as opened:
        opened.create_pool("main")
        yield opened


def new(prompt: str, answer: str = "an answer", pool: str = "main", **more: object) -> NewMemory:
    return NewMemory(pool, prompt, answer, **more)  # type: ignore[arg-type]


def add(store: PoolStore, *prompts: str, pool: str = "main") -> list[str]:
    return [result.id for result in store.append([new(text, pool=pool) for text in prompts])]


def test_sqlite_on_a_network_file_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [
        SimpleNamespace(mountpoint="/", fstype="ext4"),
        SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4"),
        SimpleNamespace(mountpoint=str(tmp_path / "scratch"), fstype="xfs"),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    with pytest.raises(PoolError, match=r"network file system \(nfs4\).*PostgreSQL"):
        PoolStore.open(f"sqlite:///{tmp_path}/run/pool.db")
    assert not (tmp_path / "run").exists()
    PoolStore.open(f"sqlite:///{tmp_path}/scratch/pool.db").close()


def test_pools_keep_their_settings(store: PoolStore) -> None:
    made = store.create_pool("jokes", rubric="literary", threshold=70)
    assert (made.name, made.rubric, made.threshold, made.last_seq) == ("jokes", "literary", 70, 0)
    assert store.create_pool("jokes", rubric="logic", threshold=10) == made
    assert store.set_pool("jokes", threshold=75).rubric == "literary"
    assert store.pool("jokes").threshold == 75
    assert [info.name for info in store.pools()] == ["jokes", "main"]
    with pytest.raises(InvalidMemory, match="threshold"):
        store.set_pool("jokes", threshold=101)
    with pytest.raises(InvalidMemory, match="pool"):
        store.create_pool(" ")


def test_an_unknown_pool_is_named_with_those_that_exist(store: PoolStore) -> None:
    for call in (
        lambda: store.pool("nope"),
        lambda: store.iter("nope"),
        lambda: store.list("nope"),
        lambda: store.changes("nope", 0),
        lambda: store.stats("nope"),
        lambda: store.size("nope"),
        lambda: store.held("nope"),
        lambda: store.set_pool("nope", "general"),
        lambda: store.append([new("a"), new("b", pool="nope")]),
        lambda: store.decisions("nope"),
    ):
        with pytest.raises(UnknownPool, match=r"'nope'.*main"):
            call()
    assert store.last_seq("main") == 0, "a batch with one unknown pool writes nothing"


@pytest.mark.parametrize("name", ["", "a\x00b", "a\ud800b", "x" * 300])
def test_a_name_that_no_pool_can_have_is_that_of_an_unknown_pool(
    store: PoolStore, name: str
) -> None:
    with pytest.raises(UnknownPool, match="main"):
        store.pool(name)


def test_append_returns_results_in_order_and_stores_every_field(store: PoolStore) -> None:
    store.create_pool("other")
    first, second, third = store.append(
        [
            new("one", score=88.5, agent="a", model="m", metadata={"k": [1, "é", None]}),
            new("two", pool="other", created_at="2024-05-01T10:00:00+02:00"),
            new("three"),
        ]
    )
    assert [r.seq for r in (first, second, third)] == [1, 1, 2]
    memory = store.get(first.id)
    assert memory is not None
    assert (memory.prompt, memory.answer, memory.score) == ("one", "an answer", 88.5)
    assert (memory.agent, memory.model, memory.held) == ("a", "m", False)
    assert memory.metadata == {"k": [1, "é", None]}
    other = store.get(second.id)
    assert other is not None and other.created_at == "2024-05-01T08:00:00.000000Z"
    assert set(store.get_many([first.id, third.id, "missing"])) == {first.id, third.id}
    assert store.append([]) == []


def test_append_is_idempotent_by_normalised_content(store: PoolStore) -> None:
    (first,) = store.append([new("What is it?", "Nothing")])
    again, twice, fresh = store.append([new("  what IS\n it?", "nothing"), new("new"), new("NEW ")])
    assert (again.status, again.id, again.seq) == ("duplicate", first.id, first.seq)
    assert (twice.status, fresh.status) == ("stored", "duplicate")
    assert fresh.id == twice.id
    assert store.last_seq("main") == 2, "a duplicate takes no seq"


def test_an_invalid_memory_spoils_nothing(store: PoolStore) -> None:
    with pytest.raises(InvalidMemory, match="answer"):
        store.append([new("fine"), new("bad", "  \n")])
    assert store.last_seq("main") == 0


def test_delete_erases_the_text_and_frees_the_content(tmp_path: Path) -> None:
    secret = "the secret words of a prompt " * 500  # on pages of its own, which a delete frees
    with PoolStore.open(f"sqlite:///{tmp_path}/pool.db") as store:
        store.create_pool("main")
        (first,) = store.append([new(secret, "secret answer", metadata={"note": "secret note"})])
        store.append([new("kept")])
        assert store.delete(first.id)
        assert not store.delete(first.id)
        assert not store.delete("unknown")
        assert not store.hold(first.id)
        assert store.get(first.id) is None
        assert [m.prompt for m in store.iter("main", include_held=True)] == ["kept"]
        assert store.changes("main", 2) == [Change("main", 3, "delete", first.id)]
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"kept" in content
    assert b"secret" not in content, "erased text lingers in the file"
    with PoolStore.open(f"sqlite:///{tmp_path}/pool.db") as store:
        (again,) = store.append([new(secret, "secret answer")])
        assert again.status == "stored" and again.id != first.id and again.seq == 4


def test_held_memories_are_left_out_until_released(store: PoolStore) -> None:
    a, b = add(store, "a", "b")
    assert store.hold(a) and not store.hold(a)
    assert [m.id for m in store.iter("main")] == [b]
    assert [m.id for m in store.list("main")[0]] == [b]
    assert [m.held for m in store.iter("main", include_held=True)] == [True, False]
    held = store.get(a)
    assert held is not None and held.held
    assert add(store, "a") == [a], "its content is taken"
    assert store.release(a) and not store.release(a)
    assert [m.id for m in store.iter("main")] == [a, b]
    assert [(c.seq, c.kind, c.id) for c in store.changes("main", 2)] == [
        (3, "hold", a),
        (4, "release", a),
    ]


def test_list_pages_through_everything_once(store: PoolStore) -> None:
    ids = add(store, *(f"prompt {n}" for n in range(10)))
    store.delete(ids[3])
    store.hold(ids[5])
    seen = []
    cursor = None
    pages = 0
    while True:
        page, cursor = store.list("main", cursor, limit=3)
        seen += [m.id for m in page]
        pages += 1
        if pages == 1:
            add(store, "added while paging")
        if cursor is None:
            break
        assert len(page) == 3
    assert seen[:8] == [id for n, id in enumerate(ids) if n not in (3, 5)]
    assert len(seen) == 9
    with pytest.raises(PoolError, match="cursor"):
        store.list("main", "nonsense")
    with pytest.raises(PoolError, match="limit"):
        store.list("main", limit=0)


def test_iter_streams_more_than_a_page_up_to_the_position_at_its_start(store: PoolStore) -> None:
    ids = add(store, *(f"prompt {n}" for n in range(2 * PAGE + 7)))
    stream = store.iter("main")
    first = next(stream)
    late = add(store, "late")
    store.delete(ids[-1])
    rest = [m.id for m in stream]
    assert [first.id, *rest] == ids[:-1]
    assert [m.id for m in store.iter("main", after_seq=len(ids))] == late
    assert [m.seq for m in store.iter("main", after_seq=3, until_seq=6)] == [4, 5, 6]
    assert list(store.iter("main", after_seq=store.last_seq("main"))) == []


def test_changes_are_cut_by_limit_and_continue_strictly_after(store: PoolStore) -> None:
    ids = add(store, "a", "b", "c")
    store.delete(ids[1])
    log = []
    since = 0
    while part := store.changes("main", since, limit=2):
        assert len(part) <= 2
        log += part
        since = part[-1].seq
    assert [(c.seq, c.kind) for c in log] == [(1, "add"), (2, "add"), (3, "add"), (4, "delete")]
    assert since == store.last_seq("main")


def test_ids_given_by_an_import_are_kept_unless_they_were_used(store: PoolStore) -> None:
    (kept,) = store.append([new("a", id="mine-1")])
    assert kept.id == "mine-1"
    other, twice, fresh = store.append([new("b", id="mine-1"), new("c", id="x"), new("d", id="x")])
    assert other.id != "mine-1" and twice.id == "x" and fresh.id != "x"
    store.delete("mine-1")
    (later,) = store.append([new("a", id="mine-1")])
    assert later.status == "stored" and later.id != "mine-1"


def test_stats_and_decisions(store: PoolStore) -> None:
    a, _b, c, d = (
        r.id
        for r in store.append(
            [
                new("a", score=90, agent="x"),
                new("b", score=70, agent="x"),
                new("c", agent="y"),
                new("d", score=10),
            ]
        )
    )
    store.delete(d)
    store.hold(c)
    with store.database.write() as connection:
        decisions.record(connection, "main", "stored", "h1", 90, "x", a)
        decisions.record(connection, "main", "below threshold", "h2", 30, "x", None)
        decisions.record(connection, "main", "below threshold", "h3", None, None, None)
        with pytest.raises(UnknownPool, match=r"'nope'.*main"):
            decisions.record(connection, "nope", "stored", "h", 1, None, None)
    stats = store.stats("main")
    assert (stats.memories, stats.held, stats.deleted) == (3, 1, 1)
    assert (store.size("main"), store.held("main")) == (3, 1)
    assert stats.by_agent == {"x": 2, "y": 1}
    assert (stats.scores.count, stats.scores.mean) == (2, 80)
    assert (stats.scores.min, stats.scores.max) == (70, 90)
    assert stats.decisions == store.decisions("main") == {"below threshold": 2, "stored": 1}
    assert list(stats.decisions) == ["below threshold", "stored"]
    assert stats.pool.last_seq == store.last_seq("main") == 6
    store.create_pool("empty")
    empty = store.stats("empty")
    assert (empty.memories, empty.scores.mean, empty.decisions) == (0, None, {})
    assert (store.size("empty"), store.held("empty")) == (0, 0)


def test_threads_share_one_store(store: PoolStore) -> None:
    def work(name: int) -> None:
        for n in range(20):
            add(store, f"{name}-{n}", f"shared {n}")

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seqs = [m.seq for m in store.iter("main")]
    assert seqs == list(range(1, 101))


def test_a_full_disk_is_reported_and_loses_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/pool.db"
    with PoolStore.open(url) as store:
        store.create_pool("main")
        add(store, "before")
    with PoolStore(url) as store:

        @sa.event.listens_for(store._db.engine, "connect")
        def cap(connection: object, _record: object) -> None:
            connection.execute("PRAGMA max_page_count = 40")  # type: ignore[attr-defined]

        with pytest.raises(PoolError, match="full"):
            store.append([new(f"{n} " + "x" * 5000) for n in range(100)])
        assert [m.prompt for m in store.iter("main")] == ["before"]
        assert store.last_seq("main") == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "URL"),
        ("foo://x", "URL"),
        ("sqlite://", "needs a file"),
        ("sqlite:////proc/nope/pool.db", "folder can't be made"),
    ],
)
def test_a_url_that_cannot_work_is_refused(url: str, message: str) -> None:
    with pytest.raises(PoolError, match=message):
        PoolStore.open(url)


def test_a_file_that_is_no_database_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are notes, not a database, and they should stay\n" * 10)
    before = path.read_bytes()
    with pytest.raises(PoolError, match="not a database"):
        PoolStore.open(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_must_exist_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="no pool database"):
        PoolStore.open(f"sqlite:///{tmp_path}/sub/pool.db", must_exist=True)
    assert list(tmp_path.iterdir()) == []
