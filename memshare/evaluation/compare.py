"""Two runs side by side: what is better in the second, question by question, and how surely."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memshare.evaluation.experiment import EXPERIMENTS, load_experiment, read_record
from memshare.evaluation.measures import BERTSCORES
from memshare.evaluation.report import Table, p_value
from memshare.evaluation.rows import (
    Difference,
    Key,
    Row,
    averages,
    differences,
    matched,
    mean_row,
)
from memshare.progress import log


class NothingToCompare(ValueError):
    """Two runs have no question in common, or one is no run; the message says which."""


def read_rows(run: Path, experiment: str, metrics: Sequence[str], seed: int) -> list[Row]:
    """A run's rows by ``metrics`` that have single questions, averages included.

    Raises `NothingToCompare` for a file that can't be read.
    """
    path = run / f"{experiment}.questions.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["rows"]
        rows = [
            mean_row(Key(**{name: item[name] for name in Key._fields}), item["questions"], seed)
            for item in stored
            if item["questions"] and item["metric"] in metrics
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NothingToCompare(f"{path}: not an experiment's questions: {error!r}") from error
    return rows + averages(rows)


def measured_by(report: Path) -> str | None:
    """What an experiment's BERTScore is by; None where only its questions were kept.

    Raises `NothingToCompare` for a report that can't be read.
    """
    if not report.exists():
        return None
    try:
        models = read_record(report)["models"]
        return f"{models['bertscore']}, layer {models['bertscore_layer']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NothingToCompare(f"{report}: not an experiment's report: {error!r}") from error


def compare(first: Path, second: Path, *, seed: int = 0) -> dict[str, list[Difference]]:
    """Second minus first, by experiment, for every measurement that both have.

    Where one model made the number in each run they are compared whatever they are called
    (`matched`). BERTScores by two models measure two things, and are left out. Raises
    `NothingToCompare`.
    """
    for run in (first, second):
        if not run.is_dir():
            raise NothingToCompare(f"{run}: no such folder; give the --out of two runs")
    found: dict[str, list[Difference]] = {}
    for name in EXPERIMENTS:
        if all((run / f"{name}.questions.json").exists() for run in (first, second)):
            tested = load_experiment(name).tested
            one, other = (measured_by(run / f"{name}.json") for run in (first, second))
            if one and other and one != other:
                log(f"{name}: BERTScore by {one} and by {other}, which can't be compared: left out")
                tested = tuple(metric for metric in tested if metric not in BERTSCORES)
            ours, theirs = (read_rows(run, name, tested, seed) for run in (second, first))
            found[name] = differences(matched(ours, theirs), seed)
    if not any(found.values()):
        raise NothingToCompare(f"{first} and {second} have no question of an experiment in common")
    return found


def tables(found: dict[str, list[Difference]]) -> list[Table]:
    """One table an experiment."""
    columns = ["arm", "at", "dataset", "metric", "split", "second − first", "95 % low", "high", "p",
               "p (Holm)", "n"]  # fmt: skip
    return [
        Table(
            experiment,
            columns,
            [
                [d.ours.arm, d.ours.at, d.ours.dataset, d.ours.metric, d.ours.split,
                 f"{d.mean:+.3f}", f"{d.low:+.3f}", f"{d.high:+.3f}", p_value(d.p),
                 p_value(d.p_holm), d.n]
                for d in found_here
            ],
            "Paired by question. Holm's p allows for the number of rows of this table.",
        )
        for experiment, found_here in found.items()
        if found_here
    ]  # fmt: skip


def record(found: dict[str, list[Difference]]) -> dict[str, Any]:
    """The report's form."""
    return {name: [item.record() for item in items] for name, items in found.items()}
