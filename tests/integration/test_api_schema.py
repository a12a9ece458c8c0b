"""Schemathesis over the HTTP API by its own schema: no 5xx, and every reply as it promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from memshare.pool.keys import KeyRing
from memshare.pool.store import PoolStore
from tests.integration.test_gateway import gateway

CHECKS: list[Any] = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A gateway that asks for keys, and the headers of an admin."""
    run_dir, models = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("models")
    with PoolStore.open(f"sqlite:///{run_dir}/pool.db") as store:
        _, secret = KeyRing(store.database).create("root", {"*": ["admin"]})
    section = {"keys": "required", "score_writes": True}
    with gateway(run_dir, models, gateway=section) as url:
        yield url, {"Authorization": f"Bearer {secret}"}


@pytest.fixture(scope="module")
def api(keyed: tuple[str, dict[str, str]]) -> Any:
    return schemathesis.openapi.from_url(f"{keyed[0]}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
def test_every_operation_keeps_its_promises(
    case: schemathesis.Case, keyed: tuple[str, dict[str, str]]
) -> None:
    case.call_and_validate(headers=keyed[1], checks=CHECKS, timeout=60)
