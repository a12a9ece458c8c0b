"""A gateway that starts answers already, and may be told to stop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from memshare.gateway.app import create_app
from memshare.retrieval import loader
from memshare.sharing import assemble
from tests.loop import loop_config


def test_being_told_to_stop_meanwhile_is_no_failure(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = loader.frozen_serving

    def slow(*arguments: Any) -> Any:
        time.sleep(1)
        return serving(*arguments)

    monkeypatch.setattr(loader, "frozen_serving", slow)
    failures: list[BaseException] = []
    app = create_app(assemble(loop_config(tmp_path, models)), on_failure=failures.append)
    with TestClient(app) as client:
        assert client.get("/readyz").json()["reason"] == "starting"
    assert not app.state.gateway.ready
    assert failures == []
