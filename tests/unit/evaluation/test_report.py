import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from matplotlib.image import imread

from memshare.evaluation.report import (
    Plot,
    Section,
    Series,
    Table,
    _beside,
    draw,
    machine,
    number,
    p_value,
    write_report,
)

PLOT = Plot(
    "f1", "F1", "lines", ["0", "3"], [Series("f1", [0.1, 0.5], [0, 0.4], [0.2, 0.6])], "x", "y"
)


def test_report_has_every_table_and_plot_and_escapes_text(tmp_path: Path) -> None:
    table = Table("Scores <by> shots", ["shots", "F1"], [["zero", 0.12345], ["three", None]])
    sections = [
        Section("First & last", "What it asks.", [table], [PLOT]),
        Section("Other", "", [], []),
    ]
    page = write_report(tmp_path, "Demo", {"model": "pocket"}, sections)
    html = page.read_text()
    assert "Scores &lt;by&gt; shots" in html and "0.123" in html and "–" in html
    assert "First &amp; last" in html and "What it asks." in html
    for name in ("f1.png", "f1-dark.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and f'"{name}"' in html


def test_an_old_sections_plot_is_drawn_only_where_it_is_missing(tmp_path: Path) -> None:
    """As after a kill between an experiment's figures and its plots."""
    sections = [Section("old", "", [], [PLOT])]
    write_report(tmp_path, "Demo", {}, sections)
    (tmp_path / "f1-dark.png").unlink()
    write_report(tmp_path, "Demo", {}, sections, new=("other",))
    assert (tmp_path / "f1-dark.png").read_bytes().startswith(b"\x89PNG")
    for name in ("f1.png", "f1-dark.png"):
        (tmp_path / name).write_bytes(b"kept")
    write_report(tmp_path, "Demo", {}, sections, new=("other",))
    assert (tmp_path / "f1.png").read_bytes() == b"kept"


def test_words_stand_on_the_left_and_numbers_are_readable() -> None:
    table = Table("T", ["arm", "what", "at", "p"], [["2 shots", "stored", "25%", "<0.001"]])
    assert table.worded == [True, True, False, False]
    assert [number(value) for value in (0.5, 99.9, 10960.0)] == ["0.500", "99.900", "10,960"]
    assert [p_value(p) for p in (0.0001, 0.02, 1.0)] == ["<0.001", "0.020", "1.000"]


@pytest.mark.parametrize("kind", ["bars", "lines", "rows"])
def test_a_plot_is_light_and_dark(tmp_path: Path, kind: Literal["bars", "lines", "rows"]) -> None:
    plot = Plot(
        "p", "P", kind, ["a", "b"], [Series("s", [1.0, 2.0]), Series("t", [2.0, 1.0])], "x", "y"
    )
    corners = []
    for theme in ("", "-dark"):
        draw(plot, tmp_path / f"p{theme}.png", theme)
        corners.append(float(imread(tmp_path / f"p{theme}.png")[0, 0, :3].mean()))
    assert corners[0] > 0.95 and corners[1] < 0.2


def test_machine_facts_are_json() -> None:
    assert json.dumps(machine())


def test_lines_without_a_value_at_a_tick_take_no_room_there() -> None:
    nan = float("nan")
    series = [Series("a", [1, nan]), Series("b", [2, 3]), Series("c", [nan, nan])]
    plot = Plot("p", "", "lines", ["0", "1"], series, "", "")
    assert [_beside(plot, 0, 0), _beside(plot, 1, 0), _beside(plot, 1, 1)] == [-0.5, 0.5, 0.0]
    bars = replace(plot, kind="bars")
    assert [_beside(bars, i, 1) for i in range(3)] == [-1.0, 0.0, 1.0]
