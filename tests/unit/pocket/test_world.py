import json
import re
from collections import Counter
from pathlib import Path

import pytest

from memshare.pocket.world import DOMAINS, World, relevant, write_references


def test_at_least_two_thousand_distinct_tasks_in_nine_kinds() -> None:
    tasks = World(0).tasks()
    assert len({task.prompt for task in tasks}) == len(tasks) >= 2000
    assert len({task.id for task in tasks}) == len(tasks)
    assert Counter(task.domain for task in tasks).keys() == {"verse", "logic", "plans"}
    per_kind = Counter(task.kind for task in tasks)
    assert len(per_kind) == 9
    assert len(set(per_kind.values())) == 1


def test_same_seed_same_world_and_another_seed_another() -> None:
    assert World(3).tasks() == World(3).tasks()
    assert World(3).splits() == World(3).splits()
    mine = {task.prompt: task.answer for task in World(3).tasks()}
    theirs = {task.prompt: task.answer for task in World(4).tasks()}
    shared = mine.keys() & theirs.keys()
    assert sum(mine[prompt] != theirs[prompt] for prompt in shared) >= len(shared) / 2


def test_no_slot_is_left_open() -> None:
    for task in World(1).tasks():
        assert not re.search(r"[{}]", task.prompt + task.answer)
        assert task.subject in task.prompt
        assert task.subject in task.answer
        assert task.alias.lower() in task.prompt.lower()
        assert 12 <= len(task.prompt.split()) <= 45
        assert 12 <= len(task.answer.split()) <= 45


def test_answers_of_one_group_differ_only_in_the_subject() -> None:
    ways: dict[str, set[str]] = {}
    for task in World(0).tasks():
        ways.setdefault(task.key, set()).add(task.answer.replace(task.subject, "*"))
    assert len(ways) == 54
    assert all(len(way) == 1 for way in ways.values())
    assert len(set.union(*ways.values())) == 54


def test_groups_of_a_kind_share_no_sentence() -> None:
    for domain in DOMAINS:
        for kind in domain.kinds:
            for texts in (kind.openings, kind.middles, kind.closings):
                assert len(set(texts)) == len(texts) == 6
            assert all("{s}" in text.lower() for text in kind.openings)


def test_names_of_one_group_share_no_word_of_their_own() -> None:
    frames = {"the", "house", "of", "old", "people", "folk", "from", "those", "who", "wear", "s"}
    names: dict[str, set[str]] = {}
    for task in World(0).tasks():
        names.setdefault(task.key, set()).add(task.alias)
    for group in names.values():
        assert len(group) == 4
        own = [w for n in group for w in re.findall(r"\w+", n.lower()) if w not in frames]
        assert len(own) == len(set(own))


def test_a_name_means_one_group_in_a_kind_and_serves_other_kinds_too() -> None:
    keys: dict[tuple[str, str], set[str]] = {}
    kinds: dict[str, set[str]] = {}
    for task in World(0).tasks():
        keys.setdefault((task.kind, task.alias), set()).add(task.key)
        kinds.setdefault(task.alias, set()).add(task.kind)
    assert all(len(found) == 1 for found in keys.values())
    assert sum(len(found) > 1 for found in kinds.values()) > len(kinds) / 2


def test_splits_are_disjoint_and_test_combines_what_is_known() -> None:
    splits = World(0).splits()
    assert (len(splits.seed), len(splits.problems), len(splits.test)) == (300, 900, 200)
    pool = (*splits.seed, *splits.problems)
    ids = {task.id for task in pool}
    assert len(ids) == 1200
    assert not ids & {task.id for task in splits.test}
    names = {(task.kind, task.alias) for task in pool}
    subjects = {(task.kind, task.subject) for task in pool}
    for task in splits.test:
        assert (task.kind, task.alias) in names
        assert (task.kind, task.subject) in subjects
        assert sum(relevant(task, other) for other in pool) >= 3


def test_some_groups_and_names_come_only_with_the_problems_and_are_taught_first() -> None:
    splits = World(0).splits()
    seed_keys = {task.key for task in splits.seed}
    known = {(task.kind, task.alias) for task in splits.seed}
    late_keys = {task.key for task in splits.problems} - seed_keys
    assert len(late_keys) == 18
    for task in splits.problems:
        if (task.kind, task.alias) not in known:
            assert task.taught
        known.add((task.kind, task.alias))
    share = sum(task.taught for task in splits.problems) / len(splits.problems)
    assert 0.1 < share < 0.35


def test_splits_larger_than_the_world_are_refused() -> None:
    with pytest.raises(ValueError, match="not enough"):
        World(0).splits(problems=5000)


def test_references_are_the_scorers_jsonl(tmp_path: Path) -> None:
    tasks = World(0).tasks()[:5]
    write_references(tmp_path / "references.jsonl", [(t.prompt, t.answer) for t in tasks])
    lines = (tmp_path / "references.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": task.prompt, "answer": task.answer} for task in tasks
    ]
