"""Policies, caps and dry runs, on real pools with a tiny encoder."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from memshare.cli import main
from memshare.config import Config
from memshare.pool.errors import UnknownPool
from memshare.pool.feedback import Feedback
from memshare.pool.store import PoolStore
from memshare.pool.uses import UseCounts
from memshare.pruning import policies
from memshare.pruning.cli import SHIPPED
from memshare.pruning.prune import PruneError, check_caps, hold_caps, prune
from memshare.records import Candidate, Example, NewMemory
from memshare.retrieval.encoder import Encoder
from memshare.training.examples import round_dir, shard_path, write_marker, write_shard
from tests.retrieving import make_config, open_store, publish_now, sentence
from tests.tiny import tiny_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def config(tmp_path: Path, folder: Path) -> Config:
    return make_config(tmp_path / "run", folder)


@pytest.fixture
def store(config: Config) -> Iterator[PoolStore]:
    with open_store(config) as opened:
        yield opened


def add(store: PoolStore, *prompts: str, **more: Any) -> list[str]:
    results = store.append([NewMemory("p", prompt, "an answer", **more) for prompt in prompts])
    return [result.id for result in results]


def with_pool(config: Config, **settings: Any) -> Config:
    return Config(**{**config.model_dump(), "pools": {"p": settings}})


def left(store: PoolStore) -> list[str]:
    return [memory.id for memory in store.iter("p")]


def test_score_takes_the_worst_and_an_ungraded_one_as_just_admitted(
    store: PoolStore, config: Config
) -> None:
    store.set_pool("p", threshold=70)
    scores = {"a": 90.0, "b": 71.0, "c": None, "d": 69.0, "e": 69.0}
    ids = {name: add(store, name, score=score)[0] for name, score in scores.items()}
    report = prune(store, config, "p", "score", 1, dry_run=True)
    assert report.ids == tuple(ids[name] for name in "decb")


def test_age_takes_the_oldest_in_the_pool(store: PoolStore, config: Config) -> None:
    a, b, c = add(store, "a", "b", "c")
    assert prune(store, config, "p", "age", 1).ids == (a, b)
    assert left(store) == [c]


def test_use_takes_the_least_found_and_gives_new_ones_a_chance(
    store: PoolStore, config: Config
) -> None:
    old = "2020-01-01T00:00:00Z"
    never, seldom, often = add(store, "never", "seldom", "often", created_at=old)
    (fresh,) = add(store, "fresh")
    counts = UseCounts(store.database)
    counts.add({seldom: 2, often: 400})
    counts.add({seldom: 1, often: 5000})
    assert counts.of_pool("p") == {seldom: 3, often: 5400}
    report = prune(store, config, "p", "use", 1)
    assert report.ids == (never, seldom, fresh)
    assert counts.of_pool("p") == {often: 5400}


def test_feedback_takes_what_principals_think_least_of(store: PoolStore, config: Config) -> None:
    a, b, c, d = add(store, "a", "b", "c", "d")
    feedback = Feedback(store.database)
    for principal in ("ann", "bob"):
        feedback.give(a, principal, 1.0)
        feedback.give(c, principal, -1.0)
    feedback.give(d, "ann", -1.0)
    assert prune(store, config, "p", "feedback", 0, dry_run=True).ids == (c, d, b, a)


def example(query: str, baseline: float | None, **logliks: float | None) -> Example:
    candidates = tuple(
        Candidate(id, id, rank, loglik, id) for rank, (id, loglik) in enumerate(logliks.items())
    )
    return Example(
        query, query, "answer", "p", None, 1, 1, "lm", "likelihood", baseline, candidates
    )


def test_usefulness_takes_what_helped_least_when_shown(
    store: PoolStore, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["unknown", "harmful", "once", "always", "unmeasured", "late"]
    for name in names:
        add(store, name, id=name)
    rounds = [
        [replace(example("q0", 0.0, harmful=1.0), labels="reward")],  # another measure, of before
        [example("q1", -2.0, harmful=-3.0, once=-1.5, always=-1.5, unmeasured=None)],
        [example("q2", -2.0, always=-1.5), example("q3", None, harmful=9.0)],
        [replace(example("q4", -2.0, harmful=9.0), pool="another")],
    ]
    homes = [round_dir(config.examples_dir, number + 1) for number in range(len(rounds))]
    homes.append(round_dir(config.examples_dir, 3, iteration=2))  # what the first one's encoder
    rounds.append([example("q2", -2.0, late=-0.5)])  # proposed
    for home, examples in zip(homes, rounds, strict=True):
        home.mkdir(parents=True)
        write_shard(shard_path(home, 0), examples)
        write_marker(home, {"shards": 1})
    report = prune(store, config, "p", "usefulness", 0, dry_run=True)
    assert report.ids == ("harmful", "unknown", "unmeasured", "once", "always", "late")
    assert "the oldest go first" not in capsys.readouterr().err
    unjudged = config.model_copy(update={"run": config.run.model_copy(update={"dir": Path("no")})})
    prune(store, unjudged, "p", "usefulness", 0, dry_run=True)
    assert "p: no memory's gain was ever measured" in capsys.readouterr().err


@pytest.mark.parametrize("published", [False, True])
def test_near_duplicates_take_the_worse_graded_of_the_nearest_pair(
    store: PoolStore, config: Config, folder: Path, published: bool
) -> None:
    rng = random.Random(0)
    alone = add(store, *(sentence(rng) for _ in range(20)), score=50)
    (good, bad) = (
        add(store, "the green lamp of the old tower", score=90)[0],
        add(store, "the green lamp of the old  tower!", score=60)[0],
    )
    if published:
        publish_now(store, config, Encoder.from_folder(folder, device="cpu"))
    (late,) = add(store, "the green lamp of the old tower!!", score=70)  # newer than the index
    report = prune(store, config, "p", "near-duplicates", len(alone) + 1)
    assert set(report.ids) == {bad, late}
    assert set(left(store)) == {*alone, good}
    everything = prune(store, config, "p", "near-duplicates", 0, dry_run=True).ids
    assert sorted(everything) == sorted([*alone, good]), "each is ranked once"


@pytest.mark.parametrize("published", [False, True])
def test_leave_one_out_takes_what_the_pool_itself_contradicts(
    store: PoolStore, config: Config, folder: Path, published: bool
) -> None:
    rng = random.Random(0)
    said = [f"the green lamp of the old tower {sentence(rng, 2)}" for _ in range(20)]
    again = [f"wolf paper cloud salt clock bread {sentence(rng, 2)}" for _ in range(20)]
    for prompts, answer in ((said, "lamps are green"), (again, "wolves are grey")):
        store.append([NewMemory("p", prompt, answer) for prompt in prompts])
    (wrong,) = store.append([NewMemory("p", "the green lamp of the old tower", "wolves are grey")])
    if published:
        publish_now(store, config, Encoder.from_folder(folder, device="cpu"))
    assert prune(store, config, "p", "leave-one-out", 40).ids == (wrong.id,)


@pytest.mark.parametrize("published", [False, True])
def test_pruning_leaves_the_gpu_alone(
    store: PoolStore, config: Config, folder: Path, published: bool
) -> None:
    """It runs in the loop's process, beside programs that want all of it."""
    add(store, "a", "b")
    if published:
        publish_now(store, config, Encoder.from_folder(folder, device="cpu"))
    on_gpu = config.encoder.model_copy(update={"device": "cuda"})
    evidence = policies.Evidence(store, config.model_copy(update={"encoder": on_gpu}), "p")
    assert len(evidence.questions) == len(evidence.vectors) == 2


def test_a_policy_is_told_how_many_are_to_go(store: PoolStore, config: Config) -> None:
    add(store, "a", "b", "c")
    assert [policies.Evidence(store, config, "p", cap).excess for cap in (0, 2, 5)] == [3, 1, 0]


@pytest.mark.parametrize("policy", list(policies.POLICIES))
def test_a_dry_run_tells_what_would_go_and_changes_nothing(
    store: PoolStore, config: Config, policy: str
) -> None:
    rng = random.Random(1)
    ids = add(store, *(sentence(rng) for _ in range(9)))
    store.hold(ids[0])
    position = store.last_seq("p")
    planned = prune(store, config, "p", policy, 5, dry_run=True)
    assert (planned.before, len(planned.ids), store.last_seq("p")) == (8, 3, position)
    done = prune(store, config, "p", policy, 5)
    assert done.ids == planned.ids
    assert set(left(store)) == {*ids[1:]} - {*done.ids}
    assert store.get(ids[0]) is not None, "a held memory neither counts nor goes"
    assert prune(store, config, "p", policy, 5).ids == ()


def test_what_is_put_on_hold_while_a_policy_takes_its_time_stays(
    store: PoolStore, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c, d = add(store, "a", "b", "c", "d")

    def slow(evidence: policies.Evidence) -> list[str]:
        store.hold(a)
        store.delete(b)
        return [entry.id for entry in evidence.entries]

    monkeypatch.setitem(policies.POLICIES, "slow", slow)
    assert prune(store, config, "p", "slow", 1).ids == (c,)
    assert left(store) == [d] and store.get(a) is not None


def test_what_can_not_be_done_is_refused(store: PoolStore, config: Config) -> None:
    add(store, "a", "b")
    with pytest.raises(
        PruneError,
        match=r"no pruning policy 'luck' \(there: age, feedback, leave-one-out, near-dup",
    ):
        prune(store, config, "p", "luck", 1)
    with pytest.raises(PruneError, match="negative"):
        prune(store, config, "p", "age", -1)
    with pytest.raises(UnknownPool):
        prune(store, config, "nope", "age", 1)
    assert len(left(store)) == 2


def newest_first(evidence: policies.Evidence) -> list[str]:
    return [entry.id for entry in reversed(evidence.entries)]


def half(evidence: policies.Evidence) -> list[str]:
    return newest_first(evidence)[::2]


def test_policies_come_in_as_plug_ins(
    store: PoolStore, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def points(group: str, name: str | None = None) -> list[EntryPoint]:
        assert group == "memshare.pruning"
        made = [EntryPoint(n, f"{__name__}:{f}", group) for n, f in
                (("newest", "newest_first"), ("broken", "half"))]  # fmt: skip
        return [point for point in made if name in (None, point.name)]

    monkeypatch.setattr(policies, "entry_points", points)
    a, b, c = add(store, "a", "b", "c")
    assert prune(store, config, "p", "newest", 1, dry_run=True).ids == (c, b)
    assert "newest" in policies.policy_names()
    with pytest.raises(PruneError, match="does not rank each memory"):
        prune(store, config, "p", "broken", 1)
    assert left(store) == [a, b, c]


def test_a_cap_is_held_with_some_slack(store: PoolStore, config: Config) -> None:
    capped = with_pool(config, max_memories=40, prune_by="age")
    check_caps(capped)
    ids = add(store, *(f"prompt {n}" for n in range(40)))
    assert hold_caps(store, capped) == []
    ids += add(store, "one more")
    (report,) = hold_caps(store, capped)
    assert report.ids == tuple(ids[:3])
    assert left(store) == ids[3:], "38 are left: not at every write again"
    assert hold_caps(store, capped) == []


def test_held_memories_do_not_fill_a_pool(store: PoolStore, config: Config) -> None:
    capped = with_pool(config, max_memories=4, prune_by="age")
    ids = add(store, *"abcdef")
    for id in ids[:2]:
        store.hold(id)
    assert hold_caps(store, capped) == []
    store.release(ids[0])
    (report,) = hold_caps(store, capped)
    assert report.ids == (ids[0], ids[2])


def test_looking_at_a_cap_reads_no_memory(
    store: PoolStore, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop does it every few seconds, and a database ends a query that takes long."""
    add(store, *"abc")
    for counting in ("stats", "held"):
        monkeypatch.setattr(PoolStore, counting, lambda *_: pytest.fail("the pool was counted"))
    assert hold_caps(store, with_pool(config, max_memories=3)) == []


def test_a_cap_with_a_policy_that_is_not_there_is_found_at_once(config: Config) -> None:
    wrong = Config(
        **{**config.model_dump(), "pools": {"p": {"max_memories": 4, "prune_by": "luck"}}}
    )
    with pytest.raises(PruneError, match=r"pools\.p\.prune_by.*luck"):
        check_caps(wrong)


def test_the_command(store: PoolStore, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = add(store, "a", "b", "c")
    command = ["prune", "--pool", "p", "--policy", "age", "--cap", "1", "--url", config.url]
    assert main([*command, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert (out.split(), err) == ([a, b], "2 of 3 memories would be deleted\n")
    assert main(command) == 0
    assert left(store) == [c]
    assert main([*command[:-1], f"{config.url}.not"]) == 2
    assert main(["prune", "--pool", "x", *command[3:]]) == 2
    assert "no pool 'x'" in capsys.readouterr().err


def test_help_names_every_policy() -> None:
    assert set(SHIPPED) == set(policies.POLICIES)
