"""The plan of a round: begun once, and gone on with as it was begun or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from memshare.config import load_config
from memshare.pool.feedback import Feedback
from memshare.pool.store import PoolStore
from memshare.records import NewMemory
from memshare.training.examples import round_dir
from memshare.training.journal import Span
from memshare.training.mining_plan import Plan, plan_round, split_memories
from memshare.training.shard import ExamplesError
from memshare.training.split import Fate


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PoolStore]:
    with PoolStore.open(f"sqlite:///{tmp_path / 'pool.db'}") as store:
        store.create_pool("main")
        prompts = [f"some question of many words, number {i}" for i in range(12)]
        store.append([NewMemory("main", prompt, "an answer") for prompt in prompts])
        yield store


def plan(
    store: PoolStore, folder: Path, *sets: str, until: int = 12, proposer: int | None = None
) -> Plan:
    config = load_config(None, [f"run.dir={folder}", "mining.labels=likelihood", *sets])
    target = round_dir(config.examples_dir, 1)
    target.mkdir(parents=True, exist_ok=True)
    return plan_round(store, config, 1, {"main": Span(0, until)}, {}, target, proposer)


def test_a_round_is_planned_once(store: PoolStore, tmp_path: Path) -> None:
    part = round_dir(tmp_path / "examples", 1) / ".plan.json.1.tmp"
    part.parent.mkdir(parents=True)
    part.touch()  # who planned before was killed while writing
    first = plan(store, tmp_path)
    assert [path.name for path in part.parent.iterdir()] == ["plan.json"]
    for sets, until, proposer, told in (
        ((), 11, None, "span of main '0 to 12', not '0 to 11'"),
        ((), 12, 3, "proposer None, not 3"),
        (("scorer_llm.model=other",), 12, None, "scorer 'pocket', not 'other'"),
        (("bm25.k1=0.5",), 12, None, "bm25 {.*'k1': 1.5.*}, not {.*'k1': 0.5.*}"),
        (("mining.candidates=7",), 12, None, "candidates 16, not 7"),
        (("agent.instruction=Be brief.",), 12, None, "instruction '', not 'Be brief.'"),
    ):
        with pytest.raises(ExamplesError, match=rf"round 1 was begun with {told}; finish"):
            plan(store, tmp_path, *sets, until=until, proposer=proposer)
    # Iterations and what only training looks at change nothing of it.
    assert plan(store, tmp_path, "mining.iterations=2", "training.lr=1e-3") == first


def test_rewards_of_a_round_are_of_one_agent_and_one_scorer(
    store: PoolStore, tmp_path: Path
) -> None:
    first = plan(store, tmp_path, "mining.labels=reward")
    for other in ("agent.max_tokens=9", "agent_llm.model=other", "scorer.kind=likelihood"):
        with pytest.raises(ExamplesError, match=r"was begun with (answers|agent|grades) "):
            plan(store, tmp_path, "mining.labels=reward", other)
    assert plan(store, tmp_path, "mining.labels=reward", "agent.shots=1") == first


def test_a_plan_of_a_version_that_did_not_know_a_setting_yet_is_gone_on_with(
    store: PoolStore, tmp_path: Path
) -> None:
    first = plan(store, tmp_path)
    path = round_dir(tmp_path / "examples", 1) / "plan.json"
    row = json.loads(path.read_text())
    del row["settings"]["min_standing"], row["settings"]["instruction"]
    path.write_text(json.dumps(row))
    assert plan(store, tmp_path).shards == first.shards
    with pytest.raises(ExamplesError, match=r"begun with min_standing -0\.4, not -0\.2; finish"):
        plan(store, tmp_path, "mining.min_standing=-0.2")


def test_memories_on_hold_have_their_fates(store: PoolStore, tmp_path: Path) -> None:
    """So that releasing one moves no other."""
    config = load_config(None, [f"run.dir={tmp_path}", "split.held_out=0.5"])
    ids = [memory.id for memory in store.iter("main")]
    store.hold(ids[0])
    fates = split_memories(store, config)
    assert fates.keys() == set(ids)
    store.release(ids[0])
    assert split_memories(store, config) == fates


def test_a_pool_that_is_served_again_keeps_its_fates(store: PoolStore, tmp_path: Path) -> None:
    """What has been trained on never judges, whatever was served meanwhile, by other settings."""
    store.create_pool("other")
    prompts = [f"a quite different matter, which is {i} of many" for i in range(12)]
    ids = [r.id for r in store.append([NewMemory("other", prompt, "no") for prompt in prompts])]
    sets = [f"run.dir={tmp_path}", "pools={main: {}, other: {}}", "split.near_duplicate=1.0"]

    def split(*more: str) -> dict[str, str]:
        return dict(split_memories(store, load_config(None, [*sets, *more])))

    before = split("split.held_out=0.5")
    assert {before[i] for i in ids} == {"train", "held_out"}
    store.delete(ids[0])  # of what is deleted nothing is kept
    del before[ids[0]]
    trains = next(i for i in ids[1:] if before[i] == "train")
    copy = store.append([NewMemory("main", prompts[ids.index(trains)], "maybe")])[0].id
    away = split("split.held_out=1.0", "retriever.pools=[main]")
    assert away == before | {copy: "train"}  # it is near to one that may come back
    assert split("split.held_out=1.0") == away


def test_disliked_memories_evaluate_no_training(store: PoolStore, tmp_path: Path) -> None:
    """Two principals say that its answer is no good: what makes it likelier is not useful."""
    config = load_config(None, [f"run.dir={tmp_path}", "training.eval_every=1"])
    ids = [memory.id for memory in store.iter("main")]
    fates: dict[str, Fate] = {id: "train" if n < 8 else "held_out" for n, id in enumerate(ids)}
    for who in ("ann", "bob"):
        Feedback(store.database).give(ids[8], who, -1)
    folder = round_dir(config.examples_dir, 1)
    folder.mkdir(parents=True)
    made = plan_round(store, config, 1, {"main": Span(0, 12)}, fates, folder, None)
    assert {id for shard in made.held_out for id in shard.ids} == {*ids[9:]}


def test_a_pool_without_new_memories_is_not_forgotten(store: PoolStore, tmp_path: Path) -> None:
    """Its encoder learns from the other pools' new ones, and earlier ones of all are replayed."""
    store.create_pool("busy")
    store.append([NewMemory("busy", f"busy question {i}", "an answer") for i in range(16)])
    pools = ("main", "busy")
    config = load_config(None, [f"run.dir={tmp_path}", "pools={main: {}, busy: {}}"])
    quiet, busy = ([memory.id for memory in store.iter(pool)] for pool in pools)
    fates: dict[str, Fate] = dict.fromkeys([*quiet, *busy], "train")
    drawn = []
    for number in range(1, 30):
        folder = round_dir(config.examples_dir, number)
        folder.mkdir(parents=True)
        spans = {"main": Span(12, 12), "busy": Span(4, 16)}
        made = plan_round(store, config, number, spans, fates, folder, None)
        ids = {pool: [i for s in made.shards if s.pool == pool for i in s.ids] for pool in pools}
        assert ids["busy"][:12] == busy[4:] and made.replayed == 6
        assert {*ids["main"]} <= {*quiet} and {*ids["busy"][12:]} <= {*busy[:4]}
        drawn.append(len(ids["main"]))
    assert 4 < sum(drawn) / len(drawn) < 5  # 12 of the 16 earlier ones are the quiet pool's
