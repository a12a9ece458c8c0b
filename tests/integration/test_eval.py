"""memshare eval on tiny models and data of one's own: end to end, killed, resumed, compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from memshare.cli import main
from memshare.evaluation.experiment import EXPERIMENTS
from memshare.llm.base import Chat
from memshare.llm.hf import TransformersBackend
from tests.loop import loop_settings
from tests.tiny_lm import tiny_lm
from tests.unit.evaluation.test_data import write_domain

THINGS = ("teapot", "harbour", "violin", "orchard", "lantern", "engine", "compass", "market")


class Killed(BaseException):
    """The end of the process, as far as the program can tell."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for domain, verb in (("songs", "sing of"), ("plans", "plan for")):
        pairs = [(f"{verb} the {thing} at {n}", f"the {thing} it is, {verb} {n}")
                 for n, thing in enumerate(THINGS)]  # fmt: skip
        tests = [(f"what do we {verb} when the {t} is old?", f"an old {t}") for t in THINGS[:3]]
        files = {"pool": pairs[:5], "problems": pairs[5:], f"test_{domain}": tests}
        write_domain(folder / domain, {**files, "test_hanzi": [("诗", "昔闻洞庭水")]}
                     if domain == "songs" else files)  # fmt: skip
    return folder


def options(tmp_path: Path, models: Path, data: Path, **evaluation: Any) -> list[str]:
    tree = loop_settings(tmp_path / "run", models)
    tree |= {
        "pools": {"keep": {"threshold": 0}},
        "training": {"max_steps": 2, "batch_size": 4},
        "mining": {"candidates": 2, "dense_candidates": 1},
        "evaluation": {
            "data": str(data), "bertscore_model": str(models / "encoder"), "sample": 2,
            **evaluation,
        },
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return ["--config", str(path), "--out", str(tmp_path / "out")]


def report(tmp_path: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    return found


def test_an_experiment_killed_and_resumed_gives_the_same_rows_and_asks_nothing_twice(
    tmp_path: Path, models: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    limit = 10**9
    chat = TransformersBackend.chat

    async def counted(self: Any, question: Chat) -> Any:
        if len(asked) >= limit:
            raise Killed
        asked.append(json.dumps(question.messages))
        return await chat(self, question)

    monkeypatch.setattr(TransformersBackend, "chat", counted)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    assert main(["eval", "pools", *options(whole, models, data)]) == 0
    needed = len(asked)
    assert needed == len(set(asked)) > 12

    asked.clear()
    limit = needed // 2
    with pytest.raises(Killed):
        main(["eval", "pools", *options(broken, models, data)])
    assert not (broken / "out" / "pools.json").exists()
    limit = 10**9
    assert main(["eval", "pools", *options(broken, models, data)]) == 0
    # What was in flight when it was killed is all that may be asked again.
    assert needed <= len(asked) < 2 * needed and len(set(asked)) == needed
    ours, theirs = report(broken, "pools"), report(whole, "pools")
    assert ours["rows"] == theirs["rows"] and ours["paired"] == theirs["paired"]

    datasets = {row["dataset"] for row in ours["rows"]}
    assert datasets == {"songs", "plans", "hanzi", "average"}
    assert {row["metric"] for row in ours["rows"] if row["dataset"] == "hanzi"} == {"chrf"}
    (average,) = (row for row in ours["rows"] if row["arm"] == "domain"
                  and row["dataset"] == "average" and row["metric"] == "bertscore_f1")  # fmt: skip
    assert average["n"] == 6 and average["low"] <= average["value"] <= average["high"]
    page = (whole / "out" / "report.html").read_text()
    assert "pools-1.png" in page and (whole / "out" / "pools-1-dark.png").exists()

    before = len(asked)
    assert main(["eval", "compare", str(whole / "out"), str(broken / "out")]) == 0
    assert main(["eval", "pools", *options(broken, models, data)]) == 0
    assert len(asked) == before  # a finished run asks nothing


def test_all_experiments_end_and_every_row_says_what_it_is(
    tmp_path: Path, models: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few of everything, the pocket world among it, with a partner of another model.

    Random LMs find no end; where they are cut off counts as one, or no answer were ever stored.
    """
    chat = TransformersBackend.chat

    async def ended(self: Any, question: Chat) -> Any:
        return replace(await chat(self, question), finish_reason="stop")

    monkeypatch.setattr(TransformersBackend, "chat", ended)
    partner = tiny_lm(models / "partner", seed=1, context=2048)
    llm = {"backend": "transformers", "model": str(partner), "device": "cpu"}
    arguments = options(tmp_path, models, data, partners={"partner": llm}, world=[8, 8, 3])
    assert main(["eval", "all", *arguments, "--quick"]) == 0
    rows = {name: report(tmp_path, name)["rows"] for name in EXPERIMENTS}
    for name, found in rows.items():
        assert found, name
        for row in found:
            assert row["arm"] and row["dataset"] and row["metric"] and row["model"], (name, row)
            assert row["seed"] == 0 and row["n"] >= 0
            assert row["low"] is None or row["low"] <= row["value"] <= row["high"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(f"<h2>{name}</h2>" in page for name in EXPERIMENTS)

    # Each model answers from its own memories, from as many of its own, and from everyone's.
    shared = {
        (row["arm"], row["model"]): row["value"]
        for row in rows["sharing"]
        if row["metric"] == "count: memories" and row["dataset"] == "world"
    }
    teams = {"lm", "partner"}
    assert {model for _, model in shared} == teams
    seeds = 4  # as `--quick` has it
    written = {model: shared["own memories", model] - seeds for model in teams}
    for model in teams:
        assert written[model] > 0 and shared["own model", model] > seeds
        assert shared["all models", model] == seeds + sum(written.values())
    answered = {
        row["arm"]
        for row in rows["sharing"]
        if row["metric"] == "bertscore_f1" and row["model"] == "partner"
    }
    assert answered == {"own memories", "own model", "all models", "all models, random"}
    # What an encoder, words or the scorer's likelihood has found is put down to them.
    by = {row["arm"]: row["model"] for row in rows["retriever"] if row["metric"] == "MRR@10"}
    assert (by["trained"], by["BM25"], by["oracle"]) == ("encoder", "BM25", "lm")
    paired = report(tmp_path, "retriever")["paired"]
    assert {item["ours"]["arm"] for item in paired if item["metric"] == "MRR@10"} >= {
        "BM25", "trained", "oracle",
    }  # fmt: skip
    tokens = {row["arm"] for row in rows["cost"] if row["metric"] == "tokens per answered question"}
    assert tokens == {"answer", "grade"}
    graded = [row["value"] for row in rows["cost"]
              if row["arm"] == "grade" and row["metric"].startswith("tokens")]  # fmt: skip
    assert min(graded) > 0  # the likelihood scorer has read something
    for name in EXPERIMENTS:  # a gain over no example at all may be anybody's
        if name != "cost":
            assert any("random" in row["arm"] for row in rows[name]), name


def test_a_failed_question_is_counted_and_shown(tmp_path: Path, models: Path, data: Path) -> None:
    """The tiny LM's context takes no answer of this length, so every question fails."""
    settings = ["--set", "agent.max_tokens=600"]
    assert main(["eval", "pools", *options(tmp_path, models, data), *settings]) == 0
    found = report(tmp_path, "pools")
    answered = [row for row in found["rows"] if row["metric"] == "bertscore_f1"]
    assert answered and all(row["value"] == 0.0 and row["failed"] == row["n"] for row in answered)
    assert found["failed"] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{found['failed']} question(s) failed" in page


def test_a_dry_run_asks_nobody_and_shows_what_leaks(
    tmp_path: Path, models: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "all", *options(tmp_path, models, data), "--dry-run"]
    assert main([*arguments, "--set", "agent_llm.model=/no/such/model"]) == 0
    plan = yaml.safe_load(capsys.readouterr().out)
    assert plan["data"]["songs"]["tests"] == {"hanzi": 1, "songs": 3}
    assert plan["data"]["songs"]["leaks"][1]["exact_questions"] == 0
    assert "shots" in plan["experiments"] and plan["config"]["run"]["seed"] == 0
    assert not (tmp_path / "out").exists()


def test_what_can_not_start_says_why(
    tmp_path: Path, models: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "shots", *options(tmp_path, models, tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    missing = ["--set", "agent_llm.model=/no/such/model"]
    assert main(["eval", "shots", *options(tmp_path, models, data), *missing]) == 2
    assert "/no/such/model" in capsys.readouterr().err
