"""Schemathesis over the HTTP API by its own schema: no 5xx, and every reply as it promises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from memshare.pool.keys import KeyRing
from memshare.pool.store import PoolStore
from tests.gateways import gateway

EXAMPLES = 25
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


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_operation_keeps_its_promises(
    keyed: tuple[str, dict[str, str]], mode: GenerationMode
) -> None:
    url, headers = keyed
    operations = 0
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for result in schema.get_all_operations():
        operation: Any = result.ok()
        operations += 1

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def promises(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=headers, checks=CHECKS, timeout=60)

        with suppress(Unsatisfiable):  # an operation without parameters can't be asked wrongly
            promises()
    assert operations == 15
