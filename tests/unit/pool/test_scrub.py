"""What was erased can be read in no file of an SQLite pool, whoever erased it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from memshare.cli import main
from memshare.config import load_config
from memshare.pool import patience, sqlite
from memshare.pool.errors import PoolUnavailable
from memshare.pool.store import PoolStore
from memshare.records import NewMemory
from memshare.training.journal import Journal
from tests.training_runs import ROOT, load_program

WORD = b"quixotry"


@pytest.fixture
def url(tmp_path: Path) -> str:
    with PoolStore.open(f"sqlite:///{tmp_path}/pool.db") as store:
        store.create_pool("main")
    return f"sqlite:///{tmp_path}/pool.db"


@pytest.fixture
def gateway(url: str) -> Iterator[PoolStore]:
    """One that stays: SQLite itself empties the log when the last connection closes."""
    with PoolStore.open(url) as store:
        store.stats("main")
        yield store


def add(store: PoolStore, *prompts: str) -> list[str]:
    results = store.append([NewMemory("main", prompt, "an answer") for prompt in prompts])
    return [result.id for result in results]


def readable(folder: Path) -> bool:
    return any(WORD in path.read_bytes() for path in folder.glob("pool.db*"))


@contextmanager
def reading(url: str) -> Iterator[None]:
    with PoolStore.open(url) as store, store.database.read() as connection:
        connection.execute(sa.text("SELECT count(*) FROM memories")).scalar()
        yield


def test_a_deleted_text_is_in_no_file(url: str, tmp_path: Path, gateway: PoolStore) -> None:
    """Not in the write-ahead log either; where somebody reads, once that is over."""
    first, second, third = add(gateway, "quixotry", "quixotry two", "quixotry three")
    assert readable(tmp_path)
    assert gateway.delete_many([first, second, "unknown"]) == 2 and readable(tmp_path)
    with reading(url):
        began = time.monotonic()
        assert gateway.delete(third)
        assert time.monotonic() - began < 5  # it doesn't wait for the reader
        assert not gateway.scrub()
        assert readable(tmp_path)
    assert gateway.scrub()
    assert not readable(tmp_path)


def test_what_another_process_deleted_is_scrubbed_too(
    url: str, tmp_path: Path, gateway: PoolStore
) -> None:
    ids = add(gateway, *(f"quixotry {n}" for n in range(20)))
    with reading(url), PoolStore.open(url) as other:
        assert other.delete_many(ids) == 20
    add(gateway, "plain")
    assert readable(tmp_path)
    assert gateway.scrub()
    assert not readable(tmp_path)


def once_the_log_is_empty(store: PoolStore, act: Callable[[], None]) -> None:
    """Call ``act`` in the next scrub, when its work is done and not yet on record."""
    seen: list[bool] = []  # whether each statement was the checkpoint

    def meanwhile(statement: str) -> None:
        seen.append("wal_checkpoint" in statement)
        if sum(seen) == 1 and seen[-2:] == [True, False]:
            act()

    @sa.event.listens_for(store.database.engine, "checkout")
    def watch(connection: Any, *_: object) -> None:
        connection.set_trace_callback(meanwhile)


def test_what_is_deleted_during_a_scrub_is_scrubbed_by_the_next(
    url: str, tmp_path: Path, gateway: PoolStore
) -> None:
    (first,) = add(gateway, "quixotry")
    with reading(url):
        assert gateway.delete(first)
    held = reading(url)
    with PoolStore.open(url) as other:

        def delete() -> None:
            (second,) = add(other, "quixotry two")
            held.__enter__()
            assert other.delete(second)

        once_the_log_is_empty(gateway, delete)
        gateway.scrub()
        assert readable(tmp_path)
        held.__exit__(None, None, None)
        assert gateway.scrub()
        assert not readable(tmp_path)


def test_a_deletion_stands_though_its_scrub_can_not_be_put_on_record(
    url: str, tmp_path: Path, gateway: PoolStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.1)
    (id,) = add(gateway, "quixotry")
    with PoolStore.open(url) as other:
        writing = other.database.write()
        once_the_log_is_empty(gateway, lambda: writing.__enter__() and None)
        assert gateway.delete(id)
        assert not readable(tmp_path)
        writing.__exit__(None, None, None)
    assert gateway.scrub()  # once more


def test_the_log_is_emptied_only_where_something_was_erased(
    tmp_path: Path, gateway: PoolStore
) -> None:
    """It takes every reader's and writer's pause, and a gateway looks every few seconds."""
    log = tmp_path / "pool.db-wal"
    for erased in (False, True):
        ids = add(gateway, "one", "two")
        if erased:
            gateway.delete_many(ids)
            add(gateway, "three")
        before = log.stat()
        assert before.st_size > 0 and gateway.scrub()
        after = log.stat()
        assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_a_scrub_may_wait_for_readers(url: str, tmp_path: Path, gateway: PoolStore) -> None:
    (id,) = add(gateway, "quixotry")
    held = reading(url)
    held.__enter__()
    assert gateway.delete(id) and readable(tmp_path)
    timer = threading.Timer(0.3, held.__exit__, (None, None, None))
    timer.start()
    assert gateway.scrub(patience=10) and not readable(tmp_path)
    timer.join()


def test_a_database_that_is_away_is_a_pool_error(
    gateway: PoolStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> None:
        raise sa.exc.OperationalError("", {}, OSError("no such file"))

    monkeypatch.setattr(gateway.database.engine, "connect", away)
    with pytest.raises(PoolUnavailable, match="no such file"):
        gateway.scrub()


def test_the_loop_scrubs_what_others_could_not(
    url: str, tmp_path: Path, gateway: PoolStore
) -> None:
    (id,) = add(gateway, "quixotry")
    with reading(url):
        assert gateway.delete(id)
    assert readable(tmp_path)
    program = load_program(ROOT / "train" / "continual.py")
    config = load_config(None, [f"run.dir={tmp_path / 'run'}", f"database_url={url}"])
    config.run.dir.mkdir()
    with PoolStore.open(url) as store:
        assert not program.due(config, store, Journal.load(config.run.dir / "continual.json"))
    assert not readable(tmp_path)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("command", ["pool delete ID", "prune --pool main --policy age --cap 0"])
def test_the_command_line_waits_for_readers_and_says_where_it_was_in_vain(
    url: str, tmp_path: Path, gateway: PoolStore, command: str, ends: bool,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(patience, "SCRUB_SECONDS", 20.0 if ends else 0.1)
    (id,) = add(gateway, "quixotry")
    whole, waits = PoolStore.scrub, []
    with ExitStack() as reader:
        reader.enter_context(reading(url))

        def scrub(store: PoolStore, patience: float = 0.0) -> bool:
            waits.append(patience)
            if patience and ends:  # while the command waits
                threading.Timer(0.3, reader.close).start()
            return whole(store, patience)

        monkeypatch.setattr(PoolStore, "scrub", scrub)
        assert main([*command.replace("ID", id).split(), "--url", url]) == 0
        assert waits[-1] == patience.SCRUB_SECONDS
        told = capsys.readouterr().err
        assert ("stays readable" in told) == (not ends), told
        assert readable(tmp_path) == (not ends)
