"""From what the experiments wrote to tables and plots, and the one page of all of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memshare.evaluation.experiment import (
    EXPERIMENTS,
    Experiment,
    View,
    load_experiment,
    read_record,
)
from memshare.evaluation.measures import CHRF
from memshare.evaluation.report import Plot, Section, Series, Table, number, p_value, write_report
from memshare.evaluation.rows import AVERAGE, DECONTAMINATED, WORLD

Record = Mapping[str, Any]
_QUICK = "quick: a few of everything, no findings"
_FIRST = (AVERAGE, WORLD)  # the columns that a reader looks for
_NAMES = {
    "bertscore_precision": "BERTScore precision", "bertscore_recall": "BERTScore recall",
    "bertscore_f1": "BERTScore F1", "rouge_l": "ROUGE-L", "chrf": "chrF",
}  # fmt: skip


def write_page(
    out: Path, missing: Mapping[str, str] | None = None, new: Collection[str] = EXPERIMENTS
) -> Path:
    """The report of every experiment whose JSON lies in ``out``; returns its path.

    ``missing``: experiments that failed, and why; the page says so. ``new``: those whose plots are
    to be drawn again; of the others only what is missing is.
    """
    records = [read_record(out / f"{name}.json") for name in EXPERIMENTS
               if (out / f"{name}.json").exists()]  # fmt: skip
    sections = [section(record) for record in records]
    sections += [Section(name, f"Failed: {why}", [], []) for name, why in (missing or {}).items()]
    return write_report(out, "memshare eval", summary(records), sections, new)


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """The facts at the head of the page. A folder may hold several runs: then all they say."""
    if not records:
        return {}
    facts = [_facts(record) for record in records]
    return {
        **{name: "; ".join(dict.fromkeys(fact[name] for fact in facts)) for name in facts[0]},
        "finished": max(record["finished_at"] for record in records),
        "seconds in all": round(sum(record["seconds"] for record in records)),
        "processor seconds": round(sum(record["processor_seconds"] for record in records)),
    }


def _facts(record: Record) -> dict[str, str]:
    models, machine = record["models"], record["machine"]
    return {
        "agents": ", ".join(f"{name} ({id_})" for name, id_ in models["agents"].items()),
        "scorer": models["scorer"],
        "encoder": models["encoder"],
        "BERTScore": f"{models['bertscore']}, layer {models['bertscore_layer']}",
        "seed": str(record["seed"]),
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {len(machine['gpus'])} GPUs",
        "commit": record["commit"],
        "sizes": _QUICK if record["quick"] else "as configured",
    }


def section(record: Record) -> Section:
    """One experiment's part of the page."""
    experiment = load_experiment(record["experiment"])
    failed = record["failed"]
    text = (
        f"{experiment.asks} ({failed} question(s) failed and count as 0; "
        f"{record['seconds']:.0f} s{'; ' + _QUICK if record['quick'] else ''}.)"
    )
    tables = [table for metric in experiment.shown for table in metric_tables(record, metric)]
    tables += [*paired_tables(record), *count_tables(record)]
    plots = [plot for view in experiment.views for plot in view_plots(experiment, view, record)]
    return Section(experiment.name, text, tables, plots)


def metric_tables(record: Record, metric: str) -> list[Table]:
    """A metric's tables, one a split: arms down, datasets across.

    Averages and the pocket world come with their interval, single datasets without.
    """
    tables = []
    for split in dict.fromkeys(row["split"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["metric"] == metric and row["split"] == split]
        if not rows:
            continue
        datasets = ordered(row["dataset"] for row in rows)
        cells = {(row["model"], row["arm"], row["at"], row["dataset"]): row for row in rows}
        lines = []
        for model, arm, at in dict.fromkeys(key[:3] for key in cells):
            found = [cells.get((model, arm, at, dataset)) for dataset in datasets]
            lines.append([arm, at, model, *map(cell, found)])
        title = _NAMES.get(metric, metric) + ("" if split == DECONTAMINATED else f" ({split})")
        tables.append(without_empty(title, ["arm", "at", "model", *datasets], lines))
    return tables


def cell(row: Record | None) -> str | None:
    """A value, with its interval where the column is one of the first."""
    if row is None:
        return None
    value = number(row["value"])
    if row["low"] is not None and row["dataset"] in _FIRST:
        return f"{value} ({number(row['low'])}–{number(row['high'])})"
    return value


def without_empty(title: str, columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> Table:
    """A table without the columns that are empty, or the same model or split, everywhere."""
    keep = [
        i for i, name in enumerate(columns)
        if len({line[i] for line in lines}) > 1 or (name not in ("at", "model", "split"))
    ]  # fmt: skip
    return Table(title, [columns[i] for i in keep], [[line[i] for i in keep] for line in lines])


def paired_tables(record: Record) -> list[Table]:
    """The contrasts over averages and the pocket world, and by characters; the rest is in JSON."""
    shown = [
        item for item in record["paired"] if item["dataset"] in _FIRST or item["metric"] == CHRF
    ]
    lines = []
    for item in shown or record["paired"]:
        ours, theirs = ({**item, **item[side]} for side in ("ours", "theirs"))
        other = theirs["arm"] if ours["at"] == theirs["at"] else arm_at(theirs)
        lines.append([
            f"{ours['arm']} − {other}", ours["at"], ours["model"], item["dataset"],
            _NAMES.get(item["metric"], item["metric"]), item["split"], f"{item['mean']:+.3f}",
            f"{item['low']:+.3f}", f"{item['high']:+.3f}", p_value(item["p"]),
            p_value(item["p_holm"]), item["n"],
        ])  # fmt: skip
    if not lines:
        return []
    columns = ["difference", "at", "model", "dataset", "metric", "split", "mean", "95 % low",
               "high", "p", "p (Holm)", "n"]  # fmt: skip
    found = without_empty("Differences, question by question", columns, lines)
    return [
        Table(found.title, found.columns, found.rows,
              "Paired bootstrap and paired randomisation test; Holm's p allows for all differences "
              "of this experiment, those of single datasets too, which are in the JSON.")
    ]  # fmt: skip


def count_tables(record: Record) -> list[Table]:
    """What was counted."""
    rows = [row for row in record["rows"] if row["metric"].startswith("count: ")]
    datasets = ordered(row["dataset"] for row in rows)
    cells = {(row["arm"], row["at"], row["model"], row["metric"], row["dataset"]): row
             for row in rows}  # fmt: skip
    lines = []
    for key in dict.fromkeys(key[:4] for key in cells):
        counted = [cells.get((*key, dataset)) for dataset in datasets]
        values = [None if row is None else round(row["value"]) for row in counted]
        lines.append([*key[:3], key[3].removeprefix("count: "), *values])
    if not lines:
        return []
    return [without_empty("Counts", ["arm", "at", "model", "what", *datasets], lines)]


def ordered(datasets: Iterable[str]) -> list[str]:
    """Averages first."""
    found = dict.fromkeys(datasets)
    return [*(name for name in _FIRST if name in found),
            *(name for name in found if name not in _FIRST)]  # fmt: skip


def view_plots(experiment: Experiment, view: View, record: Record) -> list[Plot]:
    """A view's plots; none where nothing of it was measured. Decontaminated data only.

    Where an arm has several models, lines and bars are drawn for each of them apart.
    """
    rows = [
        row for row in record["rows"]
        if row["metric"] == view.metric and row["split"] == DECONTAMINATED
    ]  # fmt: skip
    wanted = set(view.arms)
    if wanted:
        rows = [row for row in rows if arm_at(row) in wanted or row["arm"] in wanted]
    else:
        rows = [row for row in rows if bool(row["at"]) == (view.kind == "lines")]
    name = f"{experiment.name}-{experiment.views.index(view) + 1}"
    if view.kind == "rows":
        rows = [row for row in rows if row["dataset"] in view.datasets]
        return [grid_plot(name, view, rows, "arm", "dataset")] if rows else []
    plots = []
    for model, part in by_model(rows).items():
        suffix = "-" + re.sub(r"[^\w.-]+", "-", model) if model else ""
        named = replace(view, title=f"{view.title}, {model}" if model else view.title)
        if view.kind == "bars":
            plots.append(grid_plot(name + suffix, named, part, "dataset", "arm"))
            continue
        plots += [
            lines_plot(f"{name}-{dataset}{suffix}", named, dataset, found)
            for dataset in view.datasets
            if (found := [row for row in part if row["dataset"] == dataset])
        ]
    return plots


def by_model(rows: Sequence[Record]) -> dict[str, list[Record]]:
    """A plot's rows by their model, so that it stays readable; all under "" if no arm has two."""
    models: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        models[row["arm"]].add(row["model"])
    several = any(len(names) > 1 for names in models.values())
    parts: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        parts[row["model"] if several else ""].append(row)
    return parts


def arm_at(row: Record) -> str:
    """A row's arm and point, as a view names them."""
    return f"{row['arm']}@{row['at']}"


def label(row: Record, record_rows: Sequence[Record]) -> str:
    """A row's arm, with its model where the arm was measured by several."""
    several = len({other["model"] for other in record_rows if other["arm"] == row["arm"]}) > 1
    return f"{row['arm']} ({row['model']})" if several else str(row["arm"])


def lines_plot(name: str, view: View, dataset: str, rows: Sequence[Record]) -> Plot:
    """One dataset's arms over their points."""
    ticks = list(dict.fromkeys(row["at"] for row in rows))
    ticks.sort(key=lambda at: float(at.rstrip("%")))
    series = []
    for arm in dict.fromkeys(label(row, rows) for row in rows):
        points = {row["at"]: row for row in rows if label(row, rows) == arm}
        series.append(_series(arm, [points.get(at) for at in ticks]))
    return Plot(
        name, f"{view.title}: {dataset}", "lines", ticks, series, view.x_label, view.y_label
    )


def grid_plot(name: str, view: View, rows: Sequence[Record], down: str, across: str) -> Plot:
    """Bars: ``down`` gives the ticks, ``across`` the series."""

    def named(row: Record, field: str) -> str:
        return label(row, rows) if field == "arm" else str(row[field])

    def told(field: str) -> list[str]:
        names = (named(row, field) for row in rows)
        return ordered(names) if field == "dataset" else list(dict.fromkeys(names))

    ticks = told(down)
    series = []
    for one in told(across):
        cells = {named(row, down): row for row in rows if named(row, across) == one}
        series.append(_series(one, [cells.get(tick) for tick in ticks]))
    return Plot(name, view.title, "rows" if view.kind == "rows" else "bars", ticks, series,
                view.x_label, view.y_label)  # fmt: skip


def _series(name: str, rows: Sequence[Record | None]) -> Series:
    nan = float("nan")  # matplotlib leaves a gap

    def column(field: str) -> list[float]:
        return [
            nan if row is None else float(row["value"] if row[field] is None else row[field])
            for row in rows
        ]

    return Series(name, column("value"), column("low"), column("high"))
