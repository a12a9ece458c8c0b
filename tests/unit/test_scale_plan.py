"""docs/scale.md says what benchmarks/scale_plan.py calculates."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "scale_plan", ROOT / "benchmarks" / "scale_plan.py"
    )
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["scale_plan"] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


def test_the_page_has_the_tables_of_the_script(program: ModuleType) -> None:
    page = program.PAGE.read_text(encoding="utf-8")
    made = program.page_with(page, program.tables(program.Measured.load()))
    assert page == made, "run benchmarks/scale_plan.py --write"


def test_what_grows_with_what(program: ModuleType) -> None:
    plans = [program.Plan(size, program.Measured.load()) for size in (10**6, 10**7)]
    small, large = plans
    assert large.mining == pytest.approx(10 * small.mining)
    assert large.encoding(large.memories) == pytest.approx(100 * large.encoding(large.new))
    assert small.kind[1] == large.kind[1] == 1  # both fit one card, and 10^8 does not
    assert program.Plan(10**8, plans[0].measured).kind[1] > 1


def test_figures_are_short(program: ModuleType) -> None:
    sizes = {1234: "1.2 kB", 999_900: "1 MB", 15.4e9: "15 GB", 3.07e12: "3.1 TB", 2e18: "2,000 PB"}
    assert {value: program.size(value) for value in sizes} == sizes
    spans = {0.0034: "3.4 ms", 0.5: "0.5 s", 119.0: "120 s", 121.0: "2 min", 7200.0: "2 h"}
    assert {value: program.span(value) for value in spans} == spans
