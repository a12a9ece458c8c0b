from pathlib import Path

from memshare.evaluation.data import Pair
from memshare.evaluation.material import as_memories
from memshare.evaluation.rankers import (
    Ranker,
    bm25_ranker,
    dense_ranker,
    fused_ranker,
    random_ranker,
)
from memshare.retrieval.encoder import Encoder
from tests.tiny import tiny_encoder


def fixed(*ids: str) -> Ranker:
    return lambda questions, k: [list(ids[:k]) for _ in questions]


def test_fusion_prefers_what_both_find() -> None:
    rank = fused_ranker([fixed("a", "b", "c"), fixed("d", "b", "a")])
    assert rank(["q", "r"], 3) == [["a", "b", "d"]] * 2  # 1+3, 2+2, 0+1


def test_fusion_looks_deeper_than_it_returns() -> None:
    rank = fused_ranker([fixed("a", "x"), fixed("b", "x")], depth=2)
    assert rank(["q"], 1) == [["x"]]


def test_no_question_finds_its_own_copy(tmp_path: Path) -> None:
    """Whatever its case and white space, and however often it was answered."""
    pairs = [Pair("Why is the sea salt?", f"copy {n}") for n in range(3)]
    pairs += [Pair("  why is the  SEA salt?", "a copy in other letters")]
    pairs += [Pair(f"Why is the sea {word}?", word) for word in ("deep", "blue", "cold")]
    memories = as_memories("m", pairs)
    others = {memory.id for memory in memories[4:]}
    words = bm25_ranker(memories)
    dense = dense_ranker(memories, Encoder.from_folder(tiny_encoder(tmp_path / "encoder"), "cpu"))
    for rank in (random_ranker(memories, 0), words, dense, fused_ranker([words, dense])):
        found, stranger = rank(["Why is the sea salt?", "Who are you?"], 7)
        assert set(found) == others
        assert set(stranger) <= {memory.id for memory in memories}
        assert len(rank(["why is the sea salt?"], 2)[0]) == 2  # the next best take their place
