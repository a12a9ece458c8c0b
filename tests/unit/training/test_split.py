"""The split of memories into training and held-out ones."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memshare.config import SplitConfig
from memshare.training.split import SplitError, assign, grams, jaccard, kept_split


@dataclass(frozen=True)
class Row:
    id: str
    prompt: str


def rows(prompts: list[str]) -> list[Row]:
    return [Row(f"m{i:06d}", prompt) for i, prompt in enumerate(prompts)]


HALF = SplitConfig(held_out=0.5, near_duplicate=0.6)

words = st.sampled_from(list("abcdefgh"))
prompts = st.lists(st.lists(words, min_size=0, max_size=9).map(" ".join), max_size=40)


@settings(max_examples=300, deadline=None)
@given(prompts, st.integers(0, 40))
def test_later_memories_change_no_fate(texts: list[str], cut: int) -> None:
    everything = assign(rows(texts), HALF)
    earlier = assign(rows(texts[:cut]), HALF)
    assert {key: everything[key] for key in earlier} == earlier


@settings(max_examples=300, deadline=None)
@given(prompts)
def test_no_near_duplicates_across_the_split(texts: list[str]) -> None:
    memories = rows(texts)
    fates = assign(memories, HALF)
    for left, right in itertools.combinations(memories, 2):
        if jaccard(grams(left.prompt), grams(right.prompt)) >= HALF.near_duplicate:
            assert {fates[left.id], fates[right.id]} != {"train", "held_out"}


@settings(max_examples=200, deadline=None)
@given(prompts, st.data())
def test_known_fates_survive_deletions_and_any_order(texts: list[str], data: st.DataObject) -> None:
    memories = rows(texts)
    known = assign(memories, HALF)
    kept = data.draw(st.permutations([row for row in memories if data.draw(st.booleans())]))
    later = rows(data.draw(prompts))
    mixed = data.draw(st.permutations([*kept, *(Row("x" + row.id, row.prompt) for row in later)]))
    fates = assign(mixed, HALF, known)
    assert all(fates[row.id] == known[row.id] for row in kept)
    for left, right in itertools.combinations(mixed, 2):
        if jaccard(grams(left.prompt), grams(right.prompt)) >= HALF.near_duplicate:
            assert {fates[left.id], fates[right.id]} != {"train", "held_out"}


def test_a_bridge_belongs_to_neither_side() -> None:
    left = "one two three four five six"
    right = "four five six seven eight nine"
    bridge = "one two three four five six seven eight nine"  # Jaccard 4/7 with both
    config = SplitConfig(held_out=0.5, near_duplicate=0.5)
    for i in itertools.count():  # vary the words until the two ends differ in fate
        texts = [" ".join(f"{word}{i}" for word in text.split()) for text in (left, right, bridge)]
        fates = list(assign(rows(texts), config).values())
        if fates[0] != fates[1]:
            break
    assert fates[2] == "none"
    assert list(assign(rows([*texts, texts[2]]), config).values())[3] == "none"


def test_same_prompt_after_normalising_shares_its_fate() -> None:
    config = SplitConfig(held_out=0.5)
    for text in (
        "Hello there",
        "Straße",
        "??",
        "什么是机器学习",
        "What is a good plan for a weekend in Paris",
    ):
        copies = [text, f"  {text.upper()} ", text.replace(" ", "\n\t")]
        assert len(set(assign(rows(copies), config).values())) == 1


def test_chinese_near_duplicates_are_found() -> None:
    left = "请创作一首描绘春雨降临，滋润万物，带来生机与美景的五言律诗。诗中应体现春雨"
    right = left.replace("五言", "七言")
    assert 0.6 < jaccard(grams(left), grams(right)) < 1
    assert jaccard(grams(left), grams("请写一首关于秋天离别的诗")) < 0.1


def test_short_texts_are_not_lumped_together() -> None:
    assert grams("hello") != grams("world")
    assert grams("!!") != grams("??")
    assert len(grams("two words")) == 1


def test_share_held_out_follows_the_setting() -> None:
    rng = random.Random(0)
    texts = [" ".join(str(rng.randrange(10**6)) for _ in range(8)) for _ in range(4000)]
    for share in (0.0, 0.1, 1.0):
        fates = list(assign(rows(texts), SplitConfig(held_out=share)).values())
        assert fates.count("held_out") / len(fates) == pytest.approx(share, abs=0.02)


def test_clusters_of_many_near_duplicates_stay_cheap() -> None:
    """Ten times the prompts may not cost a hundred times the time, one huge cluster included."""
    boilerplate = " ".join(f"shared{i}" for i in range(60))

    def seconds(count: int) -> float:
        texts = [f"{boilerplate} question {i}" for i in range(count)]
        start = time.process_time()
        fates = assign(rows(texts), SplitConfig())
        assert len(set(fates.values())) == 1
        return time.process_time() - start

    seconds(100)  # warm up
    assert seconds(5000) < 40 * seconds(500)


def test_kept_split_remembers_fates(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    cluster = [f"plan a long weekend trip to the city of Paris in spring {i}" for i in range(9)]
    left = next(  # without its earliest memories, this cluster would move
        rows(cluster)[i:]
        for i in range(9)
        if set(assign(rows(cluster)[i:], HALF).values())
        != set(assign(rows(cluster), HALF).values())
    )
    first = kept_split(path, rows(cluster), HALF)
    assert kept_split(path, left, HALF) == {row.id: first[row.id] for row in left}
    path.write_text("{")
    with pytest.raises(SplitError, match="damaged"):
        kept_split(path, rows(cluster), HALF)


def test_other_settings_hold_for_memories_that_come_after_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What has been trained on never judges."""
    path = tmp_path / "split.json"
    texts = [f"question {i} about {i * i} and {i + 7} more of them" for i in range(20)]
    before = kept_split(path, rows(texts[:10]), HALF)
    assert set(before.values()) == {"train", "held_out"}
    capsys.readouterr()
    changed = HALF.model_copy(update={"held_out": 1.0})
    after = kept_split(path, rows(texts), changed)
    assert after == before | {row.id: "held_out" for row in rows(texts)[10:]}
    assert "split settings changed, for memories that come from now on" in capsys.readouterr().err
    assert kept_split(path, rows(texts), changed) == after
    assert not capsys.readouterr().err  # told once
    path.unlink()
    assert set(kept_split(path, rows(texts), changed).values()) == {"held_out"}
