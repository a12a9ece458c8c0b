"""The best step of a training run: evaluate now and then, keep its weights, stop when it is past.

Early stopping by patience (Prechelt 1998, "Early Stopping - But When?"). All of it is part of a
checkpoint: the figures in its state, the best step's weights as a file of its own. A run that was
killed goes on from a checkpoint with the best of *that* moment, so it ends as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from memshare.config import TrainingConfig
from memshare.retrieval.encoder import Encoder
from memshare.training.checkpoint import Best, TrainState, put_weights, trainable
from memshare.training.evaluate import HeldOut, evaluate
from memshare.training.gather import World
from memshare.training.tracking import Tracker

JUDGED_BY = "nDCG@10"
_PERFECT = 1.0 - 1e-9


def judged(best: Best | None, step: int, metrics: Mapping[str, float]) -> Best:
    """The best after an evaluation at ``step``; an equal one does not replace an earlier one."""
    if best is None:
        return Best(step, dict(metrics), dict(metrics))
    if metrics[JUDGED_BY] > best.metrics[JUDGED_BY]:
        return replace(best, step=step, metrics=dict(metrics), since=0)
    return replace(best, since=best.since + 1)


class Validation:
    """Evaluations of one run of ``steps`` steps; none at all where ``held_out`` is empty.

    ``weights`` are the best step's, on the main process: what is trained, by name, in CPU memory.
    """

    def __init__(
        self,
        held_out: HeldOut,
        encoder: Encoder,
        world: World,
        tracker: Tracker,
        settings: TrainingConfig,
        *,
        steps: int,
        weights: dict[str, Tensor],
    ) -> None:
        """``weights``: the best ones of the checkpoint that the run continues from."""
        self._held_out, self._encoder, self._world = held_out, encoder, world
        self._tracker, self._steps, self.weights = tracker, steps, weights
        self._every = settings.eval_every if held_out else None
        self._patience = settings.patience

    def first(self, state: TrainState) -> TrainState:
        """Evaluate what the training starts from, unless the run's checkpoint knows it."""
        return self._look(state) if self._every and state.best is None else state

    def pauses(self, step: int) -> bool:
        """Whether training does not simply go on after ``step`` steps: to evaluate, or at all."""
        return step == self._steps or (self._every is not None and step % self._every == 0)

    def after(self, state: TrainState) -> TrainState:
        """Evaluate after a step, if it is time to or the last one."""
        return self._look(state) if self._every and self.pauses(state.step) else state

    def enough(self, state: TrainState) -> bool:
        """Whether as many evaluations as `training.patience` has were in vain."""
        if state.best is None or self._patience is None:
            return False
        return state.best.since >= self._patience

    def finished(self, state: TrainState) -> bool:
        """Whether all steps are done, or it is enough."""
        return state.step >= self._steps or self.enough(state)

    def _look(self, state: TrainState) -> TrainState:
        metrics = evaluate(self._held_out, self._encoder, self._world)
        figures = {f"eval/{name}": value for name, value in metrics.items()}
        self._tracker.show(state.step, self._steps, figures)
        best = judged(state.best, state.step, metrics)
        if best.step == state.step and self._world.main:
            now = trainable(self._encoder.model)
            self.weights = {name: value.clone() for name, value in now.items()}
        return replace(state, best=best)

    def choose(self) -> None:
        """Give the encoder the best step's weights; as they are where nothing was evaluated.

        On the main process; its encoder is whole afterwards.
        """
        if self._world.divided is not None:
            self._world.divided.give_back()
        if self.weights:
            put_weights(self._encoder.model, self.weights)

    def told(self, state: TrainState) -> str:
        """How the training ended, and whose weights are exported.

        Where they are those from before the first step, it was in vain, and should say so.
        """
        done = f"{state.step} of {self._steps} steps done"
        if not self.finished(state):
            return f"{done}; stopped as asked"
        if (best := state.best) is None:
            return done
        found = f"{JUDGED_BY} {best.metrics[JUDGED_BY]:.4f}"
        if best.step == 0:
            perfect = best.metrics[JUDGED_BY] >= _PERFECT
            see = "hold out more, or harder ones" if perfect else "see training.lr, training.epochs"
            return (
                f"{done}; warning: no evaluation was better than the first ({found}): what is "
                f"exported is what the training started from ({see})"
            )
        return f"{done}; exported are the weights after step {best.step} ({found})"

    def report(self, state: TrainState) -> dict[str, Any] | None:
        """For ``result.json``; None where nothing was evaluated."""
        if state.best is None:
            return None
        return {
            "queries": len(self._held_out.queries),
            "best_step": state.best.step,
            "best": state.best.metrics,
            "start": state.best.start,
            "stopped_early": state.step < self._steps and self.enough(state),
        }
