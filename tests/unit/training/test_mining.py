"""Mining on real pools: the paper's plan domain and a slice of banking77."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memshare.config import Config, load_config
from memshare.llm.base import LogLikelihood
from memshare.llm.likelihood import Likelihood, LikelihoodCache
from memshare.pool.feedback import Feedback
from memshare.pool.store import PoolStore
from memshare.records import Example, Memory, NewMemory, normalise
from memshare.retrieval.bm25 import BM25
from memshare.retrieval.gate import choose_queries
from memshare.retrieval.text import memory_text
from memshare.training.evaluate import HeldOut
from memshare.training.examples import (
    ExamplesError,
    held_out_dir,
    is_whole,
    read_examples,
    round_dir,
    shard_path,
)
from memshare.training.journal import Span
from memshare.training.labels import Labeller, Share, merge_caches, open_cache, open_labeller
from memshare.training.mining import mine, plan_round, split_memories
from memshare.training.proposals import open_proposer
from memshare.training.relevance import HeldOutRelevance, answer_overlap, mined_gains
from memshare.training.rounds import open_spans
from memshare.training.select import text_key
from tests.tiny import tiny_encoder
from tests.tiny_lm import tiny_lm

ROOT = Path(__file__).resolve().parents[3]
DATA = Path(os.environ.get("MEMSHARE_DATA", ROOT / "../shared/data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"MEMSHARE_DATA: no {DATA}")


def plans() -> list[NewMemory]:
    rows = [json.loads(line) for line in (DATA / "nine/plan/pool.jsonl").open(encoding="utf-8")]
    turns = [[turn["content"] for turn in row["messages"]] for row in rows]
    return [NewMemory("main", prompt, answer, agent="seed") for prompt, answer in turns]


def banking(per_intent: int, intents: int) -> list[NewMemory]:
    with (DATA / "banking77/train.csv").open(encoding="utf-8", newline="") as handle:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(handle)]
    labels = list(dict.fromkeys(label for _, label in rows))[:intents]
    return [
        NewMemory("main", text, label, metadata={"label": label})
        for label in labels
        for text in [text for text, own in rows if own == label][:per_intent]
    ]


def make_config(folder: Path, **mining: Any) -> Config:
    items = {"labels": "given", "candidates": 5, "dense_candidates": 0, "shard_rows": 16, **mining}
    sets = [f"mining.{key}={value}" for key, value in items.items()]
    return load_config(None, [f"run.dir={folder}", *sets])


def open_pool(config: Config, memories: list[NewMemory]) -> PoolStore:
    config.run.dir.mkdir(parents=True, exist_ok=True)
    store = PoolStore.open(config.url)
    store.create_pool("main")
    store.append(memories)
    return store


def mine_round(
    store: PoolStore, config: Config, number: int = 1, spans: dict[str, Span] | None = None
) -> tuple[list[Example], dict[str, Any]]:
    async def run() -> dict[str, Any]:
        fates = split_memories(store, config)
        folder = round_dir(config.examples_dir, number)
        wanted = spans or open_spans(store, {}, ("main",))
        with open_proposer(config, None) as proposer:
            by = proposer and proposer.name
            plan = plan_round(store, config, number, wanted, fates, folder, by)
            async with open_labeller(config, store) as labeller:
                return await mine(store, config, plan, fates, labeller, folder, proposer)

    marker = asyncio.run(run())
    return list(read_examples(round_dir(config.examples_dir, number))), marker


@needs_data
def test_given_labels_on_banking(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with open_pool(config, banking(10, 8)) as store:
        examples, marker = mine_round(store, config)
        memories = {memory.id: memory for memory in store.iter("main")}
    fates = json.loads((tmp_path / "split.json").read_text())["fates"]
    train = [key for key in memories if fates[key] == "train"]
    assert [example.query_id for example in examples] == train
    assert marker["examples"] == len(train) == len(memories) - sum(marker["left_out"].values())
    assert marker["left_out"]["held out"] > 0
    matches = 0
    for example in examples:
        query = memories[example.query_id]
        assert (example.query, example.answer) == (query.prompt, query.answer)
        assert [c.bm25_rank for c in example.candidates] == [0, 1, 2, 3, 4]
        assert example.baseline_loglik is None
        for candidate in example.candidates:
            memory = memories[candidate.id]
            assert candidate.id != query.id
            assert normalise(memory.prompt) != normalise(query.prompt)
            assert fates[candidate.id] != "held_out"
            assert candidate.text == memory_text(memory.prompt, memory.answer)
            same = memory.metadata["label"] == query.metadata["label"]
            assert candidate.loglik == (0.0 if same else -1.0)
            matches += same
    assert matches > len(examples)  # BM25 finds more than one of five with the same intent


def held_out_examples(config: Config, number: int = 1) -> list[Example]:
    return list(read_examples(held_out_dir(round_dir(config.examples_dir, number))))


@needs_data
@pytest.mark.parametrize("labels", ["given", "none"])
def test_held_out_memories_are_mined_to_evaluate_and_never_to_train(
    tmp_path: Path, labels: str
) -> None:
    sets = [
        f"mining.labels={labels}", "mining.candidates=5", "mining.dense_candidates=0",
        "mining.shard_rows=8", "mining.held_out_queries=12", "split.held_out=0.3",
    ]  # fmt: skip
    plain = load_config(None, [f"run.dir={tmp_path / 'plain'}", *sets])
    config = load_config(None, [f"run.dir={tmp_path / 'it'}", "training.eval_every=5", *sets])
    with open_pool(plain, banking(16, 10)) as store:
        before, marker = mine_round(store, plain)
        memories = {memory.id: memory for memory in store.iter("main")}
        assert not held_out_dir(round_dir(plain.examples_dir, 1)).exists()
        assert marker["held_out"] == 0
        after, marker = mine_round(store, config)
        held_out, folder = held_out_examples(config), round_dir(config.examples_dir, 1)
        assert is_whole(folder) and len(list(held_out_dir(folder).glob("*.parquet"))) == 2

        # as anything else that is missing, a shard of it is mined again, alone
        lost = shard_path(held_out_dir(folder), 1)
        lost.unlink()
        assert not is_whole(folder)
        stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
        assert mine_round(store, config)[0] == after and held_out_examples(config) == held_out
        assert {path: path.stat().st_mtime_ns for path in stamps} == stamps and is_whole(folder)

    assert after == before  # training sees nothing of it
    fates = json.loads((config.run.dir / "split.json").read_text())["fates"]
    outside = [key for key in memories if fates[key] == "held_out"]
    assert len(held_out) == marker["held_out"] == 12 < len(outside)
    queries = {example.query_id for example in held_out}
    assert queries <= set(outside)
    seen = {c.id for example in after for c in example.candidates}
    assert not queries & (seen | {example.query_id for example in after})
    rows = [memories[key] for key in outside]
    judges = choose_queries(rows, len(outside) - 12, config.run.seed)
    assert not queries & {memory.id for memory in judges}  # the gate's come from the other end
    for example in held_out:
        query = memories[example.query_id]
        assert [c.bm25_rank for c in example.candidates] == [0, 1, 2, 3, 4]
        for candidate in example.candidates:
            memory = memories[candidate.id]
            assert fates[candidate.id] != "held_out"
            want = answer_overlap(query.answer, memory.answer)
            if labels == "given":
                want = 0.0 if memory.metadata["label"] == query.metadata["label"] else -1.0
            assert candidate.loglik == want
    found = HeldOut.of(held_out, 0.05)
    assert 0 < len(found.queries) <= 12


def test_held_out_examples_have_a_baseline_whatever_training_does_without(tmp_path: Path) -> None:
    """Without it nothing would tell which candidates are relevant."""

    async def measure(query: Memory, candidate: Memory | None) -> float | None:
        return -2.0 if candidate is None else -1.0

    sets = ["training.eval_every=5", "mining.baseline=false", "mining.dense_candidates=0"]
    config = load_config(None, [f"run.dir={tmp_path}", *sets])
    rows = [NewMemory("main", f"how is thing {i} made", f"so {i}") for i in range(80)]

    async def run(store: PoolStore) -> None:
        spans, folder = open_spans(store, {}, ("main",)), round_dir(config.examples_dir, 1)
        fates = split_memories(store, config)
        plan = plan_round(store, config, 1, spans, fates, folder, None)
        await mine(store, config, plan, fates, Labeller("made", measure, True), folder, None)

    with open_pool(config, rows) as store:
        asyncio.run(run(store))
    train = list(read_examples(round_dir(config.examples_dir, 1)))
    assert train and {example.baseline_loglik for example in train} == {None}
    held_out = held_out_examples(config)
    assert held_out and {example.baseline_loglik for example in held_out} == {-2.0}


def test_shares_have_caches_of_their_own_that_become_one(tmp_path: Path) -> None:
    config = load_config(None, [f"run.dir={tmp_path}"])
    one, two = Share(0, 2), Share(1, 2)
    with closing(open_cache(config)) as cache:
        cache.put(b"before", LogLikelihood(-1.0, 1))
    for share, key in ((one, b"a"), (two, b"b")):
        with closing(open_cache(config, share)) as cache:
            assert cache.get(b"before") == LogLikelihood(-1.0, 1) and len(cache) == 1
            cache.put(key, LogLikelihood(-2.0, 1))
    for _ in range(2):  # the second time there is nothing left to merge
        merge_caches(config)
        with closing(open_cache(config)) as cache:
            assert len(cache) == 3 and cache.get(b"b") == LogLikelihood(-2.0, 1)
    assert not list((tmp_path / "cache" / "shares").glob("*.db"))


@needs_data
def test_labels_none_need_no_model(tmp_path: Path) -> None:
    config = make_config(tmp_path, labels="none")
    with open_pool(config, plans()) as store:
        examples, marker = mine_round(store, config)
        memories = {memory.id: memory for memory in store.iter("main")}
    assert marker["scorer"] == "none" and marker["unmeasured"] == 0
    index = BM25(config.bm25)
    fates = json.loads((tmp_path / "split.json").read_text())["fates"]
    open_ids = [key for key in memories if fates[key] != "held_out"]
    index.fit(open_ids, [memory_text(memories[k].prompt, memories[k].answer) for k in open_ids])
    for example in examples:
        own, *others = example.candidates
        assert (own.id, own.bm25_rank, own.loglik) == (example.query_id, None, None)
        copies = {k for k in open_ids if normalise(memories[k].prompt) == normalise(example.query)}
        expected = index.top([example.query], 5, [copies])[0]
        assert [candidate.id for candidate in others] == [memory_id for memory_id, _ in expected]
        assert example.principal == "seed"
        keys = {candidate.id: candidate.prompt_key for candidate in example.candidates}
        assert {candidate.principal for candidate in example.candidates} == {"seed"}
        assert keys == {memory_id: text_key(memories[memory_id].prompt) for memory_id in keys}


@needs_data
def test_likelihood_is_what_the_model_gives(tmp_path: Path) -> None:
    lm = tiny_lm(tmp_path / "lm", context=500)
    config = load_config(
        None,
        [
            f"run.dir={tmp_path / 'run'}",
            f"scorer_llm.model={lm}",
            "mining.candidates=3",
            "mining.dense_candidates=0",
            "training.eval_every=5",
        ],
    )
    long = NewMemory("main", "What is the best plan for a very long trip? " * 60, "Stay at home.")
    with open_pool(config, [*plans()[:14], long]) as store:
        examples, marker = mine_round(store, config)
        memories = {memory.id: memory for memory in store.iter("main")}
        relevance = HeldOutRelevance(config, store)
        held_out = held_out_examples(config)
        for example in held_out:  # what the gate finds, from what was measured while mining
            shown = [memories[candidate.id] for candidate in example.candidates]
            gains = asyncio.run(relevance(memories[example.query_id], shown))
            assert mined_gains(example, example.candidates) == gains and any(gains)
    assert held_out

    async def check() -> None:
        from memshare.llm.factory import make_llm

        llm = make_llm(config.scorer_llm)
        likelihood = Likelihood(llm)
        for example in examples[:4]:
            assert example.baseline_loglik == pytest.approx(
                await likelihood.baseline(example.query, example.answer), abs=1e-4
            )
            for candidate in example.candidates:
                shot = memories[candidate.id]
                if candidate.loglik is not None:
                    expected = await likelihood.score(
                        example.query, example.answer, [(shot.prompt, shot.answer)]
                    )
                    assert candidate.loglik == pytest.approx(expected, abs=1e-4)
        await llm.aclose()

    asyncio.run(check())
    too_long = [
        candidate
        for example in examples
        for candidate in example.candidates
        if len(candidate.text) > 2000
    ]
    assert all(candidate.loglik is None for candidate in too_long)
    assert marker["unmeasured"] >= len(too_long)
    assert sum(c.loglik is not None for e in examples for c in e.candidates) > len(examples)


@needs_data
@pytest.mark.parametrize("labels", ["prompted", "reward"])
def test_labels_by_chat(tmp_path: Path, labels: str) -> None:
    lm = tiny_lm(tmp_path / "lm", context=1024)
    config = load_config(
        None,
        [
            f"run.dir={tmp_path / 'run'}", f"scorer_llm.model={lm}", f"agent_llm.model={lm}",
            f"mining.labels={labels}", "mining.candidates=2", "mining.dense_candidates=0",
            "agent.max_tokens=8", "scorer.kind=likelihood",
        ],
    )  # fmt: skip
    with open_pool(config, plans()[:6]) as store:
        examples, marker = mine_round(store, config)
    scored = [c.loglik for e in examples for c in e.candidates if c.loglik is not None]
    if labels == "prompted":
        assert len(scored) == marker["candidates"] > 0
        assert all(-14 < value < 0 for value in scored)
        assert all(example.baseline_loglik is None for example in examples)
    else:  # the random model seldom ends within 8 tokens: cut-off answers are never graded
        assert all(0 <= value <= 1 for value in scored)
        assert marker["unmeasured"] == marker["candidates"] - len(scored)
    assert marker["llm_calls"] >= marker["candidates"]


@needs_data
def test_later_rounds_mine_only_what_is_new(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    rows = banking(10, 8)
    with open_pool(config, rows[:50]) as store:
        first, marker = mine_round(store, config)
        held = first[0].query_id
        store.hold(held)
        gone = store.append(rows[50:])[0].id
        store.delete(gone)
        store.release(held)
        spans = open_spans(store, {"main": marker["spans"]["main"]["until"]}, ("main",))
        second, marker = mine_round(store, config, 2, spans)
        assert mine_round(store, config, 2, spans)[1] == marker  # done is done
        fates = json.loads((tmp_path / "split.json").read_text())["fates"]
    ids = {example.query_id for example in first}
    again = {example.query_id for example in second} & ids
    # half as many as are new, and the released one, which is new
    assert held in again and len(again) - 1 == marker["replayed"] > 0
    assert marker["replayed"] == round(0.5 * (len(second) - marker["replayed"]))
    assert len({example.query_id for example in second}) == len(second)
    assert {example.round for example in second} == {2}
    assert gone not in {example.query_id for example in second}
    assert marker["left_out"]["deleted or on hold"] == 1
    assert all(fates[key] == "train" for key in again)
    # the older half of the pool gives candidates to the newer one
    assert any(candidate.id in ids for example in second for candidate in example.candidates)


@needs_data
def test_other_settings_midway_are_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with open_pool(config, plans()) as store:
        mine_round(store, config)
        folder = round_dir(config.examples_dir, 1)
        (folder / "round.json").unlink()
        with pytest.raises(ExamplesError, match="begun with"):
            mine_round(store, make_config(tmp_path, labels="none"))
        shard_path(folder, 0).unlink()
        mine_round(store, config)
        assert shard_path(folder, 0).exists()


def test_empty_pool_gives_an_empty_round(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with open_pool(config, []) as store:
        assert mine_round(store, config)[0] == []


@needs_data
@pytest.mark.slow
def test_killed_mining_goes_on_where_it_was(tmp_path: Path) -> None:
    """kill -9 in the middle: equal examples in the end, and no likelihood measured twice."""
    lm = tiny_lm(tmp_path / "lm")
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    sets = [
        f"scorer_llm.model={lm}", "mining.shard_rows=4", "mining.candidates=6",
        f"encoder.model={tiny_encoder(tmp_path / 'tiny')}", "mining.dense_candidates=2",
        "scorer_llm.batch_size=4", "scorer_llm.max_concurrency=4",
    ]  # fmt: skip
    config = load_config(None, [f"run.dir={broken}", *sets])
    with open_pool(config, plans()[:60]):
        pass
    shutil.copytree(broken, whole)

    def start(folder: Path) -> subprocess.Popen[str]:
        arguments = [item for pair in sets for item in ("--set", pair)]
        return subprocess.Popen(
            [sys.executable, "train/mine.py", "--set", f"run.dir={folder}", *arguments],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    examples = round_dir(broken / "examples", 1)
    child = start(broken)
    deadline = time.monotonic() + 120
    while not shard_path(examples, 2).exists():
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    before = {path: path.stat().st_mtime_ns for path in examples.glob("*.parquet")}
    assert not (examples / "round.json").exists()
    cache = LikelihoodCache(broken / "cache" / "likelihood.db")
    measured = len(cache)

    out, err = start(broken).communicate(timeout=120)
    marker = json.loads(out)
    assert "were done before" in err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert 0 < marker["llm_calls"] == len(cache) - measured
    cache.close()

    uninterrupted = json.loads(start(whole).communicate(timeout=120)[0])
    assert uninterrupted["llm_calls"] == measured + marker["llm_calls"]
    ours = list(read_examples(examples))
    theirs = list(read_examples(round_dir(whole / "examples", 1)))
    assert [unscored(example) for example in ours] == [unscored(example) for example in theirs]
    for mine_, other in zip(ours, theirs, strict=True):  # batches differ, so the last bits may
        for left, right in zip(mine_.candidates, other.candidates, strict=True):
            assert left.loglik == pytest.approx(right.loglik, abs=1e-4)


def unscored(example: Example) -> Example:
    bare = tuple(replace(candidate, loglik=None) for candidate in example.candidates)
    return replace(example, candidates=bare, baseline_loglik=None)


@needs_data
def test_disliked_memories_teach_nothing(tmp_path: Path) -> None:
    """With two principals against it, a memory is no query and no candidate of any round."""
    config = make_config(tmp_path, replay=1.0)
    with open_pool(config, banking(10, 8)) as store:
        span = open_spans(store, {}, ("main",))
        before, _ = mine_round(store, config)
        bad, doubted = before[0].query_id, before[1].query_id
        used = {candidate.id for example in before for candidate in example.candidates}
        assert {bad, doubted} <= used
        feedback = Feedback(store.database)
        for who in ("ann", "bob"):
            feedback.give(bad, who, -1)
        feedback.give(doubted, "ann", -1)
        after, marker = mine_round(store, config, 2, span)
        store.append([NewMemory("main", f"new {n}", "card_arrival") for n in range(80)])
        replayed, _ = mine_round(store, config, 3, open_spans(store, {"main": 80}, ("main",)))
    assert marker["left_out"]["disliked"] == 1
    for examples in (after, replayed):
        queries = {example.query_id for example in examples}
        used = {candidate.id for example in examples for candidate in example.candidates}
        assert bad not in queries | used
    assert doubted in {example.query_id for example in after}
    assert doubted in {candidate.id for example in after for candidate in example.candidates}
