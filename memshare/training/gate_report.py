"""What the gate found, in the W&B run of the training that it judged.

The run is opened once more, after its training has ended, where the training has left it: offline
if W&B could not be reached then. Publishing is done by that time and waits for nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memshare.config import WandbConfig
from memshare.retrieval.gate import GateResult, Sample
from memshare.training.tracking import Rows, Tracker


def gate_figures(record: Mapping[str, Any]) -> dict[str, float]:
    """`GateResult.record` as flat figures: ``gate/next/MRR@10``, ``gate/minus_current/MRR@10``."""
    figures = {
        "gate/passed": float(record["passed"]),
        "gate/queries": float(record["queries"]),
    }
    for retriever in ("bm25", "current", "best", "next"):
        for metric, value in record.get(retriever, {}).items():
            figures[f"gate/{retriever}/{metric}"] = value
    for rival, metrics in record.get("differences", {}).items():
        for metric, interval in metrics.items():
            figures[f"gate/minus_{rival}/{metric}"] = interval["mean"]
            figures[f"gate/minus_{rival}/{metric}/low"] = interval["low"]
    return figures


def report_gate(
    output: Path, training: Mapping[str, Any], verdict: GateResult, config: WandbConfig
) -> None:
    """Add the verdict to the run of the training into ``output``, which reported ``training``."""
    settings = config.model_copy(update={"mode": training["wandb"]["mode"]})
    steps = int(training["steps"])
    # A step of its own, so that a second report takes the first one's place in the log.
    with Tracker(
        output, settings, run_id=training["wandb"]["id"], settings={}, done=steps
    ) as tracker:
        tracker.log(steps + 1, gate_figures(verdict.record()))
        tracker.table(steps + 1, "gate/samples", Rows(Sample._fields, verdict.samples))
