"""Which step is the best, and when to stop."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

from memshare.config import TrainingConfig, WandbConfig
from memshare.training import checkpoint, validation
from memshare.training.checkpoint import CheckpointError, TrainState
from memshare.training.evaluate import HeldOut
from memshare.training.gather import World
from memshare.training.optimizer import make_optimizer
from memshare.training.step_result import StepResult
from memshare.training.tracking import Tracker
from memshare.training.validation import Validation
from tests.training_data import examples

STATE = TrainState(0, {}, 7, "abcd1234")
STEP = StepResult(loss=0.5, parts={}, tokens=1, padded=1, stop=False, flops=1.0)
NONE = HeldOut()
SOME = HeldOut.of(examples(2), 0.05)


class Encoder:
    """Something with weights: all of them are the number of the step."""

    def __init__(self) -> None:
        self.model = nn.Linear(2, 2)
        self.at(0)

    def at(self, step: int) -> None:
        with torch.no_grad():
            for param in self.model.parameters():
                param.fill_(step)


def run(
    scores: Iterable[float], folder: Path, held_out: HeldOut = SOME, **settings: int
) -> tuple[TrainState, Validation, Encoder]:
    """Train nothing, for as many steps as there are ``scores``, at most; score by score."""
    encoder, config = Encoder(), TrainingConfig(**settings)  # type: ignore[arg-type]
    given = list(scores)
    queue = iter(given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "evaluate", lambda *_: {"nDCG@10": next(queue), "P@1": 0.0})
        tracker = Tracker(folder, WandbConfig(mode="disabled"), run_id="x", settings={})
        watch = Validation(
            held_out, encoder, World(torch.device("cpu")), tracker, config,  # type: ignore[arg-type]
            steps=(len(given) - 1) * (config.eval_every or 1), weights={},
        )  # fmt: skip
        state = watch.first(STATE)
        while not watch.finished(state):
            encoder.at(state.step + 1)
            state = watch.after(state.after(STEP, seconds=1.0, idle=0.0))
    return state, watch, encoder


@pytest.mark.parametrize(
    ("scores", "patience", "best", "stopped"),
    [
        ((0.5, 0.6, 0.7, 0.7, 0.2), None, 4, None),  # an equal one is not better
        ((0.5, 0.4, 0.3, 0.2, 0.1), 2, 0, 4),
        ((0.5, 0.4, 0.6, 0.5, 0.5, 0.7), 2, 4, 8),
        ((0.5, 0.4, 0.6, 0.5, 0.7, 0.8), 2, 10, None),  # patience counts in a row
        ((0.5, 0.4, 0.3), 2, 0, None),  # at the last step: not early
    ],
)
def test_best_and_patience(
    tmp_path: Path, scores: tuple[float, ...], patience: int | None, best: int, stopped: int | None
) -> None:
    settings = {"eval_every": 2} | ({} if patience is None else {"patience": patience})
    state, watch, encoder = run(scores, tmp_path, **settings)
    assert state.step == (stopped or 2 * (len(scores) - 1))
    told = watch.report(state)
    assert told is not None
    assert (told["best_step"], told["stopped_early"]) == (best, stopped is not None)
    highest = max(scores[: state.step // 2 + 1])
    assert told["best"]["nDCG@10"] == highest
    assert told["start"]["nDCG@10"] == scores[0]
    said, found = watch.told(state), f"(nDCG@10 {highest:.4f})"
    assert (f"warning: no evaluation was better than the first {found}" in said) == (best == 0)
    assert (f"exported are the weights after step {best} {found}" in said) == (best > 0)
    watch.choose()
    assert all((param == best).all() for param in encoder.model.parameters())


def test_held_out_examples_that_leave_nothing_to_gain_are_named_as_the_cause(
    tmp_path: Path,
) -> None:
    for first, cause in ((1.0, "hold out more, or harder ones"), (0.9, "see training.lr")):
        state, watch, _ = run((first, 0.8), tmp_path, eval_every=1)
        assert f"the first (nDCG@10 {first:.4f}): what is exported" in watch.told(state)
        assert cause in watch.told(state)


def test_nothing_to_evaluate_on(tmp_path: Path) -> None:
    state, watch, encoder = run((0.9, 0.1, 0.1), tmp_path, NONE, eval_every=1, patience=1)
    assert (state.step, state.best, watch.report(state)) == (2, None, None)
    assert watch.told(state) == "2 of 2 steps done"
    watch.choose()
    assert all((param == 2).all() for param in encoder.model.parameters())
    assert not (tmp_path / "log.jsonl").read_text()


def test_the_best_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    state, watch, encoder = run((0.5, 0.6, 0.1), tmp_path, eval_every=1)
    optimizer = make_optimizer(encoder.model, TrainingConfig())
    folder = checkpoint.save(tmp_path, encoder.model, optimizer, state, watch.weights)
    checkpoint.verify(folder)
    again = checkpoint.read_state(folder)
    assert again == state and again.best is not None and again.best.step == 1
    weights = checkpoint.best_weights(folder, again)
    assert all((value == 1).all() for value in weights.values()) and len(weights) == 2
    with pytest.raises(CheckpointError, match="other weights"):
        checkpoint.put_weights(nn.Linear(3, 2), weights)
    (folder / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.verify(folder)
