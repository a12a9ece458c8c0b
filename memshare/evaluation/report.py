"""Write a report: report.html and two PNGs a plot (light and dark), from plain tables and series.

What a report says is decided by the experiment; this file only knows how it looks.
"""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from memshare.files import write_atomic

# Told apart in both themes, and by eyes that don't see red and green apart (after Okabe & Ito).
_COLOURS = ("#2f7fc1", "#e08a1e", "#2a9d74", "#c45f9a", "#8a8f98", "#b8a021", "#7a6fd0", "#d2553f",
            "#9c6b3f", "#3fb5c9")  # fmt: skip
_PAGE_WIDTH = 200
_NUMBER = re.compile(r"[-+−<]?\d")
_THEMES = {"": ("#1c2128", "#ffffff"), "-dark": ("#e3e7ec", "#16191d")}  # as in report.html


@dataclass(frozen=True)
class Table:
    """A captioned table; numbers are shown by `number`, None as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    @property
    def worded(self) -> list[bool]:
        """For each column whether it stands on the left: the first, and those without a number."""
        return [
            place == 0 or not any(_NUMBER.match(_cell(row[place])) for row in self.rows)
            for place in range(len(self.columns))
        ]


@dataclass(frozen=True)
class Series:
    """One line or group of bars: values at the plot's ticks, with interval bounds if measured."""

    label: str
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Plot:
    """A plot of series over shared ticks; ``rows``: bars that lie, with the ticks beside them."""

    name: str  # file name without ending
    title: str
    kind: Literal["bars", "lines", "rows"]
    ticks: Sequence[str]
    series: Sequence[Series]
    x_label: str
    y_label: str

    @property
    def files(self) -> dict[str, str]:
        """Theme -> name of the picture's file."""
        return {theme: f"{self.name}{theme}.png" for theme in _THEMES}

    @property
    def inches(self) -> tuple[float, float]:
        """Width and height, so that every bar, interval and name of a tick has its place."""
        bars = len(self.ticks) * (len(self.series) + 1)
        if self.kind == "rows":
            return 7.2, max(2.6, 0.16 * bars + 1.4)
        each = 0.16 if self.kind == "bars" else 0.18
        return max(6.4, each * bars + 1.5, 0.75 * len(self.ticks) + 1.2), 3.8


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own: a few words, tables, plots."""

    title: str
    text: str
    tables: Sequence[Table]
    plots: Sequence[Plot]


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
    folder: Path, title: str, summary: Mapping[str, Any], sections: Sequence[Section],
    new: Container[str] | None = None,
) -> Path:  # fmt: skip
    """Write the page and its plots into ``folder``; returns the path of report.html.

    ``summary`` are the facts at the head of the page; ``new`` the sections whose plots are to be
    drawn again (None: all). Others' are drawn where they are missing: a kill may have come between
    figures and plots.
    """
    from jinja2 import Environment

    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for plot in section.plots:
            drawn = all((folder / name).exists() for name in plot.files.values())
            if new is None or section.title in new or not drawn:
                draw_themes(plot, folder)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = _cell
    source = resources.files("memshare.evaluation").joinpath("report.html").read_text("utf-8")
    page = environment.from_string(source).render(title=title, summary=summary, sections=sections)
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def print_tables(tables: Sequence[Table]) -> None:
    """Show the tables on standard output."""
    from rich.console import Console
    from rich.table import Table as RichTable

    # A file or a pipe has no width: there, nothing is cut off.
    console = Console(width=None if sys.stdout.isatty() else _PAGE_WIDTH)
    for table in tables:
        shown = RichTable(title=table.title, title_justify="left", caption=table.note or None)
        for column, words in zip(table.columns, table.worded, strict=True):
            shown.add_column(column, justify="left" if words else "right")
        for row in table.rows:
            shown.add_row(*map(_cell, row))
        console.print(shown)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return number(value) if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """To three decimals, from 100 on to none, its thousands apart."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def p_value(p: float) -> str:
    """A p-value: none is zero."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def draw_themes(plot: Plot, folder: Path) -> None:
    """Write ``plot`` into ``folder`` twice, light and dark: NAME.png and NAME-dark.png."""
    for theme, name in plot.files.items():
        draw(plot, folder / name, theme)


def draw(plot: Plot, path: Path, theme: str = "") -> None:
    """Write ``plot`` to ``path`` as a picture (PNG); ``theme`` "" is light, "-dark" dark."""
    # The object interface: no global backend is chosen, no state is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, paper = _THEMES[theme]
    figure = Figure(figsize=plot.inches, dpi=150, layout="constrained", facecolor=paper)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=paper)
    for number, series in enumerate(plot.series):
        _draw_series(axes, plot, series, number, ink)
    positions = list(range(len(plot.ticks)))
    if plot.kind == "rows":
        axes.set_yticks(positions, plot.ticks)
        axes.invert_yaxis()  # the first on top
        axes.set_xlabel(plot.y_label)
        axes.set_ylabel(plot.x_label)
        axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    else:
        axes.set_xticks(positions, plot.ticks)
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plot.y_label)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    axes.set_title(plot.title, fontsize=11, color=ink)
    axes.tick_params(colors=ink)
    axes.xaxis.label.set_color(ink)
    axes.yaxis.label.set_color(ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(ink)
    if len(plot.series) > 1:
        columns = len(plot.series) if len(plot.series) <= 4 else 3
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, labelcolor=ink)
    figure.savefig(path)


def _draw_series(axes: Any, plot: Plot, series: Series, number: int, ink: str) -> None:
    colour = _COLOURS[number % len(_COLOURS)]
    errors = None
    if series.low is not None and series.high is not None:
        errors = [
            [v - low for v, low in zip(series.values, series.low, strict=True)],
            [high - v for v, high in zip(series.values, series.high, strict=True)],
        ]
    lines = plot.kind == "lines"
    width = min(0.05, 0.6 / len(plot.series)) if lines else 0.8 / len(plot.series)
    at = [p + _beside(plot, number, p) * width for p in range(len(plot.ticks))]
    if lines:
        axes.errorbar(at, series.values, yerr=errors, marker="o", markersize=5, capsize=3,
                      elinewidth=1, label=series.label, color=colour)  # fmt: skip
        return
    kwargs = {"capsize": 2, "label": series.label, "color": colour, "ecolor": ink,
              "error_kw": {"elinewidth": 1}}  # fmt: skip
    if plot.kind == "rows":
        axes.barh(at, series.values, width * 0.92, xerr=errors, **kwargs)
    else:
        axes.bar(at, series.values, width * 0.92, yerr=errors, **kwargs)


def _beside(plot: Plot, number: int, tick: int) -> float:
    """Where a series stands at a tick, in widths from its middle: intervals must not overlap.

    Of lines, those that have nothing there take no room.
    """
    there = list(range(len(plot.series)))
    if plot.kind == "lines":
        there = [i for i in there if not math.isnan(plot.series[i].values[tick])]
    return there.index(number) - (len(there) - 1) / 2 if number in there else 0.0
