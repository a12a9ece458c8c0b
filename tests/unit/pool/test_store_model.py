"""Random interleavings of append, delete, hold and release against a simple model."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memshare.pool import PoolStore
from memshare.records import NewMemory, content_key

PROMPTS = ["Cat", "cat ", "CAT", "dog", "Straße", "STRASSE", "é", "e\u0301", "雨", "dog  dog"]
ANSWERS = ["yes", "no"]
_numbers = count()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolStore]:
    folder: Path = tmp_path_factory.mktemp("model")
    with PoolStore.open(f"sqlite:///{folder}/pool.db") as opened:
        yield opened


contents = st.tuples(st.sampled_from(PROMPTS), st.sampled_from(ANSWERS))
operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(contents, max_size=5)),
        st.tuples(st.sampled_from(["delete", "hold", "release"]), st.integers(0, 7)),
    ),
    max_size=15,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(operations)
def test_the_store_behaves_like_the_model(store: PoolStore, steps: list[tuple]) -> None:
    pool = f"pool {next(_numbers)}"
    store.create_pool(pool)
    alive: dict[str, dict] = {}  # id -> row
    order: list[str] = []  # every id ever given
    log: list[tuple[int, str, str]] = []
    for kind, value in steps:
        if kind == "append":
            results = store.append([NewMemory(pool, prompt, answer) for prompt, answer in value])
            for (prompt, answer), result in zip(value, results, strict=True):
                key = content_key(pool, prompt, answer)
                there = [id for id, row in alive.items() if row["key"] == key]
                if there:
                    assert (result.status, result.id) == ("duplicate", there[0])
                    continue
                assert result.status == "stored"
                assert result.id not in order
                log.append((len(log) + 1, "add", result.id))
                assert result.seq == len(log)
                alive[result.id] = {
                    "key": key, "prompt": prompt, "answer": answer, "seq": len(log), "held": False
                }  # fmt: skip
                order.append(result.id)
            continue
        id = order[value] if value < len(order) else "unknown"
        row = alive.get(id)
        possible = row is not None and (kind == "delete" or row["held"] == (kind == "release"))
        assert getattr(store, kind)(id) == possible
        if possible:
            assert row is not None
            log.append((len(log) + 1, kind, id))
            if kind == "delete":
                del alive[id]
            else:
                row["held"] = kind == "hold"
    assert [(c.seq, c.kind, c.id) for c in store.changes(pool, 0)] == log
    assert store.last_seq(pool) == len(log)
    every = list(store.iter(pool, include_held=True))
    assert [(m.id, m.prompt, m.answer, m.seq, m.held) for m in every] == [
        (id, row["prompt"], row["answer"], row["seq"], row["held"]) for id, row in alive.items()
    ]
    assert [m.id for m in store.iter(pool)] == [m.id for m in every if not m.held]
    assert set(store.get_many(order)) == set(alive)
    stats = store.stats(pool)
    assert (stats.memories, stats.deleted) == (len(alive), len(order) - len(alive))
