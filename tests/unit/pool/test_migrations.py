"""Schema versions: forwards on a filled pool, never backwards, whole or not at all."""

import shutil
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from memshare.pool import engine
from memshare.pool.engine import Database
from memshare.pool.errors import PoolError
from memshare.pool.queue import PairQueue
from memshare.pool.schema import HEAD, authors, metadata, pools
from memshare.pool.store import PoolStore
from memshare.records import NewMemory, Pair

NEXT = '''"""A made-up next version."""
import sqlalchemy as sa
from alembic import op

revision = "9002"
down_revision = "{down}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("memories", sa.Column("standing", sa.Double, server_default="1"))
    {fault}
'''


def fill(url: str) -> list[str]:
    with PoolStore.open(url) as store:
        store.create_pool("main", "literary", 70)
        results = store.append([NewMemory("main", f"prompt {n}", "answer") for n in range(50)])
        store.delete(results[7].id)
        return [m.id for m in store.iter("main")]


def dump(engine: sa.Engine) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every table."""
    tables = sa.MetaData()
    with engine.connect() as connection:
        tables.reflect(connection)
        return {
            table.name: sorted(
                (tuple(row) for row in connection.execute(sa.select(table))), key=repr
            )
            for table in tables.sorted_tables
        }


def test_head_is_the_last_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(engine.MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_migrations_make_the_schema_that_the_code_uses(url: str) -> None:
    with PoolStore.open(url) as store, store._db.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_memories_on_hold_are_found_without_reading_the_others(tmp_path: Path) -> None:
    asked: list[tuple[str, tuple[object, ...]]] = []
    with PoolStore.open(f"sqlite:///{tmp_path / 'pool.db'}") as store:
        store.create_pool("main")
        sa.event.listen(
            store.database.engine, "before_cursor_execute", lambda *call: asked.append(call[2:4])
        )
        assert store.held("main") == 0 and store.list("main", held=True) == ([], None)
        with store.database.read() as connection:
            for statement, values in [call for call in asked if "held" in call[0]]:
                plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)
                assert "ix_memories_held" in str(plan.all()), statement
    assert len(asked) > 2


def test_reopening_a_filled_pool_changes_nothing(url: str) -> None:
    ids = fill(url)
    for _ in range(2):
        with PoolStore.open(url) as store:
            assert [m.id for m in store.iter("main")] == ids
            assert store.pool("main").threshold == 70


def test_memories_from_before_their_counting_are_counted(url: str) -> None:
    """Version 0004 counts what is there."""
    database = Database(url)
    config = Config()
    config.set_main_option("script_location", str(engine.MIGRATIONS))
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0003")
        connection.exec_driver_sql("INSERT INTO pools VALUES ('main', 'general', 80, 4)")
        for seq, (agent, gone) in enumerate(
            [("'ann'", "NULL"), ("'ann'", "'then'"), ("'bob'", "NULL"), ("NULL", "NULL")], 1
        ):
            connection.exec_driver_sql(
                "INSERT INTO memories (id, pool, seq, prompt, answer, agent, created_at, metadata, "
                f"held, deleted_at) VALUES ('m{seq}', 'main', {seq}, 'p', 'a', {agent}, 'now', "
                f"'{{}}', false, {gone})"
            )
    with PoolStore.open(url) as store, store.database.read() as connection:
        assert connection.execute(sa.select(pools.c.size)).scalars().all() == [3]
        counts = connection.execute(sa.select(authors.c.agent, authors.c.count)).all()
        assert {(agent, count) for agent, count in counts} == {("ann", 1), ("bob", 1)}
        assert [memory.hold_reason for memory in store.iter("main")] == [None] * 3
    database.engine.dispose()


def test_pairs_that_wait_outlive_the_migrations_since_they_were_put(url: str) -> None:
    """From version 0002, the first with a queue: they belong to no trace, and copy nothing."""
    database = Database(url)
    config = Config()
    config.set_main_option("script_location", str(engine.MIGRATIONS))
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        connection.exec_driver_sql("INSERT INTO pools VALUES ('main', 'general', 80, 0)")
        connection.exec_driver_sql(
            "INSERT INTO pending (id, pool, prompt, answer, finish_reason, agent, metadata, "
            "attempts, free_at) VALUES ('p1', 'main', 'p', 'a', 'stop', 'ann', '{}', 1, 0)"
        )
    with PoolStore.open(url) as store:
        (job,) = PairQueue(store.database).claim(5, 60)
    assert (job.id, job.attempts, job.trace) == ("p1", 2, None)
    assert job.pair == Pair("main", "p", "a", "stop", "ann")
    database.engine.dispose()


def test_a_newer_database_is_refused_and_untouched(url: str) -> None:
    fill(url)
    engine = Database(url).engine
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    before = dump(engine)
    with pytest.raises(PoolError, match=r"9999.*newer.*upgrade memshare"):
        PoolStore.open(url)
    assert dump(engine) == before
    engine.dispose()


def next_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    folder = tmp_path / "migrations"
    shutil.copytree(engine.MIGRATIONS, folder)
    (folder / "versions" / "v9002_next.py").write_text(NEXT.format(down=HEAD, fault=fault))
    monkeypatch.setattr(engine, "MIGRATIONS", folder)
    monkeypatch.setattr(engine, "HEAD", "9002")


def test_a_filled_pool_is_migrated_forwards(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = fill(url)
    next_version(tmp_path, monkeypatch, "")
    with PoolStore.open(url) as store:
        assert [m.id for m in store.iter("main")] == ids
        store.append([NewMemory("main", "after", "answer")])
        with store._db.read() as connection:
            standing = connection.exec_driver_sql("SELECT standing FROM memories").scalars()
            assert list(standing) == [1.0] * 51
    PoolStore.open(url).close()


def test_a_migration_that_fails_leaves_the_old_version_whole(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = fill(url)
    with monkeypatch.context() as patch:
        next_version(tmp_path, patch, 'op.execute("INSERT INTO no_such_table VALUES (1)")')
        with pytest.raises(PoolError, match="no_such_table"):
            PoolStore.open(url)
    with PoolStore.open(url) as store:
        assert [m.id for m in store.iter("main")] == ids
        with store._db.read() as connection:
            columns = sa.inspect(connection).get_columns("memories")
            assert "standing" not in [column["name"] for column in columns]
