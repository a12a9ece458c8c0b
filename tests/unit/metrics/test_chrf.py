import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshare.metrics.chrf import chrf


def test_equal_texts_score_one() -> None:
    assert chrf("昔闻洞庭水，今上岳阳楼。", "昔闻洞庭水，今上岳阳楼。") == pytest.approx(1.0)


def test_white_space_does_not_count() -> None:
    assert chrf("a b\ncd efg", "abcd  efg") == pytest.approx(1.0)


def test_nothing_in_common_or_nothing_at_all() -> None:
    assert chrf("昔闻", "xy") == 0.0
    assert chrf("", "xy") == 0.0
    assert chrf("xy", " \n") == 0.0


def test_by_hand() -> None:
    # "abcd" against "abc": orders 1..3 (the reference has no more).
    # precision 3/4, 2/3, 1/2; recall 1 each; F with beta 2 is 5PR / (4P + R).
    precision = (3 / 4 + 2 / 3 + 1 / 2) / 3
    assert chrf("abcd", "abc") == pytest.approx(5 * precision / (4 * precision + 1))


def test_repeated_characters_match_as_often_as_the_reference_has_them() -> None:
    # order 1: 2 of 4 match, all of the reference's; order 2: 1 of 3, all of the reference's.
    precision = (2 / 4 + 1 / 3) / 2
    assert chrf("aaaa", "aa") == pytest.approx(5 * precision / (4 * precision + 1))


@given(st.text(max_size=30), st.text(max_size=30))
def test_bounds(left: str, right: str) -> None:
    assert 0.0 <= chrf(left, right) <= 1.0 + 1e-12
