import pytest

from memshare.metrics.rouge import rouge_l


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # police the gunman of 4 candidate and 4 reference words (Lin 2004, section 3.1): 3 in order.
    assert rouge_l("police kill the gunman", "police killed the gunman") == 1.0  # stemmed
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert rouge_l("the cat", "the cat sat down") == pytest.approx(2 / 3)
    assert rouge_l("", "anything") == rouge_l("nothing", "") == 0.0
