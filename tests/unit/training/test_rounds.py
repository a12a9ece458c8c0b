"""The journal of continual training, and what a round reads from the change log."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from memshare.config import load_config
from memshare.pool.store import PoolStore
from memshare.records import Candidate, Example, NewMemory
from memshare.retrieval.manifest import folder_name
from memshare.training import rounds as rounds_module
from memshare.training.erasing import erase_deleted
from memshare.training.examples import (
    held_out_dir,
    read_examples,
    round_dir,
    shard_path,
    write_marker,
    write_shard,
)
from memshare.training.journal import Journal, Round, Span
from memshare.training.mining_plan import Plan
from memshare.training.rounds import (
    count_new,
    covered,
    forget_stale_checkpoints,
    last_begun,
    last_mined,
    latest_encoder,
    new_ids,
    next_round,
    open_spans,
    with_encoder,
    without_unserved,
)
from tests.training_data import example
from tests.training_runs import refreshed


@pytest.fixture
def store(tmp_path: Path):
    with PoolStore.open(f"sqlite:///{tmp_path / 'pool.db'}") as store:
        for name in ("one", "two"):
            store.create_pool(name)
        yield store


def add(store: PoolStore, pool: str, *prompts: str) -> list[str]:
    return [r.id for r in store.append([NewMemory(pool, prompt, "yes") for prompt in prompts])]


def test_new_memories_come_from_the_log(store: PoolStore) -> None:
    a, b, c = add(store, "one", "a", "b", "c")
    (d,) = add(store, "two", "d")
    store.hold(a)  # seq 4
    store.delete(b)  # 5
    assert new_ids(store, "one", Span(0, 5)) == [a, b, c]
    assert new_ids(store, "one", Span(1, 2)) == [b]
    store.release(a)  # 6
    assert new_ids(store, "one", Span(5, 6)) == [a]
    assert count_new(store, {}, ("one", "two")) == 4
    assert count_new(store, {"one": 3}, ("one", "two"), 2) == 2
    assert count_new(store, {"one": 3}, ("one", "two"), 3) == 0
    assert open_spans(store, {"one": 3}, ("one", "two")) == {"one": Span(3, 6), "two": Span(0, 1)}
    assert new_ids(store, "two", Span(0, 1)) == [d]


def test_new_memories_over_many_pages_of_the_log(
    store: PoolStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds_module, "_PAGE", 2)
    ids = add(store, "one", *"abcdefg")
    assert new_ids(store, "one", Span(0, 5)) == ids[:5]
    assert new_ids(store, "one", Span(3, 7)) == ids[3:]
    assert count_new(store, {}, ("one", "two")) == 7


def write_round(folder: Path, number: int, *ids: str, finish: bool = True) -> Path:
    target = round_dir(folder, number)
    rows = [
        Example(i, "q", "a", "one", None, number, 1, "s", "given", None,
                (Candidate("other", "t", 0, 0.0, "k"),))
        for i in ids
    ]  # fmt: skip
    write_shard(shard_path(target, 0), rows)
    spans = {"one": {"since": 0, "until": 10 * number}}
    plan = Plan(number, {"one": Span(**spans["one"])}, {}, None, {}, 0, ())
    (target / "plan.json").write_text(json.dumps(asdict(plan)))
    if finish:
        write_marker(target, {"shards": 1, "round": number, "spans": spans})
    return target


def test_last_rounds(tmp_path: Path) -> None:
    assert last_mined(tmp_path, ["one"]) == (0, {}) and last_begun(tmp_path) == 0
    write_round(tmp_path, 1, "x")
    write_round(tmp_path, 2, "y")
    write_round(tmp_path, 3, "z", finish=False)
    assert last_mined(tmp_path, ["one"]) == (2, {"one": 20})
    assert last_mined(tmp_path, ["one", "new"]) == (2, {"one": 20})
    assert last_begun(tmp_path) == 3


def test_a_round_begins_where_the_loop_or_mining_by_hand_ended(
    store: PoolStore, tmp_path: Path
) -> None:
    config = load_config(None, [f"run.dir={tmp_path}", "pools={one: {}, two: {}}"])
    add(store, "one", *"abcdefghijkl")
    add(store, "two", "m", "n")
    assert next_round(config, store, Journal()).spans == {"one": Span(0, 12), "two": Span(0, 2)}
    write_round(config.examples_dir, 1, "x")  # up to 10
    write_round(config.examples_dir, 3, "y", finish=False)
    by_hand = next_round(config, store, Journal())
    assert (by_hand.number, by_hand.spans["one"]) == (4, Span(10, 12))
    before = Round(5, {"one": Span(0, 11), "two": Span(0, 1)}, "start", "done", "published")
    by_loop = next_round(config, store, Journal((before,)))
    assert by_loop.number == 6
    assert by_loop.spans == {"one": Span(11, 12), "two": Span(1, 2)}


def test_a_pool_that_was_restored_is_mined_again_and_silences_no_other(
    store: PoolStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, [f"run.dir={tmp_path}", "pools={one: {}, two: {}}"])
    add(store, "one", "a", "b", "c")
    add(store, "two", "m", "n")
    before = Round(1, {"one": Span(0, 1000), "two": Span(0, 1)}, "start", "done", "published")
    journal = Journal((before,))
    assert count_new(store, covered(config, journal), config.served_pools) == 4
    found = next_round(config, store, journal)
    assert found.spans == {"one": Span(0, 3), "two": Span(1, 2)}
    assert "one: mined up to 1000, and its log ends at 3" in capsys.readouterr().err
    after = journal.begin(replace(found, step="done", outcome="empty"))
    assert count_new(store, covered(config, after), config.served_pools) == 0
    write_round(config.examples_dir, 1, "x")  # by its marker, one is at 10
    assert next_round(config, store, Journal()).spans["one"] == Span(0, 3)


def test_the_last_iteration_of_the_last_round_has_the_latest_encoder(tmp_path: Path) -> None:
    for name in ("000001", "000002", "000002/iteration-2", "000002/iteration-3"):
        (tmp_path / "training" / name / "encoder").mkdir(parents=True)
    home = tmp_path / "training" / "000002"
    assert latest_encoder(tmp_path) == home / "iteration-3" / "encoder"


def test_what_is_deleted_or_held_leaves_the_examples(store: PoolStore, tmp_path: Path) -> None:
    ids = add(store, "one", "a", "b", "c", "d")
    folder = write_round(tmp_path / "examples", 1, *ids)
    store.delete(ids[0])
    store.hold(ids[1])
    assert erase_deleted(store, tmp_path / "examples", ("one", "two")) == 1
    assert [row.query_id for row in read_examples(folder)] == ids[2:]
    assert erase_deleted(store, tmp_path / "examples", ("one", "two")) == 0
    store.release(ids[1])
    store.delete(ids[2])
    assert erase_deleted(store, tmp_path / "examples", ("one", "two")) == 1
    assert [row.query_id for row in read_examples(folder)] == ids[3:]


def test_what_is_deleted_leaves_the_held_out_examples(store: PoolStore, tmp_path: Path) -> None:
    ids = add(store, "one", "a", "b", "c")
    folder = write_round(tmp_path / "examples", 1, ids[0])
    held_out = held_out_dir(folder)
    write_shard(shard_path(held_out, 0), [example(ids[1]), example(ids[2])])
    write_marker(held_out, {"shards": 1})
    output = tmp_path / "training"
    assert not forget_stale_checkpoints(output, folder)
    store.delete(ids[1])
    assert erase_deleted(store, tmp_path / "examples", ("one", "two")) == 1
    assert [row.query_id for row in read_examples(held_out)] == [ids[2]]
    assert ids[1].encode() not in shard_path(held_out, 0).read_bytes()
    assert forget_stale_checkpoints(output, folder)  # the best was chosen by it
    mined = last_mined(tmp_path / "examples", ["one"])
    assert mined == (1, {"one": 10})  # and it is no round of its own


def test_changed_examples_start_training_afresh(tmp_path: Path) -> None:
    folder = write_round(tmp_path / "examples", 1, "a", "b")
    output = tmp_path / "training"
    (output / "checkpoints" / "step-1").mkdir(parents=True)
    assert not any(forget_stale_checkpoints(output, folder) for _ in range(2))
    assert (output / "checkpoints" / "step-1").exists()
    write_shard(shard_path(folder, 0), [])
    assert forget_stale_checkpoints(output, folder)
    assert not (output / "checkpoints").exists()
    assert not forget_stale_checkpoints(output, folder)


@pytest.mark.parametrize(("warm", "source"), [("true", "run/training/000004"), ("false", None)])
def test_a_warm_round_goes_on_from_the_training_of_what_serves(
    store: PoolStore, tmp_path: Path, warm: str, source: str | None
) -> None:
    """Not from the last iteration of its round, which may have had nothing to train on."""
    changes = [f"training.warm_optimizer={warm}", "pools={one: {}, two: {}}"]
    config = load_config(None, [f"run.dir={tmp_path / 'run'}", *changes])
    home = config.retriever_dir
    published = {"generation": 7, "encoder": "run/training/000004/encoder"}
    before = Round(
        4, {}, "start", "done", "published", {"index": published}, iterations=2, iteration=2
    )
    for serving in (7, 8):  # 8: the same encoder, with newer rows
        refreshed(home, serving, origin=7)
        (home / "CURRENT").write_text(f"{serving}\n")
        following = next_round(config, store, Journal((before,)))
        assert following.warm == source
        assert following.encoder == str(home / folder_name(serving) / "encoder")


def test_a_round_whose_generation_is_gone_trains_what_serves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Deleted by who published by hand meanwhile, or left behind where the run folder was."""
    changes = [f"run.dir={tmp_path / 'run'}", "training.warm_optimizer=true"]
    config = load_config(None, changes)
    home = config.generations_dir / config.retriever.name
    published = {"generation": 7, "encoder": "run/training/000004/encoder"}
    before = Round(4, {}, "start", "done", "published", {"index": published})
    gone = Round(5, {}, str(home / "000006" / "encoder"), "train", warm="old")

    def beginning(now: Round) -> tuple[str, str | None]:
        journal = with_encoder(config, Journal((before, now)))
        found = journal.open_round
        assert found is not None and journal.rounds[0] == before
        assert replace(found, encoder=now.encoder, warm=now.warm) == now
        return found.encoder, found.warm

    assert beginning(gone) == (config.encoder.model, None)  # nothing was ever published
    refreshed(home, 7, origin=7)
    (home / "CURRENT").write_text("7\n")
    serves = str(home / "000007" / "encoder")
    assert beginning(gone) == (serves, "run/training/000004")
    assert f"000006/encoder is gone; it trains {serves}" in capsys.readouterr().err
    (home / "000006" / "encoder").mkdir(parents=True)
    hub, indexed = replace(gone, encoder="org/model"), replace(gone, step="index")
    for kept in (gone, hub, indexed):
        assert beginning(kept) == (kept.encoder, "old")
    assert with_encoder(config, Journal((before,))) == Journal((before,))


def test_a_pool_that_is_served_no_more_leaves_the_round_that_was_to_mine_it(
    store: PoolStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is as new to a later one, when it is served again."""
    add(store, "one", "a", "b")
    add(store, "two", "m", "n")
    both = load_config(None, [f"run.dir={tmp_path}", "pools={one: {}, two: {}}"])
    one = load_config(None, [f"run.dir={tmp_path}", "pools={one: {}}"])
    begun = Journal().begin(next_round(both, store, Journal()))
    assert without_unserved(both, begun) == begun
    left = without_unserved(one, begun)
    assert left.open_round is not None and left.open_round.spans == {"one": Span(0, 2)}
    assert "round 1: without ['two'], served no more" in capsys.readouterr().err
    assert next_round(both, store, left.advance({}, outcome="empty")).spans["two"] == Span(0, 2)
    mined = begun.advance({})  # what is mined is trained on
    assert without_unserved(one, mined) == mined
