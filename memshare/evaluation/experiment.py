"""Experiments: what one is, which there are, and how one is run and written down.

An experiment is a module of `memshare.evaluation.experiments` with one function that yields rows,
and an `Experiment` named ``EXPERIMENT`` that says what it asks, which arms are to be compared, and
how the rows are drawn. Everything else (averages, intervals, paired tests, JSON) is done here, the
same way for all.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import AsyncIterator, Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from memshare.config import Config
from memshare.evaluation.lab import Lab
from memshare.evaluation.measures import CHRF, F1
from memshare.evaluation.report import machine
from memshare.evaluation.rows import (
    AVERAGE,
    WORLD,
    Key,
    Row,
    averages,
    differences,
    matched,
)
from memshare.files import write_atomic, write_json
from memshare.progress import log
from memshare.version import commit

EXPERIMENTS = (
    "shots", "growth", "pools", "retriever", "sharing", "threshold", "bootstrap", "pruning",
    "labels", "cost",
)  # fmt: skip


@dataclass(frozen=True)
class View:
    """One plot of a metric.

    ``bars``: arms side by side, over all datasets; ``rows``: arms one below the other, and
    ``lines``: over `Row.at`, both of ``datasets`` alone. ``arms``, as
    "arm" or "arm@point": which ones; none: lines show all that have points, the others all that
    have none.
    """

    title: str
    kind: Literal["bars", "lines", "rows"]
    x_label: str
    y_label: str = "BERTScore F1"
    metric: str = F1
    datasets: tuple[str, ...] = (AVERAGE, WORLD)
    arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """What an experiment asks and how it is told.

    ``contrasts``: pairs of arms, (ours, theirs), compared by each of the metrics ``tested``, at the
    same point unless theirs names one: "arm@point". ``shown``: the metrics of the tables.
    """

    name: str
    asks: str
    rows: Callable[[Lab], AsyncIterator[Row]]
    contrasts: tuple[tuple[str, str], ...] = ()
    shown: tuple[str, ...] = (F1, CHRF)
    tested: tuple[str, ...] = (F1, CHRF)
    views: tuple[View, ...] = ()


def load_experiment(name: str) -> Experiment:
    """The experiment of that name; only its module is imported."""
    module = importlib.import_module(f"memshare.evaluation.experiments.{name}")
    found: Experiment = module.EXPERIMENT
    return found


async def run_experiment(experiment: Experiment, lab: Lab, *, quick: bool) -> dict[str, Any]:
    """Measure, and write ``<name>.json`` and ``<name>.questions.json`` into the lab's folder.

    Returns the first: ``rows``, ``paired`` differences, and what made them. What was asked before
    is not asked again, so a run that was killed goes on where it stopped.
    """
    began, busy, known = time.perf_counter(), time.process_time(), lab.cache.hits
    rows: list[Row] = []
    async for row in experiment.rows(lab):
        rows.append(row)
    rows += averages(rows)
    paired = differences(contrasts(experiment, rows, lab.team.keys()), lab.seed)
    record = {
        "experiment": experiment.name,
        "asks": experiment.asks,
        "rows": [row.record() for row in rows],
        "paired": [difference.record() for difference in paired],
        "failed": sum(row.failed for row in rows if row.metric in (F1, CHRF)
                      and row.dataset != AVERAGE),
        **provenance(lab, quick),
        "cached_results": lab.cache.hits - known,
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - busy,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    questions = [
        {**row.key._asdict(), "questions": row.questions} for row in rows if row.dataset != AVERAGE
    ]
    write_json(lab.out / f"{experiment.name}.json", record)
    text = json.dumps({"rows": questions}, ensure_ascii=False, allow_nan=False)
    write_atomic(lab.out / f"{experiment.name}.questions.json", text + "\n")
    log(f"{experiment.name}: {len(rows)} rows in {record['seconds']:.0f} s")
    return record


def contrasts(
    experiment: Experiment, rows: Sequence[Row], agents: Container[str]
) -> list[tuple[Row, Row]]:
    """The rows of arms that the experiment compares, with their opposites.

    What ranked may differ on the two sides, but never which of the ``agents`` answered.
    """
    tested = [row for row in rows if row.metric in experiment.tested]
    pairs: list[tuple[Row, Row]] = []
    for ours, theirs in experiment.contrasts:
        arm, point, at = theirs.partition("@")

        def opposite(key: Key, arm: str = arm, at: str | None = at if point else None) -> Key:
            return key._replace(arm=arm, at=key.at if at is None else at)

        pairs += matched((row for row in tested if row.arm == ours), tested, opposite)
    return [
        (row, other)
        for row, other in pairs
        if row is not other
        and (row.model == other.model or not (row.model in agents and other.model in agents))
    ]


def provenance(lab: Lab, quick: bool) -> dict[str, Any]:
    """What made the figures: models, data, seed, settings, machine."""
    return {
        "models": {
            "agents": {name: agent.llm.model for name, agent in lab.team.items()},
            "scorer": lab.scorer_llm.model,
            "encoder": lab.config.encoder.model,
            "bertscore": lab.config.evaluation.bertscore_model,
            "bertscore_layer": lab.measures.bert.layer,
        },
        "data": {
            name: {
                "memories": len(domain.pairs),
                "tests": {dataset: len(tests) for dataset, tests in domain.tests.items()},
            }
            for name, domain in lab.domains.items()
        },
        "settings": settings(lab.config),
        "seed": lab.seed,
        "quick": quick,
        "machine": machine(),
        "commit": commit(),
    }


def settings(config: Config) -> Mapping[str, Any]:
    """The sections that decide what is measured."""
    names = (
        "pools", "encoder", "agent", "scorer", "bm25", "mining", "training", "split", "bootstrap",
        "evaluation",
    )  # fmt: skip
    everything = config.model_dump(mode="json")
    return {name: everything[name] for name in names}


def read_record(path: Path) -> dict[str, Any]:
    """What `run_experiment` wrote. Raises ValueError for a file that is something else."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "experiment" not in record or "rows" not in record:
        raise ValueError(f"{path}: not the report of an experiment")
    return record
