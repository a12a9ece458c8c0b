from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from memshare.llm.base import ContextTooLong, LLMError, LogLikelihood
from memshare.llm.hf import TransformersBackend
from memshare.llm.likelihood import Likelihood, LikelihoodCache
from memshare.llm.prompted import Prompted
from memshare.llm.prompts import few_shot


def test_score_is_the_mean_of_the_span(backend: TransformersBackend) -> None:
    likelihood = Likelihood(backend, instruction="be kind")
    shots = [("q1", "a1"), ("q2", "a2")]
    got = asyncio.run(likelihood.score("why", "because", shots))
    plain = asyncio.run(backend.loglikelihood(few_shot("be kind", shots, "why"), "because"))
    assert got == pytest.approx(plain.sum / plain.tokens, abs=1e-5)
    alone = asyncio.run(likelihood.baseline("why", "because"))
    assert alone == pytest.approx(asyncio.run(likelihood.score("why", "because", [])), abs=1e-6)
    assert alone != pytest.approx(got, abs=1e-4)


def test_nothing_is_scored_twice(backend: TransformersBackend, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "likelihood.db"
    cache = LikelihoodCache(path)
    likelihood = Likelihood(backend, cache)

    async def crowd() -> list[float]:
        return await asyncio.gather(*(likelihood.score("why", f"b{i % 3}") for i in range(30)))

    first = asyncio.run(crowd())
    assert likelihood.measured == len(cache) == 3
    assert asyncio.run(crowd()) == first
    assert likelihood.measured == 3
    cache.close()
    reopened = Likelihood(backend, LikelihoodCache(path))
    assert asyncio.run(reopened.score("why", "b1")) == first[1]
    assert reopened.measured == 0


def test_the_key_tells_everything_apart_that_matters(
    backend: TransformersBackend, tmp_path: Path
) -> None:
    cache = LikelihoodCache(tmp_path / "c.db")
    likelihood = Likelihood(backend, cache)

    async def run() -> None:
        await likelihood.score("q", "a", [("b", "c"), ("d", "e")])
        await likelihood.score("q", "a", [("d", "e"), ("b", "c")])
        await likelihood.score("q", "a", [("b", "cd"), ("", "e")])
        await likelihood.score("qa", "a")
        await likelihood.score("q", "aa")
        await Likelihood(backend, cache, "instruction").score("q", "aa")

    asyncio.run(run())
    assert len(cache) == 6
    other = Likelihood(backend, cache)
    assert other._key("q", "a", ()) == likelihood._key("q", "a", [])
    before = other._key("q", "a", ())
    backend.model, name = "other", backend.model
    try:
        assert other._key("q", "a", ()) != before
    finally:
        backend.model = name


def test_one_caller_that_gives_up_does_not_spoil_the_others(backend: TransformersBackend) -> None:
    likelihood = Likelihood(backend)

    async def run() -> float:
        first = asyncio.create_task(likelihood.score("long " * 200, "answer"))
        second = asyncio.create_task(likelihood.score("long " * 200, "answer"))
        await asyncio.sleep(0)
        first.cancel()
        value = await second
        with pytest.raises(asyncio.CancelledError):
            await first
        return value

    assert asyncio.run(run()) < 0
    assert likelihood.measured == 1


def test_failures_are_not_remembered(backend: TransformersBackend, tmp_path: Path) -> None:
    cache = LikelihoodCache(tmp_path / "c.db")
    likelihood = Likelihood(backend, cache)
    with pytest.raises(ContextTooLong):
        asyncio.run(likelihood.score("w " * 3000, "a"))
    with pytest.raises(LLMError, match="empty"):
        asyncio.run(likelihood.score("w", ""))
    assert len(cache) == 0 and not likelihood._flying


def test_several_processes_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "shared.db"
    program = (
        "import sys; from pathlib import Path\n"
        "from memshare.llm.likelihood import LikelihoodCache\n"
        "from memshare.llm.base import LogLikelihood\n"
        "cache = LikelihoodCache(Path(sys.argv[1]))\n"
        "for i in range(200): cache.put(str(i % 150).encode(), LogLikelihood(-1.0 * i, 2))\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", program, str(path)]) for _ in range(3)]
    assert [child.wait(120) for child in children] == [0, 0, 0]
    cache = LikelihoodCache(path)
    assert len(cache) == 150
    assert cache.get(b"7") == LogLikelihood(-7.0, 2)
    assert cache.get(b"none") is None


def test_another_file_is_looked_up_and_left_alone(tmp_path: Path) -> None:
    """Not even SQLite's own files are made beside it: other nodes read it just then."""
    folder = tmp_path / "100% a? #1"
    base = folder / "base.db"
    with closing(LikelihoodCache(base)) as cache:
        cache.put(b"known", LogLikelihood(-1.0, 2))
    before = base.read_bytes()
    with closing(LikelihoodCache(tmp_path / "own.db", base)) as cache:
        cache.put(b"own", LogLikelihood(-3.0, 4))
        assert cache.get(b"known") == LogLikelihood(-1.0, 2)
        assert cache.get(b"own") == LogLikelihood(-3.0, 4) and cache.get(b"none") is None
        assert len(cache) == 1 and list(folder.iterdir()) == [base]
    assert base.read_bytes() == before and list(folder.iterdir()) == [base]
    with closing(LikelihoodCache(tmp_path / "other.db", folder / "nowhere.db")) as cache:
        assert cache.get(b"known") is None
    assert list(folder.iterdir()) == [base]


@pytest.mark.parametrize("damage", ["empty", "cut", "overwritten", "no table"])
def test_what_another_file_does_not_give_is_measured_again(tmp_path: Path, damage: str) -> None:
    """It is read without a lock: who writes it meanwhile may leave it half changed to the eye."""
    base = tmp_path / "base.db"
    keys = [f"{n:0100}".encode() for n in range(400)]
    with closing(LikelihoodCache(base)) as cache:
        for n, key in enumerate(keys):
            cache.put(key, LogLikelihood(-float(n), 1))
    content = base.read_bytes()
    assert len(content) > 4096 * 6
    if damage == "no table":
        with closing(sqlite3.connect(base)) as db:
            db.execute("DROP TABLE likelihoods")
    with closing(LikelihoodCache(tmp_path / "own.db", base)) as cache:
        if damage != "no table":
            kept = content[: 0 if damage == "empty" else 4096 * 3]
            rest = b"\xff" * (len(content) - len(kept)) if damage == "overwritten" else b""
            base.write_bytes(kept + rest)
        found = [cache.get(key) for key in keys]
        assert None in found
        assert all(f in (None, LogLikelihood(-float(n), 1)) for n, f in enumerate(found))


def test_another_file_may_grow_meanwhile(tmp_path: Path) -> None:
    base = tmp_path / "base.db"
    known = [f"known {n}".encode() for n in range(500)]
    with closing(LikelihoodCache(base)) as writing:
        for n, key in enumerate(known):
            writing.put(key, LogLikelihood(-float(n), 1))
    with (
        closing(LikelihoodCache(tmp_path / "own.db", base)) as cache,
        closing(LikelihoodCache(base)) as writing,
    ):
        for n in range(3000):
            writing.put(f"{n} more".encode(), LogLikelihood(-1.0, 1))
            at = n % len(known)
            assert cache.get(known[at]) in (None, LogLikelihood(-float(at), 1))


def test_what_a_killed_share_has_left_is_taken_over(tmp_path: Path) -> None:
    begun, whole = tmp_path / "begun.db", tmp_path / "whole.db"
    begun.touch()  # killed before it made its table
    with closing(LikelihoodCache(whole)) as cache:
        cache.put(b"k", LogLikelihood(-1.0, 2))
    with closing(LikelihoodCache(tmp_path / "all.db")) as cache:
        for path in (begun, whole, tmp_path / "none.db"):
            cache.absorb(path)
        assert len(cache) == 1 and cache.get(b"k") == LogLikelihood(-1.0, 2)


def test_prompted_reads_a_probability(backend: TransformersBackend) -> None:
    value = asyncio.run(Prompted(backend).score("why", "because", [("q", "a")]))
    assert 0.0 <= value <= 1.0
