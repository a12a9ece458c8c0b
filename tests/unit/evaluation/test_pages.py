from typing import Any

from memshare.evaluation.experiment import Experiment, View
from memshare.evaluation.measures import F1
from memshare.evaluation.pages import (
    count_tables,
    metric_tables,
    paired_tables,
    section,
    summary,
    view_plots,
)
from memshare.evaluation.rows import AVERAGE, Key, Row, count_row, differences, mean_row

LINES = View("Quality", "lines", "shots")
ROWS = View("Pools", "rows", "", arms=("own", "all"))


async def nothing(lab: Any) -> Any:
    yield lab


def experiment(*views: View) -> Experiment:
    return Experiment("shots", "?", nothing, views=views)


def row(arm: str, model: str, value: float, at: str = "", metric: str = F1) -> Row:
    key = Key(arm, at, AVERAGE, metric, model, "decontaminated")
    return mean_row(key, {"q": value, "r": value}, 0)


def record(*rows: Row) -> dict[str, Any]:
    return {"rows": [one.record() for one in rows]}


def test_several_models_have_lines_each_in_a_plot_of_its_own() -> None:
    told = record(*(row("found", model, 0.5, at) for model in ("a/b", "c") for at in "12"))
    plots = view_plots(experiment(LINES), LINES, told)
    assert [(plot.name, plot.title) for plot in plots] == [
        ("shots-1-average-a-b", "Quality, a/b: average"),
        ("shots-1-average-c", "Quality, c: average"),
    ]
    assert all([series.label for series in plot.series] == ["found"] for plot in plots)
    (bars,) = view_plots(experiment(ROWS), ROWS, record(*(row(a, m, 0.5) for m in "xy"
                                                         for a in ("own", "all"))))  # fmt: skip
    assert list(bars.ticks) == ["own (x)", "all (x)", "own (y)", "all (y)"]


def test_what_ranked_is_no_second_agent() -> None:
    """BM25 and an encoder are models of different arms: one plot, and their names stay short."""
    told = record(*(row(arm, model, 0.5, at) for arm, model in (("BM25", "BM25"), ("frozen", "e"))
                    for at in "12"))  # fmt: skip
    (plot,) = view_plots(experiment(LINES), LINES, told)
    assert [series.label for series in plot.series] == ["BM25", "frozen"]


def test_tables_keep_the_models_apart() -> None:
    counts = [
        count_row(Key("own", "", "world", "count: memories", model, "decontaminated"), n, 9, 0)
        for model, n in (("x", 3), ("y", 4))
    ]
    (table,) = count_tables(record(*counts))
    assert list(table.columns) == ["arm", "model", "what", "world"]
    assert table.rows == [["own", "x", "memories", 3], ["own", "y", "memories", 4]]
    (table,) = metric_tables(record(row("own", "x", 0.2), row("own", "y", 0.4)), F1)
    assert list(table.columns) == ["arm", "model", AVERAGE]
    assert [line[1:] for line in table.rows] == [
        ["x", "0.200 (0.200–0.200)"], ["y", "0.400 (0.400–0.400)"],
    ]  # fmt: skip
    (table,) = metric_tables(record(row("own", "x", 1234.0)), F1)
    assert table.rows == [["own", "1,234 (1,234–1,234)"]]
    pairs = [(row("own", m, 0.4), row("all", m, 0.2)) for m in "xy"]
    told = {"paired": [difference.record() for difference in differences(pairs, 0)]}
    (table,) = paired_tables(told)
    assert [line[:2] for line in table.rows] == [["own − all", "x"], ["own − all", "y"]]


def made(name: str, seed: int, quick: bool) -> dict[str, Any]:
    return {
        "experiment": name, "rows": [], "paired": [], "failed": 0, "seconds": 1.0,
        "processor_seconds": 1.0, "seed": seed, "quick": quick, "commit": "c", "finished_at": "now",
        "machine": {"cpu": "cpu", "cores": 2, "gpus": []},
        "models": {"agents": {"a": "a@1"}, "scorer": "s", "encoder": "e", "bertscore": "b",
                   "bertscore_layer": 6},
    }  # fmt: skip


def test_a_page_of_several_runs_tells_of_each() -> None:
    """Experiments may be run one by one into a folder, with other settings each."""
    records = [made("shots", 0, True), made("cost", 1, False)]
    told = summary(records)
    assert told["sizes"] == "quick: a few of everything, no findings; as configured"
    assert (told["seed"], told["commit"], told["seconds in all"]) == ("0; 1", "c", 2)
    assert ["no findings" in section(record).text for record in records] == [True, False]
