"""Checkpoints of a training run: whole or not there, checked before use, without pickle.

``checkpoints/step-00000100/`` holds the trainable weights (the adapters alone with LoRA) and the
optimizer's state as safetensors, ``state.json`` (position in the data, settings, W&B run id, random
seed: all random numbers derive from seed and step), and ``manifest.json`` with the SHA-256 and size
of each, written last into a folder that is then renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memshare.files import fsync_dir, sha256_file, write_json
from memshare.progress import log
from memshare.training.optimizer import load_state_tensors, state_tensors

KEEP = 2  # a damaged one leaves the one before
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, read, or continued from with these settings."""


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands, beside its weights: ``step`` steps are done.

    ``settings`` are those that must not change on resume; ``tokens`` and ``padded`` count what was
    encoded so far; ``seconds`` is the time spent in steps; ``loss`` is the last step's.
    """

    step: int
    settings: dict[str, Any]
    seed: int
    wandb_id: str
    loss: float = 0.0
    tokens: int = 0
    padded: int = 0
    seconds: float = 0.0

    def after(self, loss: float, tokens: int, padded: int, seconds: float) -> TrainState:
        """The state one step later."""
        return replace(
            self,
            step=self.step + 1,
            loss=loss,
            tokens=self.tokens + tokens,
            padded=self.padded + padded,
            seconds=self.seconds + seconds,
        )

    def figures(self) -> dict[str, float]:
        """What a report says of the run so far; at least one step must be done."""
        return {
            "steps": self.step,
            "loss": self.loss,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
            "real_token_share": self.tokens / self.padded,
        }


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, by name, on the CPU."""
    return {
        name: param.detach().cpu().contiguous()
        for name, param in model.named_parameters()
        if param.requires_grad
    }


def save(root: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> Path:
    """Write a checkpoint and prune all but the last `KEEP`. Raises `CheckpointError`."""
    final = root / f"step-{state.step:08d}"
    temporary = root / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(trainable(model), temporary / "model.safetensors")
        moments = {k: v.cpu().contiguous() for k, v in state_tensors(optimizer, model).items()}
        save_file(moments, temporary / "optimizer.safetensors")
        for name in _FILES[:2]:
            with open(temporary / name, "rb+") as handle:
                os.fsync(handle.fileno())
        write_json(temporary / "state.json", asdict(state))
        manifest = {
            name: {
                "sha256": sha256_file(temporary / name),
                "size": (temporary / name).stat().st_size,
            }
            for name in _FILES
        }
        write_json(temporary / "manifest.json", {"files": manifest})
        if final.exists():  # a damaged one, or one of a run that was told to start afresh
            shutil.rmtree(final)
        temporary.rename(final)
        fsync_dir(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final}: can't be written ({error}); earlier checkpoints are intact. Free some space "
            "and run the same command again"
        ) from error
    for old in checkpoints(root)[:-KEEP]:
        shutil.rmtree(old)
    return final


def checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first; intact or not."""
    return sorted(root.glob("step-*"))


def verify(folder: Path) -> None:
    """Check every file against the manifest. Raises `CheckpointError` saying what is wrong."""
    try:
        files: dict[str, dict[str, Any]] = json.loads(
            (folder / "manifest.json").read_text(encoding="utf-8")
        )["files"]
        for name in _FILES:
            path = folder / name
            if path.stat().st_size != files[name]["size"]:
                raise CheckpointError(f"{path}: has another size than its manifest says")
            if sha256_file(path) != files[name]["sha256"]:
                raise CheckpointError(f"{path}: has another SHA-256 than its manifest says")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: damaged checkpoint ({error})") from error


def latest_intact(root: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named and passed over."""
    for folder in reversed(checkpoints(root)):
        try:
            verify(folder)
        except CheckpointError as error:
            log(f"{error}; using the one before")
            continue
        return folder
    return None


def discard(root: Path, after: int = -1) -> None:
    """Delete the checkpoints of more than ``after`` steps: damaged ones, or all to start afresh."""
    for folder in checkpoints(root):
        if int(folder.name.removeprefix("step-")) > after:
            shutil.rmtree(folder)


def read_state(folder: Path) -> TrainState:
    """The state of a verified checkpoint."""
    return TrainState(**json.loads((folder / "state.json").read_text(encoding="utf-8")))


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``key: old -> new`` for every setting that differs."""
    keys = sorted({*before, *now})
    return [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in keys
        if before.get(key) != now.get(key)
    ]


def find(
    root: Path, settings: Mapping[str, Any], *, must: bool, allow_change: bool
) -> tuple[Path, TrainState] | None:
    """The checkpoint to continue from, and its state with ``settings`` as they are now.

    None where there is none, unless it ``must`` be. Raises `CheckpointError` naming every setting
    that changed since, unless told to ``allow_change``.
    """
    folder = latest_intact(root)
    if folder is None:
        if must:
            raise CheckpointError(f"{root}: no intact checkpoint to continue from")
        return None
    state = read_state(folder)
    changed = changed_settings(state.settings, settings)
    if changed and not allow_change:
        raise CheckpointError(
            f"{folder} was made with other settings; --allow-config-change continues all the same, "
            "--resume never starts afresh:\n  " + "\n  ".join(changed)
        )
    return folder, replace(state, settings=dict(settings))


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and optimizer state of a verified checkpoint. Raises `CheckpointError`."""
    weights = load_file(folder / "model.safetensors")
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(param.shape) for name, param in params.items()}
    if {name: tuple(value.shape) for name, value in weights.items()} != shapes:
        raise CheckpointError(f"{folder}: holds other weights than this encoder's; start afresh")
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(weights[name])
    load_state_tensors(optimizer, model, load_file(folder / "optimizer.safetensors"))
