import json
from pathlib import Path

import pytest

from memshare.cli import main
from memshare.evaluation.compare import NothingToCompare, compare
from memshare.evaluation.measures import CHRF, F1

Values = dict[str, float]


def write_run(
    folder: Path, model: str, arms: dict[str, Values], experiment: str = "growth"
) -> Path:
    rows = [
        {"arm": arm, "at": "100%", "dataset": dataset, "metric": F1, "model": model,
         "split": "decontaminated", "questions": questions}
        for arm, questions in arms.items()
        for dataset in ("puns", "riddles")
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{experiment}.questions.json").write_text(json.dumps({"rows": rows}))
    return folder


def values(mean: float) -> Values:
    return {f"q{i}": mean + (0.01 if i % 2 else -0.01) for i in range(10)}


def test_second_minus_first_by_question_and_over_all_datasets(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", "small", {"frozen": values(0.2), "random": values(0.2)})
    second = write_run(tmp_path / "b", "large", {"frozen": values(0.5), "only here": values(1.0)})
    found = {d.ours.dataset: d for d in compare(first, second)["growth"]}
    assert found.keys() == {"puns", "riddles", "average"}  # one agent each: its name is no matter
    assert {d.ours.arm for d in found.values()} == {"frozen"}
    assert found["puns"].mean == pytest.approx(0.3) and found["puns"].n == 10
    assert found["average"].n == 20 and found["average"].p < 0.01


def test_with_several_agents_only_equal_names_are_compared(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", "small", {"frozen": values(0.2)})
    both = json.loads((write_run(tmp_path / "b", "small", {"frozen": values(0.4)})
                       / "growth.questions.json").read_text())  # fmt: skip
    other = [{**row, "model": "large"} for row in both["rows"]]
    path = tmp_path / "b" / "growth.questions.json"
    path.write_text(json.dumps({"rows": both["rows"] + other}))
    found = compare(first, tmp_path / "b")["growth"]
    assert {d.ours.model for d in found} == {"small"} and len(found) == 3


def test_what_no_agent_answered_is_compared_too(tmp_path: Path) -> None:
    """Rows of one run by several models, which have their counterparts each for itself."""
    for run, agent, encoder, mean in (("a", "small", "old", 0.2), ("b", "large", "new", 0.5)):
        rows = json.loads((write_run(tmp_path / run, agent, {"frozen": values(mean)}, "retriever")
                           / "retriever.questions.json").read_text())["rows"]  # fmt: skip
        rows += [{**row, "metric": "MRR@10", "model": encoder} for row in rows]
        (tmp_path / run / "retriever.questions.json").write_text(json.dumps({"rows": rows}))
    found = compare(tmp_path / "a", tmp_path / "b")["retriever"]
    assert {(d.ours.metric, d.ours.model, d.theirs.model) for d in found} == {
        (F1, "large", "small"), ("MRR@10", "new", "old"),
    }  # fmt: skip
    assert all(d.mean == pytest.approx(0.3) and d.p <= d.p_holm < 0.05 for d in found)


def test_bertscores_by_two_models_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    for run, bertscore, mean in zip(runs, ("small", "large"), (0.2, 0.7), strict=True):
        write_run(run, "agent", {"frozen": values(mean)})
        rows = json.loads((run / "growth.questions.json").read_text())["rows"]
        rows += [{**row, "metric": CHRF, "dataset": "lvshi"} for row in rows[:1]]
        (run / "growth.questions.json").write_text(json.dumps({"rows": rows}))
        models = {"bertscore": bertscore, "bertscore_layer": 6}
        report = {"experiment": "growth", "rows": [], "models": models}
        (run / "growth.json").write_text(json.dumps(report))
    assert {d.ours.metric for d in compare(*runs)["growth"]} == {CHRF}
    assert "growth: BERTScore by small, layer 6 and by large, layer 6" in capsys.readouterr().err
    assert {d.ours.metric for d in compare(runs[0], runs[0])["growth"]} == {CHRF, F1}


@pytest.mark.parametrize("content", ["", "[]", '{"rows": [{"arm": "a", "questions": {"q": 1}}]}'])
def test_what_is_no_run_is_refused(tmp_path: Path, content: str) -> None:
    first = write_run(tmp_path / "a", "small", {"frozen": values(0.2)})
    (tmp_path / "b").mkdir()
    with pytest.raises(NothingToCompare, match="in common"):
        compare(first, tmp_path / "b")
    (tmp_path / "b" / "growth.questions.json").write_text(content)
    with pytest.raises(NothingToCompare, match=r"growth\.questions\.json"):
        compare(first, tmp_path / "b")
    with pytest.raises(NothingToCompare, match="no such folder"):
        compare(first, tmp_path / "c")


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "a", "small", {"frozen": values(0.2)})
    second = write_run(tmp_path / "b", "small", {"frozen": values(0.5)})
    out = tmp_path / "compared.json"
    assert main(["eval", "compare", str(first), str(second), "--json", str(out)]) == 0
    (puns, *_) = json.loads(out.read_text())["growth"]
    assert puns["mean"] == pytest.approx(0.3) and puns["dataset"] == "puns"
    assert "+0.300" in capsys.readouterr().out
    assert main(["eval", "compare", str(first), str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
