from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memshare.config import BM25Config
from memshare.retrieval.bm25 import BM25
from memshare.retrieval.text import memory_text, tokenize

ROOT = Path(__file__).resolve().parents[3]
NINE = Path(os.environ.get("MEMSHARE_DATA", str(ROOT / "../shared/data"))) / "nine"
DOMAINS = {
    "literary": ("limerick", "sonnet", "lvshi"),
    "logic": ("puns", "puzzle", "riddles"),
    "plan": ("travel", "fitness", "study"),
    "single": (),
}


def make(
    backend: Literal["bm25s", "rank-bm25"],
    ids: list[str],
    texts: list[str],
    k1: float = 1.5,
    b: float = 0.75,
    delta: float = 1.0,
) -> BM25:
    return BM25(BM25Config(backend=backend, k1=k1, b=b, delta=delta)).fit(ids, texts)


def both(ids: list[str], texts: list[str], **options: float) -> tuple[BM25, BM25]:
    return make("rank-bm25", ids, texts, **options), make("bm25s", ids, texts, **options)


def scores(index: BM25, query: str, ids: list[str]) -> list[float]:
    """Of every text, in the order of ``ids``."""
    found = dict(index.top([query], len(ids))[0])
    return [found[name] for name in ids]


def agree(ids: list[str], texts: list[str], queries: list[str], **options: float) -> None:
    reference, fast = both(ids, texts, **options)
    for query in queries:
        found, expected = scores(fast, query, ids), scores(reference, query, ids)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    for n in (1, 10, len(ids)):
        left, right = reference.top(queries, n), fast.top(queries, n)
        assert [[name for name, _ in row] for row in left] == [
            [name for name, _ in row] for row in right
        ]


def rows(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        turns = json.loads(line)["messages"]
        pairs.append((turns[0]["content"], turns[1]["content"]))
    return pairs


@pytest.mark.parametrize("domain", DOMAINS)
def test_backends_agree_on_the_nine_datasets(domain: str) -> None:
    if not NINE.is_dir():
        pytest.skip(f"{NINE} is absent: set MEMSHARE_DATA to the folder that holds nine/")
    pairs = rows(NINE / domain / "pool.jsonl") + rows(NINE / domain / "problems.jsonl")
    queries = [prompt for prompt, _ in pairs]
    for name in DOMAINS[domain]:
        test = rows(NINE / domain / f"test_{name}.jsonl")
        queries += [prompt for prompt, _ in test]
        queries += [answer for _, answer in test[:5]]  # long ones; Chinese verse among them
    ids = [f"m{(i * 7919) % 100_003:06d}" for i in range(len(pairs))]  # not in text order
    agree(ids, [memory_text(*pair) for pair in pairs], queries)


def test_chinese_verse_is_found_by_its_characters() -> None:
    texts = ["床前明月光 疑是地上霜", "白日依山尽 黄河入海流", "春眠不觉晓 处处闻啼鸟"]
    for index in both(["a", "b", "c"], texts):
        assert index.top(["黄河"], 1)[0][0][0] == "b"
        assert index.top(["明月"], 1)[0][0][0] == "a"


def test_the_formula_by_hand() -> None:
    k1, b, delta = 1.2, 0.6, 0.5
    texts = ["x y y", "y z", ""]
    mean = (3 + 2 + 0) / 3
    idf = {"x": np.log(4 / 1), "y": np.log(4 / 2), "z": np.log(4 / 1)}

    def part(term: str, text: str) -> float:
        words = text.split()
        tf = words.count(term)
        norm = k1 * (1 - b + b * len(words) / mean)
        return float(idf[term] * (delta + tf * (k1 + 1) / (norm + tf)))

    expected = [part("y", text) + 2 * part("z", text) for text in texts]
    ids = ["1", "2", "3"]
    for index in both(ids, texts, k1=k1, b=b, delta=delta):
        np.testing.assert_allclose(scores(index, "y z unknown Z", ids), expected, atol=1e-8)


def test_equal_scores_go_to_the_smaller_id_whatever_the_order() -> None:
    texts = ["same words here"] * 5 + ["other"]
    ids = ["e", "b", "d", "a", "c", "f"]
    for index in both(ids, texts):
        for n in range(7):
            assert [name for name, _ in index.top(["same words"], n)[0]] == list("abcdef")[:n]


def test_exclusion_and_n_beyond_the_pool() -> None:
    for index in both(["a", "b", "c"], ["red fish", "blue fish", "red bird"]):
        found = index.top(["red fish", "red fish"], 10, exclude=[{"a", "absent"}, set()])
        assert {name for name, _ in found[0]} == {"b", "c"}
        assert found[1][0][0] == "a"
        assert len(found[1]) == 3
        assert index.top(["red"], 3, exclude=[["a", "b", "c"]]) == [[]]


def test_unknown_words_and_empty_queries_score_zero() -> None:
    for index in both(["b", "a"], ["one", "two"]):
        assert scores(index, "", ["b", "a"]) == [0, 0]
        assert scores(index, "absent !", ["b", "a"]) == [0, 0]
        assert index.top(["", "absent"], 1) == [[("a", 0.0)], [("a", 0.0)]]


@pytest.mark.parametrize("texts", [[], [""], ["", "..."]])
def test_a_pool_without_words(texts: list[str]) -> None:
    ids = [str(i) for i in range(len(texts))]
    for index in both(ids, texts):
        assert scores(index, "word", ids) == [0.0] * len(texts)
        assert index.top(["word"], 5) == [[(name, 0.0) for name in ids]]


def test_bad_input() -> None:
    index = BM25(BM25Config())
    with pytest.raises(ValueError, match="'x' is given twice"):
        index.fit(["x", "y", "x"], ["1", "2", "3"])
    with pytest.raises(ValueError, match="2 ids for 1 texts"):
        index.fit(["x", "y"], ["1"])
    with pytest.raises(ValueError, match="negative"):
        index.top(["q"], -1)
    with pytest.raises(ValueError, match="1 exclusions for 2 queries"):
        index.top(["q", "r"], 1, exclude=[set()])


WORD = st.sampled_from(["a", "b", "c", "dd", "春眠", "不觉晓", "晓", "안녕", "x1"])
TEXT = st.lists(WORD, max_size=8).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(TEXT, min_size=1, max_size=12),
    queries=st.lists(TEXT, max_size=4),
    k1=st.floats(0.1, 3),
    b=st.sampled_from([0.0, 0.4, 0.75, 1.0]),
    delta=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_backends_agree_on_anything(
    texts: list[str], queries: list[str], k1: float, b: float, delta: float
) -> None:
    ids = [f"m{(5 * i) % 13}" for i in range(len(texts))]
    agree(ids, texts, queries, k1=k1, b=b, delta=delta)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=30), query=TEXT, n=st.integers(0, 35))
def test_top_is_the_sorted_head_of_scores(texts: list[str], query: str, n: int) -> None:
    ids = [f"m{(7 * i) % 31}" for i in range(len(texts))]
    index = make("bm25s", ids, texts)
    pairs = sorted(zip(scores(index, query, ids), ids, strict=True), key=lambda p: (-p[0], p[1]))
    assert index.top([query], n)[0] == [(name, score) for score, name in pairs[:n]]


def test_many_texts_are_searched_quickly() -> None:
    """Against rank-bm25's own scoring in the same run: a ratio, so that load doesn't matter."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 5001)
    drawn = rng.choice(5000, size=(10_000, 30), p=share / share.sum())
    texts = [" ".join(f"w{word}" for word in row) for row in drawn]
    reference, fast = both([f"{i:06d}" for i in range(len(texts))], texts)
    queries = [" ".join(text.split()[:12]) for text in texts[:3]]
    start = time.perf_counter()
    expected = reference.top(queries, 16)
    middle = time.perf_counter()
    found = fast.top(queries, 16)
    end = time.perf_counter()
    assert found == expected
    assert (middle - start) > 5 * (end - middle)


def test_the_tokenizer_is_the_shared_one() -> None:
    index = make("bm25s", ["a"], ["Ünïcode 春眠"])
    assert scores(index, "ünïcode", ["a"])[0] > 0
    assert tokenize("Ünïcode 春眠") == ["ünïcode", "春眠"]
