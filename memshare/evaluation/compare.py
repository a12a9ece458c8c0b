"""Two runs side by side: what is better in the second, question by question, and how surely."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memshare.evaluation.experiment import EXPERIMENTS, load_experiment
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


def compare(first: Path, second: Path, *, seed: int = 0) -> dict[str, list[Difference]]:
    """Second minus first, by experiment, for every measurement that both have.

    Where one model made the number in each run they are compared whatever they are called
    (`matched`). Raises `NothingToCompare`.
    """
    for run in (first, second):
        if not run.is_dir():
            raise NothingToCompare(f"{run}: no such folder; give the --out of two runs")
    found: dict[str, list[Difference]] = {}
    for name in EXPERIMENTS:
        if all((run / f"{name}.questions.json").exists() for run in (first, second)):
            tested = load_experiment(name).tested
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
