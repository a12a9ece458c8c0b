"""Both databases, which tests share a server, and an environment without settings.

A test that asks for ``url`` runs on SQLite, and on a real PostgreSQL server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from tests.postgres import PostgresServer

DATABASES = ["sqlite", pytest.param("postgresql", marks=pytest.mark.server)]
ONE_VLLM = ("test_vllm.py", "test_vllm_gateway.py")


class _ByServer(LoadFileScheduling):
    """A file's tests share what they have started; two files share the one vLLM server."""

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return "vLLM" if file.endswith(ONE_VLLM) else file


@pytest.hookimpl(optionalhook=True)  # where pytest-xdist is switched off there is no such hook
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return _ByServer(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    server = PostgresServer()
    yield server
    server.close()


def database_url(kind: str, request: pytest.FixtureRequest, path: Path) -> str:
    """A new empty database; ``path`` is where SQLite's lies."""
    if kind == "sqlite":
        return f"sqlite:///{path}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.url(server.create())


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return database_url(request.param, request, tmp_path / "pool.db")


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """None in the environment."""
    for name in [name for name in os.environ if name.upper().startswith("MEMSHARE_")]:
        monkeypatch.delenv(name)
