import math

import pytest

from memshare.metrics.ir import METRICS, ir_metrics, mean_metrics


def test_hand_computed_query() -> None:
    runs = {"q": ["a", "b", "c"]}
    rows = ir_metrics(runs, {"q": {"b": 1, "z": 1}})
    ideal = 1 / math.log2(2) + 1 / math.log2(3)
    assert rows["q"] == pytest.approx(
        {"P@1": 0.0, "MRR@10": 0.5, "nDCG@10": (1 / math.log2(3)) / ideal, "recall@10": 0.5}
    )


def test_graded_relevance_moves_ndcg_only() -> None:
    flat = ir_metrics({"q": ["a", "b"]}, {"q": {"a": 1, "b": 1}})["q"]
    graded = ir_metrics({"q": ["a", "b"]}, {"q": {"a": 1, "b": 3}})["q"]
    assert graded["nDCG@10"] < flat["nDCG@10"] == pytest.approx(1.0)
    assert graded["MRR@10"] == flat["MRR@10"] == 1.0


def test_long_runs_keep_their_order_beyond_ten() -> None:
    documents = [f"d{i}" for i in range(30)]
    rows = ir_metrics({"q": documents}, {"q": {"d10": 1, "d2": 1}})
    assert rows["q"]["MRR@10"] == pytest.approx(1 / 3)
    assert rows["q"]["recall@10"] == 0.5


@pytest.mark.parametrize("run", [[], ["a"]])
def test_unjudged_or_unanswered_queries_score_zero(run: list[str]) -> None:
    rows = ir_metrics({"q": run, "ok": ["a"]}, {"ok": {"a": 1}, "q": {"b": 1} if not run else {}})
    assert rows["q"] == dict.fromkeys(METRICS, 0.0)
    assert mean_metrics(rows)["P@1"] == 0.5
