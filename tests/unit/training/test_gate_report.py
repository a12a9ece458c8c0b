"""The gate's figures in the run of the training: log.jsonl, and W&B's own files."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from memshare.config import WandbConfig
from memshare.retrieval.gate import GateResult, Sample
from memshare.training.gate_report import gate_figures, report_gate
from memshare.training.tracking import Tracker

MEANS = {"MRR@10": 0.5, "nDCG@10": 0.25}
VERDICT = GateResult(
    True, "better", 7,
    figures={
        "next": MEANS, "current": {"MRR@10": 0.25}, "bm25": {"MRR@10": 0.125},
        "differences": {"current": {"MRR@10": {"mean": 0.25, "low": -0.0625, "high": 0.5}}},
        "margin": 0.02, "generations": {"current": 3},
    },
    samples=(Sample("which rain", "next", 1, "the rain of may", 1.5),),
)  # fmt: skip


def test_figures_are_flat() -> None:
    assert gate_figures(VERDICT.record()) == {
        "gate/passed": 1.0, "gate/queries": 7.0, "gate/next/MRR@10": 0.5, "gate/next/nDCG@10": 0.25,
        "gate/current/MRR@10": 0.25, "gate/bm25/MRR@10": 0.125,
        "gate/minus_current/MRR@10": 0.25, "gate/minus_current/MRR@10/low": -0.0625,
    }  # fmt: skip
    assert gate_figures(GateResult(True, "no held-out queries", 0).record()) == {
        "gate/passed": 1.0, "gate/queries": 0.0,
    }  # fmt: skip


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_they_join_the_run_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)  # online, if it were not for the training's mode
    config = WandbConfig(mode="offline")
    with Tracker(tmp_path, config, run_id="run1", settings={"lr": 1.0}) as tracker:
        tracker.log(4, {"loss": 0.5})
    training = {"steps": 4, "wandb": tracker.wandb}
    for _ in range(2):  # a program that was killed after it reported reports again
        report_gate(tmp_path, training, VERDICT, WandbConfig(mode="auto"))
    figures = gate_figures(VERDICT.record())
    assert lines(tmp_path) == [{"step": 4, "loss": 0.5}, {"step": 5, **figures}]
    until = time.monotonic() + 30.0  # W&B's own process writes them
    tables: list[Path] = []
    while not tables and time.monotonic() < until:
        # W&B numbers runs that were opened within the same second.
        tables = list(tmp_path.glob("wandb/offline-run-*-run1*/files/media/table/gate/*.json"))
        time.sleep(0.05)
    shown = json.loads(tables[0].read_text())
    assert shown["columns"] == ["question", "retriever", "rank", "memory", "gain"]
    assert shown["data"] == [["which rain", "next", 1, "the rain of may", 1.5]]


def test_without_wandb_the_log_alone_has_them(tmp_path: Path) -> None:
    training = {"steps": 2, "wandb": {"id": "a", "mode": "disabled", "dir": None, "url": None}}
    report_gate(tmp_path, training, VERDICT, WandbConfig(mode="online"))
    (line,) = lines(tmp_path)
    assert line["step"] == 3 and line["gate/next/MRR@10"] == 0.5
    assert not (tmp_path / "wandb").exists()
