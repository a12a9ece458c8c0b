from memshare.evaluation.arms import Arm
from memshare.metrics.bertscore import BertScore


def test_an_arm_counts_failures_also_in_its_parts() -> None:
    arm = Arm([BertScore(0.5, 0.5, 0.5), BertScore(0, 0, 0), BertScore(1, 1, 1)], ["a", None, ""])
    assert arm.failed == 1
    assert arm.part([0, 2]).failed == 0 and arm.part([1]).failed == 1
    assert arm.part([0, 2]).summary(seed=0)["f1"] == 0.75
