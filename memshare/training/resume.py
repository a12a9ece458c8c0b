"""Continuing a training run: which checkpoint, and that nothing changed what it learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from memshare.config import TrainingConfig
from memshare.progress import log
from memshare.training.checkpoint import (
    CheckpointError,
    NotContinued,
    Stored,
    TrainState,
    best_weights,
    checkpoints,
    discard,
    latest_intact,
    read_state,
    restore,
)
from memshare.training.gather import World
from memshare.training.optimizer import warm_start
from memshare.training.step_result import NonFinite

How = Literal["auto", "same", "must", "never"]
HOW: tuple[How, ...] = get_args(How)
FREE = {"log_every", "checkpoint_every"}  # they do not change what is trained
# Nor do these, which bound a step's memory, but for rounding and for what dropout draws. They are
# told, since a run that has changed them ends with other bits than one that has not.
MEMORY = ("training.batch_tokens:", "training.graph_tokens:")


def fixed_settings(settings: TrainingConfig, **more: Any) -> dict[str, Any]:
    """What must be the same when a run is continued: the settings of training, and ``more``."""
    training = settings.model_dump(mode="json", exclude=FREE)
    return {**{f"training.{key}": value for key, value in training.items()}, **more}


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``key: old -> new`` for every setting that differs.

    One that ``before`` lacks had its default: the version that wrote it did not know it yet.
    """
    defaults = {k: v for k, v in fixed_settings(TrainingConfig()).items() if k in now}
    known = {**defaults, **{key: _filled(before[key], defaults.get(key)) for key in before}}
    return [
        f"{key}: {known.get(key)!r} -> {now.get(key)!r}"
        for key in sorted({*known, *now})
        if known.get(key) != now.get(key)
    ]


def _filled(value: Any, default: Any) -> Any:
    """A section's values (`LoRAConfig`) with those that it lacks; others as they are."""
    return {**default, **value} if isinstance(default, dict) else value


def find(
    root: Path, settings: Mapping[str, Any], *, must: bool, allow_change: bool
) -> tuple[Path, TrainState, list[str]] | None:
    """The checkpoint to continue from, its state with ``settings`` as they are now, what changed.

    None where there is none, unless it ``must`` be. Raises `CheckpointError`; `NotContinued` names
    every setting that changed since, unless told to ``allow_change`` or if they are all `MEMORY`.
    """
    folder = latest_intact(root)
    if folder is None:
        if must:
            raise CheckpointError(f"{root}: no intact checkpoint to continue from")
        return None
    state = read_state(folder)
    changed = changed_settings(state.settings, settings)
    if not allow_change and not all(each.startswith(MEMORY) for each in changed):
        raise NotContinued(
            "\n  ".join([f"{folder} was made with other settings:", *changed]),
            "--allow-config-change continues all the same, --resume never starts afresh",
        )
    # What was best by other held-out examples says nothing by these.
    same = state.settings.get("held_out") == settings.get("held_out")
    now = replace(state, settings=dict(settings), best=state.best if same else None)
    return folder, now, changed


def resume(
    root: Path,
    start: TrainState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    how: How,
    allow_change: bool,
    warm: str | None = None,
) -> tuple[TrainState, dict[str, Tensor]]:
    """Go on from the last intact checkpoint in ``root`` where there is one, else from ``start``.

    A run that starts takes its optimizer's state from the last checkpoint of the training
    ``warm`` (its output folder), as far as there is one; none of it is for adapters, which are new.

    ``how``: there ``must`` be one, or it is ``never`` used; one that was made with other settings,
    or by another version, is refused, or not used (``same``: for who can't be asked). Later
    checkpoints, which are damaged or of a run that is started afresh, are deleted. Returns the
    state and, on the main process, the best step's weights. Raises `CheckpointError` and
    `DifferentData`.
    """
    found, past = None, None
    if how != "never":
        try:
            found = find(root, start.settings, must=how == "must", allow_change=allow_change)
        except NotContinued as error:
            if how != "same":
                raise
            if world.main:
                log(f"{error.why}\nstarting from the beginning")
        else:
            if world.main and found is None and checkpoints(root):
                log(f"{root}: no intact checkpoint; starting from the beginning")
    # Of the earlier training's adapters, new ones have the names and shapes alone.
    adapters = start.settings.get("training.lora", {}).get("enabled", False)
    if warm and not found and not adapters:
        past = latest_intact(Path(warm) / "checkpoints")
    world.check_same({"checkpoints": (found and found[0], past)})
    state, best = start, dict[str, Tensor]()
    if found:
        folder, state, changed = found
        restore(folder, model, optimizer)
        best = best_weights(folder, state) if world.main else {}
    elif past:
        known = warm_start(optimizer, Stored(past / "optimizer.safetensors"))
        if world.main:
            log(f"the optimizer goes on from {past}, with the state of {known} parameters")
    elif warm and world.main:
        why = "training.lora's adapters are new" if adapters else "no intact checkpoint"
        log(f"{warm}: {why}, so the optimizer starts without a past")
    if world.divided is not None:
        world.divided.follow(optimizer)  # from here on, weights are whole between two steps
    if world.main:
        if found:
            told = f"continuing from {folder}: {state.step} steps are done"
            log("\n  ".join([told + "; since then:", *changed]) if changed else told)
        discard(root, after=state.step if found else -1)
    return state, best


@contextmanager
def without_ruined(root: Path, writes: bool) -> Iterator[None]:
    """Where `NonFinite` ends a training, delete the checkpoint of the weights that gave it.

    A checkpoint is written before its weights are used again, and only that tells whether they are
    any good: a run that went on from ruined ones would fail wherever it began. The process that
    ``writes`` deletes, and tells what is left.
    """
    try:
        yield
    except NonFinite as error:
        if writes:
            discard(root, after=error.done - 1)
            left = checkpoints(root)
            good = f"the last good weights are in {left[-1]}" if left else "no checkpoint is left"
            error.args = (f"{error}; {good}",)
        raise
