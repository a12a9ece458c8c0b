"""What joins the processes of a training run, in one process; tests/integration has several."""

from __future__ import annotations

import pytest
import torch

from memshare.config import ConfigError
from memshare.training.gather import World, launch


def test_fsdp_is_refused_and_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate sets it, on CPUs too
    with pytest.raises(ConfigError, match="FSDP is not supported"):
        launch()


def test_a_world_of_one_talks_to_itself() -> None:
    world = World(torch.device("cpu"))
    assert world.main and world.size == 1
    assert world.from_main({"a": 1}) == {"a": 1}
    assert world.to_main("mine") == ["mine"]
