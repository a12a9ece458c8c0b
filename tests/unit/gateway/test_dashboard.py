"""configs/grafana/memshare.json asks for what /metrics tells, and for all of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

DASHBOARD = Path(__file__).parents[3] / "configs" / "grafana" / "memshare.json"
NAME = re.compile(r"\b(?:memshare|process)_[a-z_]+")


def told(client: TestClient) -> dict[str, set[str]]:
    """Every sample name that /metrics may show, with its labels."""
    names: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        if family.name.endswith("_created"):  # when a counter began: nothing to draw
            continue
        suffixes = {"counter": ["_total"], "histogram": ["_bucket"]}.get(family.type, [""])
        for suffix in suffixes:
            labels = names.setdefault(family.name + suffix, set())
            labels.update(*(s.labels for s in family.samples if s.name == family.name + suffix))
    return names


def expressions() -> list[str]:
    page: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in page["panels"] for target in panel["targets"]]


def exercise(client: TestClient) -> None:
    item = {"pool": "keep", "prompt": "a dashboard", "answer": "x"}
    (result,) = client.post("/v1/memories", json={"items": [item]}).json()["results"]
    client.post(f"/v1/memories/{result['id']}/feedback", json={"value": "up"})
    client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})


def test_the_dashboard_asks_for_what_is_there_and_all_of_it(client: TestClient) -> None:
    exercise(client)
    names = told(client)
    asked = {name for expression in expressions() for name in NAME.findall(expression)}
    assert asked <= set(names)
    shown = {name for name in names if name.startswith("memshare_")}
    assert shown == {name for name in asked if name.startswith("memshare_")}


def test_the_dashboard_groups_by_labels_that_are_there(client: TestClient) -> None:
    exercise(client)
    names = told(client)
    grouped = 0
    for expression in expressions():
        (name,) = set(NAME.findall(expression))
        if not names[name]:
            continue  # nothing of the kind has happened, so far
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            grouped += 1
            assert set(labels.split(", ")) <= names[name], expression
    assert grouped > 8


def test_panels_do_not_overlap() -> None:
    taken = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken and x < 24
                taken.add((x, y))
