"""Several processes on one database: order, no loss, and what a killed writer leaves."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from memshare.pool.store import PoolStore
from memshare.records import NewMemory

WRITER = """
import sys
from memshare.pool.store import PoolStore
from memshare.records import NewMemory
url, name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
with PoolStore.open(url) as store:
    store.create_pool("main")
    for n in range(rounds):
        batch = [NewMemory("main", f"{name} {n} {i}", "own") for i in range(n % 4 + 1)]
        batch.append(NewMemory("main", f"shared {n}", "common"))
        for result in store.append(batch):
            print(result.id, result.status, result.seq, flush=True)
"""


def start(url: str, name: str, rounds: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, url, name, str(rounds)], stdout=subprocess.PIPE, text=True
    )


def test_concurrent_writers_lose_and_double_nothing(url: str) -> None:
    rounds = 40
    writers = [start(url, name, rounds) for name in ("a", "b", "c")]  # all make the same tables
    sightings: list[tuple[int, list[int]]] = []
    done = threading.Event()

    def read() -> None:
        with PoolStore.open(url) as store:
            store.create_pool("main")
            while not done.is_set():
                position = store.last_seq("main")
                sightings.append((position, [m.seq for m in store.iter("main")]))
                done.wait(0.02)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        outputs = [writer.communicate(timeout=120)[0] for writer in writers]
    finally:
        done.set()
        reader.join()
        for writer in writers:
            writer.kill()
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    acknowledged = [line.split() for output in outputs for line in output.splitlines()]
    stored = {id: int(seq) for id, status, seq in acknowledged if status == "stored"}
    own = 3 * sum(n % 4 + 1 for n in range(rounds))
    assert len(stored) == own + rounds, "each shared memory is stored by exactly one writer"
    assert sorted(stored.values()) == list(range(1, own + rounds + 1))
    with PoolStore.open(url) as store:
        assert {m.id: m.seq for m in store.iter("main")} == stored
        assert [c.seq for c in store.changes("main", 0, limit=10_000)] == sorted(stored.values())
    assert any(0 < position < len(stored) for position, _ in sightings), "the reader saw none of it"
    for position, seqs in sightings:
        # Nothing is deleted here, so all of 1..position was there already when it was seen.
        assert [seq for seq in seqs if seq <= position] == list(range(1, position + 1))


def test_a_killed_writer_loses_nothing_acknowledged(url: str) -> None:
    acknowledged: dict[str, int] = {}
    for attempt in range(4):
        writer = start(url, f"writer {attempt}", 100_000)
        assert writer.stdout is not None
        for _ in range(20 + 13 * attempt):
            id, status, seq = writer.stdout.readline().split()
            if status == "stored":
                acknowledged[id] = int(seq)
        writer.send_signal(signal.SIGKILL)
        for line in writer.communicate(timeout=30)[0].splitlines():
            if len(parts := line.split()) == 3 and parts[1] == "stored":
                acknowledged[parts[0]] = int(parts[2])
        assert writer.returncode == -signal.SIGKILL
        with PoolStore.open(url) as store:
            there = {m.id: m.seq for m in store.iter("main")}
            assert acknowledged.items() <= there.items()
            assert sorted(there.values()) == list(range(1, len(there) + 1))
            assert store.last_seq("main") == len(there)
            (result,) = store.append([NewMemory("main", f"after {attempt}", "alive")])
            assert result.seq == len(there) + 1
            acknowledged[result.id] = result.seq


@pytest.mark.parametrize(("pragma", "value"), [("synchronous", 2), ("journal_mode", "wal"),
                                               ("foreign_keys", 1), ("busy_timeout", 30_000),
                                               ("secure_delete", 1)])  # fmt: skip
def test_connections_are_durable(tmp_path: Path, pragma: str, value: object) -> None:
    """A kill leaves the page cache alive; that a power cut loses nothing rests on these."""
    with PoolStore.open(f"sqlite:///{tmp_path}/pool.db") as store, store._db.read() as connection:
        assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar() == value
