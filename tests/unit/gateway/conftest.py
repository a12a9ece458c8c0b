from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from memshare.gateway.app import create_app
from memshare.sharing import assemble
from tests.loop import loop_config

LOCAL = "http://127.0.0.1:8000"  # so names it who has no key


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@contextmanager
def running(
    run_dir: Path, models: Path, keys_required: bool = False, **sections: Any
) -> Iterator[TestClient]:
    """The application in this process, ready. Exceptions become responses, as under uvicorn."""
    shared = assemble(loop_config(run_dir, models, **sections))
    app = create_app(shared, keys_required=keys_required)
    with TestClient(app, LOCAL, raise_server_exceptions=False) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.02)
        yield client


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[TestClient]:
    with running(tmp_path_factory.mktemp("run"), models) as client:
        yield client
