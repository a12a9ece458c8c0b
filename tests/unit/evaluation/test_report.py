import json
from pathlib import Path

import pytest

from memshare.evaluation.report import Plot, Series, Table, machine, write_report


def test_report_has_every_table_and_plot_and_escapes_text(tmp_path: Path) -> None:
    page = write_report(
        tmp_path,
        "Demo",
        {"model": "pocket"},
        {"bertscore": {"f1": 0.5}},
        [Table("Scores <by> shots", ["shots", "F1"], [["zero", 0.12345], ["three", None]])],
        [
            Plot(
                "f1",
                "F1",
                "lines",
                ["0", "3"],
                [Series("f1", [0.1, 0.5], [0, 0.4], [0.2, 0.6])],
                "x",
                "y",
            )
        ],
    )
    html = page.read_text()
    assert "Scores &lt;by&gt; shots" in html and "0.123" in html and "–" in html
    assert json.loads((tmp_path / "report.json").read_text()) == {"bertscore": {"f1": 0.5}}
    assert (tmp_path / "f1.png").read_bytes().startswith(b"\x89PNG")
    assert 'src="f1.png"' in html


def test_a_figure_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path, "Demo", {}, {"f1": float("nan")}, [], [])


def test_machine_facts_are_json() -> None:
    assert json.dumps(machine())
