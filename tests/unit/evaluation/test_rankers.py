from memshare.evaluation.rankers import Ranker, fused_ranker


def fixed(*ids: str) -> Ranker:
    return lambda questions, k: [list(ids[:k]) for _ in questions]


def test_fusion_prefers_what_both_find() -> None:
    rank = fused_ranker([fixed("a", "b", "c"), fixed("d", "b", "a")])
    assert rank(["q", "r"], 3) == [["a", "b", "d"]] * 2  # 1+3, 2+2, 0+1


def test_fusion_looks_deeper_than_it_returns() -> None:
    rank = fused_ranker([fixed("a", "x"), fixed("b", "x")], depth=2)
    assert rank(["q"], 1) == [["x"]]
