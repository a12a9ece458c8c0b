"""Write a report: report.json, report.html and one PNG a plot, from plain tables and series.

What a report says is decided by the experiment; this file only knows how tables and plots look.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from memshare.files import write_atomic, write_json

_COLOURS = ("#2f6db3", "#d9822b", "#3c9a5f", "#a14a76", "#6b6b6b")


@dataclass(frozen=True)
class Table:
    """A captioned table; numbers are shown to three decimals, None as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Series:
    """One line or group of bars: values at the plot's ticks, with interval bounds if measured."""

    label: str
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Plot:
    """A plot of series over shared ticks."""

    name: str  # file name without ending
    title: str
    kind: Literal["bars", "lines"]
    ticks: Sequence[str]
    series: Sequence[Series]
    x_label: str
    y_label: str


def machine() -> dict[str, Any]:
    """What made a figure: system, processor, cores that this process may use, memory (bytes), GPUs.

    Neither torch nor its driver is loaded for it.
    """
    return {
        "system": platform.platform(),
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    try:
        return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []  # no driver here, so no GPU


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write_report(
    folder: Path,
    title: str,
    summary: Mapping[str, Any],
    record: Mapping[str, Any],
    tables: Sequence[Table],
    plots: Sequence[Plot],
) -> Path:
    """Write the three forms into ``folder``; ``record`` becomes report.json as it stands.

    ``summary`` are the facts at the head of the page. Returns the path of report.html.
    """
    from jinja2 import Environment

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", record)
    for plot in plots:
        draw(plot, folder / f"{plot.name}.png")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = _cell
    source = resources.files("memshare.evaluation").joinpath("report.html").read_text("utf-8")
    page = environment.from_string(source).render(
        title=title, summary=summary, tables=tables, plots=plots
    )
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def print_tables(tables: Sequence[Table]) -> None:
    """Show the tables on standard output."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    for table in tables:
        shown = RichTable(title=table.title, title_justify="left", caption=table.note or None)
        for number, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if number else "left")
        for row in table.rows:
            shown.add_row(*map(_cell, row))
        console.print(shown)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def draw(plot: Plot, path: Path) -> None:
    """Write ``plot`` to ``path`` as a picture (PNG)."""
    # The object interface: no global backend is chosen, no state is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    positions = range(len(plot.ticks))
    width = 0.8 / len(plot.series)
    for number, series in enumerate(plot.series):
        colour = _COLOURS[number % len(_COLOURS)]
        errors = None
        if series.low is not None and series.high is not None:
            errors = [
                [v - low for v, low in zip(series.values, series.low, strict=True)],
                [high - v for v, high in zip(series.values, series.high, strict=True)],
            ]
        if plot.kind == "bars":
            at = [p + (number - (len(plot.series) - 1) / 2) * width for p in positions]
            axes.bar(at, series.values, width * 0.92, yerr=errors, capsize=2, label=series.label,
                     color=colour, error_kw={"elinewidth": 1})  # fmt: skip
        else:
            axes.errorbar(positions, series.values, yerr=errors, marker="o", capsize=3,
                          label=series.label, color=colour)  # fmt: skip
    axes.set_xticks(list(positions), plot.ticks)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.set_title(plot.title, fontsize=11)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if len(plot.series) > 1:
        figure.legend(loc="outside lower center", ncols=min(4, len(plot.series)), frameon=False)
    figure.savefig(path)
