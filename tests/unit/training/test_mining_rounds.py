"""Rounds of mining: what is mined again, shared, refused, left out, and what a kill leaves."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from memshare.config import load_config
from memshare.llm.base import LogLikelihood
from memshare.llm.likelihood import LikelihoodCache
from memshare.pool.feedback import Feedback
from memshare.records import Example, NewMemory
from memshare.training.examples import read_examples, read_marker, round_dir, shard_path
from memshare.training.labels import Share, merge_caches, open_cache
from memshare.training.rounds import open_spans
from memshare.training.shard import ExamplesError
from tests.mining import ROOT, banking, make_config, mine_round, needs_data, open_pool, plans
from tests.tiny import tiny_encoder
from tests.tiny_lm import tiny_lm
from tests.training_runs import load_program


def test_shares_have_caches_of_their_own_that_become_one(tmp_path: Path) -> None:
    config = load_config(None, [f"run.dir={tmp_path}"])
    one, two = Share(0, 2), Share(1, 2)
    with closing(open_cache(config)) as cache:
        cache.put(b"before", LogLikelihood(-1.0, 1))
    for share, key in ((one, b"a"), (two, b"b")):
        with closing(open_cache(config, share)) as cache:
            assert cache.get(b"before") == LogLikelihood(-1.0, 1)
            assert len(cache) == 0, "nothing is copied"
            cache.put(key, LogLikelihood(-2.0, 1))
    for _ in range(2):  # the second time there is nothing left to merge
        merge_caches(config)
        with closing(open_cache(config)) as cache:
            assert len(cache) == 3 and cache.get(b"b") == LogLikelihood(-2.0, 1)
    assert not list((tmp_path / "cache" / "shares").glob("*.db"))


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


def test_a_round_ends_with_the_log_at_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Later rounds begin where it ends, and would pass over what comes until then."""
    program = load_program(ROOT / "train" / "mine.py")
    config = make_config(tmp_path, labels="none")
    sets = [f"run.dir={tmp_path}", "mining.labels=none", "mining.replay=0", "split.held_out=0"]
    words = [word for item in sets for word in ("--set", item)]
    for number, beyond in ((1, ["--until-seq", "50"]), (2, [])):
        with open_pool(config, [NewMemory("main", f"question {number}", "answer")]):
            assert program.main([*words, *beyond]) == 0
        marker = read_marker(round_dir(config.examples_dir, number))
        assert marker["spans"] == {"main": {"since": number - 1, "until": number}}
        assert marker["examples"] == 1
    again = [*words, "--iteration", "2", "--proposer", "unused", "--round"]
    assert program.main([*again, "3"]) == 1  # which has no first one yet
    assert "no finished round" in capsys.readouterr().err
    assert program.main([*again, "1"]) == 0  # of what the first one mined, not of what is new
    marker = read_marker(round_dir(config.examples_dir, 1, 2))
    assert (marker["spans"], marker["examples"]) == ({"main": {"since": 0, "until": 1}}, 1)
