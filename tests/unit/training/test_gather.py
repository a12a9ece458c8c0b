"""What joins the processes of a training run, in one process; tests/integration has several."""

from __future__ import annotations

import pytest
import torch

from memshare.config import ConfigError
from memshare.training.gather import World, launch, leave, wants_fsdp


def test_a_world_of_one_talks_to_itself() -> None:
    world = World(torch.device("cpu"))
    assert world.main and world.size == 1 and world.divided is None
    assert world.from_main({"a": 1}) == {"a": 1}
    assert world.to_main("mine") == ["mine"]


def test_machines_are_named_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(torch.device("cpu"))
    monkeypatch.setattr("platform.node", lambda: "node-2")
    assert world.facts() == {"device": "cpu", "hosts": ["node-2"], "nodes": 1}
    monkeypatch.setattr(world, "to_main", lambda name: [name, "node-1", name])
    assert world.facts() == {"device": "cpu", "hosts": ["node-1", "node-2"], "nodes": 2}
    monkeypatch.setattr(world, "to_main", lambda name: [])  # as on the others
    assert world.facts()["hosts"] == []


def test_fsdp_is_asked_for_in_its_second_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wants_fsdp()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="fsdp_version must be 2"):
        launch()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert wants_fsdp()


@pytest.mark.parametrize(("name", "value", "instead"), [
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", r"set training\.batch_size"),
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", r"set training\.compile"),
])  # fmt: skip
def test_what_the_launcher_offers_and_nothing_heeds_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, instead: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^accelerate: .* is not used; {instead}"):
        launch()


def test_a_gpu_that_was_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^encoder\.device: 'cuda:1', but torch sees no CUDA"):
        launch("cuda:1")


class Ending:
    """An accelerator that counts how often it was ended."""

    ended = 0

    def end_training(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("backend", [None, "gloo", "nccl", "cuda:nccl,cpu:gloo"])
@pytest.mark.parametrize("done", [True, False])
def test_a_process_that_failed_alone_does_not_wait_to_end_nccl(
    backend: str | None, done: bool
) -> None:
    accelerator, world = Ending(), World(torch.device("cpu"))
    world.backend = backend
    if done:
        world.end()
    leave(accelerator, world)  # type: ignore[arg-type]
    assert accelerator.ended == (done or "nccl" not in str(backend))
