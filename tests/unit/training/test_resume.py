"""Continuing a run: what may differ, which best step is kept, and what is deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memshare.config import LoRAConfig, TrainingConfig
from memshare.training import checkpoint
from memshare.training.checkpoint import Best, NotContinued, TrainState
from memshare.training.gather import World
from memshare.training.optimizer import make_optimizer
from memshare.training.resume import How, find, fixed_settings, resume


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(2, 2)


@pytest.fixture
def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(model, TrainingConfig())


def test_how_often_it_is_told_and_saved_may_change() -> None:
    plain = fixed_settings(TrainingConfig())
    assert fixed_settings(TrainingConfig(checkpoint_every=7, log_every=9)) == plain
    assert fixed_settings(TrainingConfig(lr=0.1)) != plain


@pytest.mark.parametrize("how", ["auto", "same", "must"])
def test_what_only_takes_less_memory_may_change_and_is_told(
    tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer,
    how: How, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Or a round of the loop would begin anew where its GPU was full."""
    before, now = (
        fixed_settings(TrainingConfig(batch_tokens=tokens, graph_tokens=graph), processes=1)
        for tokens, graph in ((4096, 8192), (2048, 0))
    )
    checkpoint.save(tmp_path, model, optimizer, TrainState(5, before, 7, "x"))
    world = World(torch.device("cpu"))

    def again(settings: dict[str, Any]) -> TrainState:
        start = TrainState(0, settings, 7, "y")
        return resume(tmp_path, start, model, optimizer, world, how=how, allow_change=False)[0]

    assert again(now) == TrainState(5, now, 7, "x")
    told = capsys.readouterr().err
    assert "5 steps are done; since then:" in told
    assert "training.batch_tokens: 4096 -> 2048" in told
    assert "training.graph_tokens: 8192 -> 0" in told
    assert again(before).step == 5 and "since then" not in capsys.readouterr().err
    other = {**now, "processes": 2}
    if how == "same":
        assert again(other).step == 0
    else:
        with pytest.raises(NotContinued, match="processes: 1 -> 2"):
            again(other)


def test_a_best_by_other_held_out_examples_is_forgotten(
    tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    best = Best(2, {"nDCG@10": 0.9}, {"nDCG@10": 0.1})
    state = TrainState(3, {"held_out": "a", "steps": 5}, 7, "x", best=best)
    checkpoint.save(tmp_path, model, optimizer, state, checkpoint.trainable(model))
    for held_out, kept in (("a", best), ("b", None)):
        now = {"held_out": held_out, "steps": 9}
        found = find(tmp_path, now, must=True, allow_change=True)
        assert found is not None and found[1].best == kept
        assert found[1].settings == now


def test_a_damaged_checkpoint_after_the_one_it_goes_on_from_is_deleted(
    tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """What comes after the step that a run goes on from, it writes anew."""
    start = TrainState(0, {}, 7, "x")
    good, damaged = (
        checkpoint.save(tmp_path, model, optimizer, TrainState(step, {}, 7, "x"))
        for step in (5, 10)
    )
    (damaged / "state.json").write_text("")
    world = World(torch.device("cpu"))
    state, _ = resume(tmp_path, start, model, optimizer, world, how="auto", allow_change=False)
    assert state.step == 5
    assert checkpoint.checkpoints(tmp_path) == [good] and not damaged.exists()


@pytest.mark.parametrize("adapters", [False, True])
def test_a_warm_optimizer_knows_nothing_of_new_adapters(
    tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer,
    capsys: pytest.CaptureFixture[str], adapters: bool,
) -> None:  # fmt: skip
    """They have the names and shapes of the earlier training's, and other weights."""
    settings = fixed_settings(TrainingConfig(lora=LoRAConfig(enabled=adapters)))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    start, world = TrainState(0, settings, 7, "x"), World(torch.device("cpu"))
    checkpoint.save(tmp_path / "warm" / "checkpoints", model, optimizer, start)
    new = make_optimizer(model, TrainingConfig())
    warm = str(tmp_path / "warm")
    resume(tmp_path, start, model, new, world, how="auto", allow_change=False, warm=warm)
    assert bool(new.state) != adapters
    told = "starts without a past" if adapters else "with the state of 2 parameters"
    assert told in capsys.readouterr().err
