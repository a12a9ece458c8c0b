"""What is deleted or held leaves the examples, also while they are mined and written."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memshare.config import load_config
from memshare.pool.store import PoolStore
from memshare.records import Example, Memory, NewMemory
from memshare.training import erasing
from memshare.training.erasing import erase, erase_deleted, write_living
from memshare.training.examples import (
    SCHEMA,
    held_out_dir,
    read_examples,
    read_shard,
    round_dir,
    shard_path,
    write_shard,
)
from memshare.training.labels import Labeller
from memshare.training.mining import mine
from memshare.training.mining_plan import plan_round, split_memories
from memshare.training.rounds import open_spans
from memshare.training.shard import ExamplesError
from tests.mining import make_config, mine_round, open_pool
from tests.training_data import candidate, write_round
from tests.training_data import example as made


def example(query_id: str, candidates: tuple[str, ...] = ("c1", "c2")) -> Example:
    shown = tuple(candidate(name, f"text {name}", -1.0) for name in candidates)
    return made(query_id, candidates=shown)


def test_erase_reaches_queries_and_candidates_of_every_round(tmp_path: Path) -> None:
    first = write_round(
        round_dir(tmp_path, 1), [example("a"), example("b")], [example("c", ("a",))]
    )
    write_shard(shard_path(round_dir(tmp_path, 2), 0), [example("d", ("c1", "zz"))])  # unfinished
    untouched = shard_path(first, 0).stat().st_mtime_ns
    assert erase(tmp_path, ["zz"]) == 1
    assert shard_path(first, 0).stat().st_mtime_ns == untouched
    assert erase(tmp_path, {"a", "c1"}) == 3
    assert [row.query_id for row in read_examples(first)] == ["b", "c"]
    assert [[c.id for c in row.candidates] for row in read_examples(first)] == [["c2"], []]
    assert read_shard(shard_path(round_dir(tmp_path, 2), 0))[0].candidates == ()
    assert erase(tmp_path, {"a", "c1"}) == 0
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*.parquet"))
    assert b"question a" not in everything


def test_only_shards_that_have_an_id_become_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every round ever mined is searched at each deletion."""
    rows = [[example(f"q{n}", (f"c{n}", "common"))] for n in range(6)]
    write_round(round_dir(tmp_path, 1), *rows[:3], [])
    write_round(round_dir(tmp_path, 2), *rows[3:])
    read: list[Path] = []
    monkeypatch.setattr(erasing, "read_shard", lambda path: read.append(path) or read_shard(path))
    assert erase(tmp_path, ["elsewhere", "c"]) == 0 and not read
    assert erase(tmp_path, ["q1", "c4"]) == 2
    assert read == [shard_path(round_dir(tmp_path, 1), 1), shard_path(round_dir(tmp_path, 2), 1)]
    assert erase(tmp_path, ["common"]) == 5  # the query of one went before


def test_ids_are_found_in_shards_of_other_forms(tmp_path: Path) -> None:
    """With columns in another order, of other types, and other names of the lists' items."""
    path = shard_path(
        write_round(round_dir(tmp_path, 1), [example("a", ("x", "y")), example("b")]), 0
    )
    table = pq.read_table(path)
    schema = pa.schema([
        field.with_type(pa.large_string()) if field.type == pa.string() else field
        for field in table.schema
    ])  # fmt: skip
    for other in (
        table.select(table.column_names[::-1]).replace_schema_metadata(),
        table.cast(schema),
        table.cast(SCHEMA),
    ):
        pq.write_table(other, path, use_compliant_nested_type=False)
        assert erase(tmp_path, ["nowhere"]) == 0
        assert erase(tmp_path, ["y"]) == 1
        assert [c.id for c in read_shard(path)[0].candidates] == ["x"]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty", "null"])
def test_a_damaged_shard_stops_erasing(tmp_path: Path, damage: str) -> None:
    folder = write_round(round_dir(tmp_path, 1), [example("a")], [example("b")])
    path = shard_path(folder, 1)
    if damage == "foreign":
        pq.write_table(pa.table({"x": [1]}), path)
    elif damage == "null":
        table = pq.read_table(path)
        nothing = pa.nulls(1, table["query_id"].type)
        pq.write_table(table.set_column(0, "query_id", nothing), path)
    else:
        path.write_bytes(path.read_bytes()[:-100] if damage == "truncated" else b"")
    with pytest.raises(ExamplesError, match=r"shard-00001\.parquet"):
        erase(tmp_path, ["nowhere"])


def test_no_flipped_byte_hides_an_id(tmp_path: Path) -> None:
    path = shard_path(tmp_path / "000001", 0)
    write_shard(path, [example(f"q{i}", (f"c{i}", f"d{i}")) for i in range(50)])
    content = path.read_bytes()
    for position in range(0, len(content), 31):
        flipped = bytearray(content)
        flipped[position] ^= 0xFF
        path.write_bytes(flipped)
        try:
            assert erase(tmp_path, ["c7", "q9"]) == 1
        except ExamplesError:
            continue
        left = read_shard(path)
        assert len(left) == 49 and sum(len(each.candidates) for each in left) == 97


@pytest.mark.parametrize("change", ["delete", "hold"])
@pytest.mark.parametrize("fate", ["train", "held_out"])
def test_what_goes_while_it_is_measured_is_in_no_shard(
    tmp_path: Path, change: str, fate: str
) -> None:
    """Though another share, or the waiting loop, has looked before the shard stood."""
    config = load_config(
        None,
        [f"run.dir={tmp_path}", "training.eval_every=5", "mining.dense_candidates=0",
         "split.held_out=0.3"],
    )  # fmt: skip
    rows = [NewMemory("main", f"how is thing {i} made", f"so {i}") for i in range(80)]
    folder, gone = round_dir(config.examples_dir, 1), []

    async def run(store: PoolStore) -> None:
        fates = split_memories(store, config)

        async def measure(query: Memory, shown: Memory | None) -> float | None:
            if shown is not None and not gone and fates[query.id] == fate:
                gone.extend([query, shown])
                for memory in gone:
                    assert getattr(store, change)(memory.id)
                erase_deleted(store, config.examples_dir, ("main",))
            return -1.0

        plan = plan_round(store, config, 1, open_spans(store, {}, ("main",)), fates, folder, None)
        await mine(store, config, plan, fates, Labeller("made", measure, True), folder, None)

    with open_pool(config, rows) as store:
        asyncio.run(run(store))
        assert erase_deleted(store, config.examples_dir, ("main",)) == 0
    left = [*read_examples(folder), *read_examples(held_out_dir(folder))]
    assert left and gone
    seen = {each.query_id for each in left} | {c.id for each in left for c in each.candidates}
    assert not seen & {memory.id for memory in gone}
    shards = [pq.read_table(path) for path in folder.rglob("shard-*.parquet")]
    assert all(repr(gone[0].prompt) not in repr(shard.to_pylist()) for shard in shards)


class Deleting(PoolStore):
    """Deletes a memory when it has been asked about it; another process starts to erase it then."""

    victim = ""

    def get_many(self, ids):
        found = super().get_many(ids)
        if self.victim in found:
            self.delete(self.victim)
            self.eraser.start()
            self.eraser.join(0.3)  # it waits
        return found


def test_nobody_erases_between_the_look_and_the_writing(tmp_path: Path) -> None:
    with Deleting.open(f"sqlite:///{tmp_path / 'pool.db'}") as store:
        store.create_pool("main")
        ids = [r.id for r in store.append([NewMemory("main", t, "yes") for t in "abc"])]
        examples, path = tmp_path / "examples", shard_path(tmp_path / "examples/000001", 0)
        store.victim = ids[1]
        store.eraser = threading.Thread(target=erase_deleted, args=(store, examples, ("main",)))
        write_living(store, examples, path, [example(ids[0], (ids[1], ids[2]))])
        store.eraser.join(30)
        erase_deleted(store, examples, ("main",))
    (left,) = read_shard(path)
    assert [each.id for each in left.candidates] == [ids[2]]


@pytest.mark.parametrize("record", ["there", "lost", "damaged"])
def test_a_pool_that_is_served_no_more_is_erased_from_too(tmp_path: Path, record: str) -> None:
    """Its examples are still there, and those of other pools may be trained on with them."""
    config = make_config(tmp_path)
    examples = config.examples_dir
    with open_pool(config, [NewMemory("main", f"thing {i}", "so") for i in range(40)]) as store:
        store.create_pool("other")
        assert erase_deleted(store, examples, ("main",)) == 0
        mined, _ = mine_round(store, config)
        store.delete(mined[0].query_id)
        if record != "there":
            (examples / "erased.json").write_text("{")
        if record == "lost":
            (examples / "erased.json").unlink()
        assert erase_deleted(store, examples, ("other",)) > 0
        left = list(read_examples(round_dir(examples, 1)))
        assert len(left) == len(mined) - 1
        assert mined[0].query_id not in {c.id for each in left for c in each.candidates}
        store.hold(mined[1].query_id)
        assert erase_deleted(store, examples, ("other",)) > 0
        assert erase_deleted(store, examples, ("other",)) == 0


def test_a_pool_that_is_in_the_database_no_more_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/erased.json").write_text('{"gone": 7}')
    with PoolStore.open(f"sqlite:///{tmp_path / 'pool.db'}") as store:
        store.create_pool("main")
        assert erase_deleted(store, tmp_path / "examples", ("main",)) == 0
        store.append([NewMemory("main", "a", "yes")])
        assert erase_deleted(store, tmp_path / "examples", ("main",)) == 0
    assert json.loads((tmp_path / "examples/erased.json").read_text()) == {"gone": 7, "main": 1}


def test_what_a_killed_writer_has_left_goes_too(tmp_path: Path) -> None:
    with PoolStore.open(f"sqlite:///{tmp_path / 'pool.db'}") as store:
        store.create_pool("main")
        (made,) = store.append([NewMemory("main", "a secret", "yes")])
        left = [tmp_path / "examples/000001" / part for part in ("", "held_out")]
        for folder in left:
            folder.mkdir(parents=True)
            (folder / ".shard-00000.parquet.77.tmp").write_text("a secret")
        erase_deleted(store, tmp_path / "examples", ("main",))
        assert all(list(folder.glob(".shard-*")) for folder in left)  # nothing was deleted yet
        store.delete(made.id)
        erase_deleted(store, tmp_path / "examples", ("main",))
    assert not [*tmp_path.rglob(".shard-*")]
