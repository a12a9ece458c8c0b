"""Near-duplicates on write: dropped or merged by policy, on the path that the gateway takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from memshare.config import Config
from memshare.pool.errors import PoolError
from memshare.pool.feedback import Standing
from memshare.pool.schema import copies
from memshare.pool.uses import UseCounts
from memshare.records import NewMemory
from memshare.retrieval.filters import Filter, terms_of
from memshare.sharing import Pair, SharedMemory, open_shared
from memshare.sharing.turn import NEAR_DUPLICATE
from tests.loop import loop_config

FIRST = "the old lamp in the green tower burns all night"
NEAR = "the old lamp in the green tower burns all  night!"
FAR = "seven wolves cross a frozen river"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


Run = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path, models: Path) -> Run:
    """Run a function with the loop's parts; ``pool``: settings of the pool that is watched.

    ``url``: of another database than an SQLite file.
    """

    def runner(body: Callable[[SharedMemory], None], url: str | None = None, **pool: Any) -> None:
        pools = {"keep": {"threshold": 0, **pool}, "strict": {}, "unserved": dict(pool)}

        async def inside() -> None:
            config = loop_config(
                tmp_path / "run", models, pools=pools, database_url=url,
                retriever={"pools": ["keep", "strict"]},
            )  # fmt: skip
            async with open_shared(config) as shared:
                await shared.write(body, shared)

        asyncio.run(inside())

    return runner


def new(prompt: str, pool: str = "keep", **more: Any) -> NewMemory:
    return NewMemory(pool, prompt, "an answer", **more)


def prompts(shared: SharedMemory, pool: str = "keep") -> list[str]:
    return [memory.prompt for memory in shared.store.iter(pool)]


def test_off_by_default_and_where_nothing_can_be_searched(run: Run) -> None:
    def body(shared: SharedMemory) -> None:
        shared.writer.append_visible(
            [new(FIRST), new(NEAR), new(FIRST, "strict"), new(NEAR, "strict")]
        )
        assert prompts(shared) == prompts(shared, "strict") == [FIRST, NEAR]

    run(body)


def test_dropped_and_answered_as_a_duplicate(run: Run, url: str) -> None:
    def body(shared: SharedMemory) -> None:
        (first,) = shared.writer.append_visible([new(FIRST, score=10)])
        batch = [new(FAR), new(NEAR, score=99), new(FIRST)]
        batch += [new(text, pool) for pool in ("strict", "unserved") for text in (FIRST, NEAR)]
        far, near, same, *others = shared.writer.append_visible(batch)
        assert far.status == "stored"
        assert (near.status, near.id, near.seq) == ("duplicate", first.id, first.seq)
        assert (same.status, same.id) == ("duplicate", first.id)
        assert {result.status for result in others} == {"stored"}
        assert prompts(shared) == [FIRST, FAR]

    run(body, url, near_duplicate=0.9)


def test_two_of_one_batch_are_near_duplicates_too(run: Run) -> None:
    def body(shared: SharedMemory) -> None:
        first, second = shared.writer.append_visible([new(FIRST), new(NEAR)])
        assert (second.status, second.id) == ("duplicate", first.id)

    run(body, near_duplicate=0.9)


def test_writers_side_by_side_slip_nothing_in(run: Run, url: str) -> None:
    def body(shared: SharedMemory) -> None:
        with ThreadPoolExecutor(8) as pool:
            texts = [FIRST + mark for mark in ("", *"!?.,;:-")]
            results = list(
                pool.map(lambda text: shared.writer.append_visible([new(text)])[0], texts)
            )
        assert sorted(result.status for result in results) == ["duplicate"] * 7 + ["stored"]
        assert len(prompts(shared)) == len({result.id for result in results}) == 1

    run(body, url, near_duplicate=0.8)


@pytest.mark.parametrize("action", ["drop", "merge"])
def test_what_another_gateway_slipped_in_wins_by_its_place(
    tmp_path: Path, models: Path, url: str, action: str
) -> None:
    """The two share a database; the second one hears of nothing but its own writes in time."""
    settings = {"threshold": 0, "near_duplicate": 0.9, "near_duplicate_action": action}
    pools = {"keep": settings}

    def config(name: str) -> Config:
        return loop_config(
            tmp_path / name, models, pools=pools, database_url=url,
            retriever={"poll_seconds": 600.0},
        )  # fmt: skip

    async def inside() -> None:
        async with open_shared(config("a")) as a, open_shared(config("b")) as b:
            await a.append([new(FAR)])
            known, more = {"a": 1, "b": 1}, {"b": 2, "c": "new"}
            # PostgreSQL may tell of it all the same, and then the better grade decides.
            grade = 100 if "postgres" in url else None
            early = new(FIRST, score=grade, metadata=known)
            (first,) = await a.append([early])
            late = new(NEAR, score=99, metadata=more)
            (second,) = await b.append([late])
            assert (second.status, second.id, second.seq) == ("duplicate", first.id, first.seq)
            assert prompts(a) == [FAR, FIRST]
            memory = a.store.get(first.id)
            assert memory and memory.metadata == (known if action == "drop" else {**more, **known})
            early = new("an apple in the snow", score=grade)
            (other,) = await a.append([early])
            assert other.status == "stored"
            # the scorer's path, the other way round
            pair = Pair("keep", "an apple in the snow!", "an answer")
            decision = await b.grade_and_store(pair)
            assert (decision.status, decision.memory_id) == ("duplicate", other.id)
            assert decision.reason == NEAR_DUPLICATE

    asyncio.run(inside())


@pytest.mark.parametrize(
    ("old", "score", "kept"), [(50, 60, NEAR), (None, 1, NEAR), (60, 60, FIRST), (50, None, FIRST)]
)
def test_merged_the_better_graded_one_stays(
    run: Run, url: str, old: float | None, score: float | None, kept: str
) -> None:
    def body(shared: SharedMemory) -> None:
        shared.writer.append_visible([new(FIRST, score=old, metadata={"a": 1, "b": 1})])
        more = {"b": 2, "c": "new"}
        (result,) = shared.writer.append_visible([new(NEAR, score=score, metadata=more)])
        assert result.status == ("stored" if kept == NEAR else "duplicate")
        (memory,) = shared.store.iter("keep")
        assert (memory.id, memory.prompt) == (result.id, kept)
        assert memory.metadata == {"a": 1, "b": 2 if kept == NEAR else 1, "c": "new"}
        shared.searcher.wait_visible("keep", shared.store.last_seq("keep"), 10)
        for term in (("a", 1), ("c", "new")):  # filters know of both
            restrict = Filter(terms=terms_of(dict([term])))
            assert [hit.id for hit in shared.searcher.search("keep", FIRST, 5, restrict).hits] == [
                memory.id
            ]
        found = shared.searcher.search("keep", FIRST, 5)
        assert {hit.id for hit in found.hits} - {memory.id} <= {first_id(shared)}

    def first_id(shared: SharedMemory) -> str:
        return shared.store.changes("keep", 0)[0].id  # its mask may come a moment later

    run(body, url, near_duplicate=0.9, near_duplicate_action="merge")


def test_the_survivor_takes_over_what_is_known_of_the_other(run: Run) -> None:
    def body(shared: SharedMemory) -> None:
        (first,) = shared.writer.append_visible([new(FIRST, score=50, agent="ann")])
        (copy,) = shared.writer.append_visible([new(FAR, copy_of=first.id)])
        for principal in ("ben", "cat", "dan"):
            shared.feedback.give(first.id, principal, -1.0)
        UseCounts(shared.store.database).add({first.id: 7})
        (second,) = shared.writer.append_visible([new(NEAR, score=60, agent="dan")])
        assert (second.status, shared.store.get(first.id)) == ("stored", None)
        # but not what its own author said
        assert shared.feedback.standings([first.id, second.id]) == {second.id: Standing(-0.5, 2)}
        assert UseCounts(shared.store.database).of_pool("keep") == {second.id: 7}
        with shared.store.database.read() as connection:
            rows = connection.execute(sa.select(copies)).all()
        assert [tuple(row) for row in rows] == [(copy.id, second.id)]

    run(body, near_duplicate=0.9, near_duplicate_action="merge", hold_below=None)


def test_what_is_merged_at_one_moment_is_all_kept(run: Run, url: str) -> None:
    """As by several gateways, which look at what is there before any of them writes."""

    def body(shared: SharedMemory) -> None:
        (first,) = shared.writer.append_visible([new(FIRST, metadata={"first": True})])
        with ThreadPoolExecutor(8) as pool:
            more = [{f"writer {n}": n, "first": False} for n in range(8)]
            assert all(pool.map(lambda one: shared.store.amend(first.id, one), more))
        memory = shared.store.get(first.id)
        assert memory and memory.metadata == {
            "first": True, **{f"writer {n}": n for n in range(8)}
        }  # fmt: skip
        seq = shared.store.last_seq("keep")
        for useless in ({"writer 1": 7}, {"much": "x" * 40_000}):
            assert not shared.store.amend(first.id, useless)
        assert shared.store.last_seq("keep") == seq

    run(body, url)


def test_what_another_gateway_merges_into_what_is_replaced_is_kept(run: Run, url: str) -> None:
    def body(shared: SharedMemory) -> None:
        near = shared.writer._near
        (old,) = shared.writer.append_visible([new(FIRST, score=10.0)])
        with near.place(new(NEAR, score=90.0)) as place:
            assert place.new is not None
            shared.store.amend(old.id, {"late": 1})  # between our look and our write
            (better,) = shared.writer._append([place.new], {})
            assert near.confirm(place, better.id) is None
        (kept,) = shared.store.iter("keep")
        assert (kept.id, kept.metadata) == (better.id, {"late": 1})

        found = near.find

        def late(memory: NewMemory) -> Any:
            """It is replaced just when we have found it."""
            twin = found(memory)
            if twin is not None and twin.id == kept.id:
                (best,) = shared.writer._append([new(f"{FIRST}!!", score=95.0)], {})
                shared.store.delete(twin.id, best.id, metadata=True)
            return twin

        near.find = late  # type: ignore[method-assign]
        (told,) = shared.writer.append_visible([new(f"{NEAR}?", score=5.0, metadata={"mine": 2})])
        (kept,) = shared.store.iter("keep")
        assert (told.status, told.id) == ("duplicate", kept.id)
        assert kept.metadata == {"late": 1, "mine": 2}

    run(body, url, near_duplicate=0.9, near_duplicate_action="merge")


def test_merging_never_loses_a_write_to_too_much_metadata(run: Run) -> None:
    def body(shared: SharedMemory) -> None:
        shared.writer.append_visible([new(FIRST, score=1, metadata={"a": "x" * 20_000})])
        shared.writer.append_visible([new(NEAR, score=2, metadata={"b": "y" * 20_000})])
        (memory,) = shared.store.iter("keep")
        assert set(memory.metadata) == {"b"}

    run(body, near_duplicate=0.9, near_duplicate_action="merge")


def test_a_held_or_deleted_memory_has_no_near_duplicates(run: Run) -> None:
    def body(shared: SharedMemory) -> None:
        first, _ = shared.writer.append_visible([new(FIRST), new(FAR)])
        shared.store.delete(first.id)
        (near,) = shared.writer.append_visible([new(NEAR)])
        assert near.status == "stored"

    run(body, near_duplicate=0.9)


def test_an_equal_memory_is_a_plain_duplicate_however_well_graded(run: Run) -> None:
    def body(shared: SharedMemory) -> None:
        (first,) = shared.writer.append_visible([new(FIRST, score=1)])
        (again,) = shared.writer.append_visible([new(FIRST.upper(), score=99)])
        assert (again.status, again.id) == ("duplicate", first.id)
        assert prompts(shared) == [FIRST]

    run(body, near_duplicate=0.5, near_duplicate_action="merge")


def test_answers_that_the_scorer_lets_in_are_compared_too(tmp_path: Path, models: Path) -> None:
    async def inside() -> None:
        pools = {"keep": {"threshold": 0, "near_duplicate": 0.9}, "strict": {}}
        async with open_shared(loop_config(tmp_path / "run", models, pools=pools)) as shared:
            stored = await shared.grade_and_store(Pair("keep", FIRST, "an answer"))
            near = await shared.grade_and_store(Pair("keep", NEAR, "an answer"))
            assert (near.status, near.memory_id) == ("duplicate", stored.memory_id)
            assert prompts(shared) == [FIRST]
            assert shared.store.decisions("keep") == {"near-duplicate": 1, "stored": 1}

    asyncio.run(inside())


def test_a_searcher_that_can_not_be_asked_is_no_store(run: Run) -> None:
    def body(shared: SharedMemory) -> None:
        shared.searcher.close()
        with pytest.raises(PoolError, match="near-duplicates can't be looked for"):
            shared.writer.append_visible([new(FIRST)])
        assert prompts(shared) == []

    run(body, near_duplicate=0.9)
