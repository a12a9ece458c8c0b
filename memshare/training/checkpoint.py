"""Checkpoints of a training run: whole or not there, checked before use, without pickle.

``checkpoints/step-00000100/`` holds the trainable weights (the adapters alone with LoRA) and the
optimizer's state as safetensors, ``state.json`` (position in the data, settings, W&B run id, random
seed: all random numbers derive from seed and step), the best step's weights where the run is
evaluated, and ``manifest.json`` with the SHA-256 and size of each, written last into a folder that
is then renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memshare.files import fsync_dir, fsync_tree, sha256_file, write_json
from memshare.progress import log
from memshare.training.optimizer import like, load_state_tensors, state_tensors
from memshare.training.outcome import Refused
from memshare.training.step_result import StepResult

KEEP = 2  # a damaged one leaves the one before
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_BEST = "best.safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, read, or continued from with these settings."""


class NotContinued(CheckpointError, Refused):
    """An intact checkpoint that this run does not go on from; nothing of it was touched.

    ``why`` is the message without the advice.
    """

    def __init__(self, why: str, advice: str) -> None:
        super().__init__(f"{why}\n{advice}")
        self.why = why


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far: after ``step`` steps (0: before the first one).

    ``start`` is what the first evaluation gave; ``since`` counts those after the best one.
    """

    step: int
    metrics: dict[str, float]
    start: dict[str, float]
    since: int = 0


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands, beside its weights: ``step`` steps are done.

    ``settings`` are those that must not change on resume; ``tokens`` and ``padded`` count what was
    encoded so far; ``seconds`` is the time spent in steps; ``loss`` is the last step's; ``best`` is
    None where nothing was evaluated. ``idle`` adds up the steps' shares of queries that taught
    nothing (`StepBatch`), and ``skipped`` counts the steps that had only such.
    """

    step: int
    settings: dict[str, Any]
    seed: int
    wandb_id: str
    loss: float = 0.0
    tokens: int = 0
    padded: int = 0
    seconds: float = 0.0
    best: Best | None = None
    idle: float = 0.0
    skipped: int = 0

    def after(self, result: StepResult, seconds: float, idle: float) -> TrainState:
        """The state one step later; ``idle``: that step's."""
        return replace(
            self,
            step=self.step + 1,
            loss=result.loss,
            tokens=self.tokens + result.tokens,
            padded=self.padded + result.padded,
            seconds=self.seconds + seconds,
            idle=self.idle + idle,
            skipped=self.skipped + (idle == 1.0),
        )

    def figures(self) -> dict[str, float]:
        """What a report says of the run so far; at least one step must be done."""
        return {
            "steps": self.step,
            "loss": self.loss,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
            "real_token_share": self.tokens / max(1, self.padded),
            "skipped_steps": self.skipped,
            "share_without_negatives": self.idle / self.step,
        }


class Stored(Mapping[str, Tensor]):
    """The tensors of a safetensors file, on the CPU, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Opens ``path``, for as long as this is there."""
        self._file: Any = safe_open(path, framework="pt")

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, by name, on the CPU."""
    return {
        name: param.detach().cpu().contiguous()
        for name, param in model.named_parameters()
        if param.requires_grad
    }


def save(
    root: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    best: Mapping[str, Tensor] | None = None,
    *,
    writes: bool = True,
) -> Path:
    """Write a checkpoint and prune all but the last `KEEP`. Raises `CheckpointError`.

    ``best``: the weights of the step that ``state.best`` names. Every process must call this, since
    the optimizer's state may be divided over them; the main one ``writes``.
    """
    final = root / f"step-{state.step:08d}"
    moments = state_tensors(optimizer, keep=writes)
    if not writes:
        return final
    temporary = root / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(trainable(model), temporary / "model.safetensors")
        save_file(moments, temporary / "optimizer.safetensors")
        if best:
            save_file(dict(best), temporary / _BEST)
        fsync_tree(temporary)
        write_json(temporary / "state.json", asdict(state))
        manifest = {
            path.name: {"sha256": sha256_file(path), "size": path.stat().st_size}
            for path in sorted(temporary.iterdir())
        }
        write_json(temporary / "manifest.json", {"files": manifest})
        if final.exists():  # a damaged one, or one of a run that was told to start afresh
            shutil.rmtree(final)
        temporary.rename(final)
        fsync_dir(root)
    except (OSError, SafetensorError) as error:  # which safetensors makes of a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final}: can't be written ({error}); earlier checkpoints are intact. Free some space "
            "and run the same command again"
        ) from error
    for old in checkpoints(root)[:-KEEP]:
        try:
            shutil.rmtree(old)
        except OSError as error:  # policy: it is in nobody's way, and the training goes on
            log(f"{old}: can't be deleted ({error}); with the next checkpoint it is tried again")
    return final


def checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first; intact or not. Others, such as copies, are nobody's."""
    return sorted(root.glob(f"step-{'[0-9]' * 8}"))


def verify(folder: Path) -> None:
    """Check every file against the manifest. Raises `CheckpointError` saying what is wrong."""
    try:
        files: dict[str, dict[str, Any]] = json.loads(
            (folder / "manifest.json").read_text(encoding="utf-8")
        )["files"]
        for name in {*_FILES, *files}:
            path = folder / name
            if path.stat().st_size != files[name]["size"]:
                raise CheckpointError(f"{path}: has another size than its manifest says")
            if sha256_file(path) != files[name]["sha256"]:
                raise CheckpointError(f"{path}: has another SHA-256 than its manifest says")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: damaged checkpoint ({error})") from error


def latest_intact(root: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named and passed over."""
    found = checkpoints(root)
    for folder in reversed(found):
        try:
            verify(folder)
        except CheckpointError as error:
            before = "there is none before it" if folder == found[0] else "using the one before"
            log(f"{error}; {before}")
            continue
        return folder
    return None


def discard(root: Path, after: int = -1) -> None:
    """Delete the checkpoints of more than ``after`` steps: damaged ones, or all to start afresh.

    And what a save that was killed has left behind.
    """
    for folder in checkpoints(root):
        if int(folder.name.removeprefix("step-")) > after:
            shutil.rmtree(folder)
    for left in root.glob(".step-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def read_state(folder: Path) -> TrainState:
    """The state of a verified checkpoint. Raises `NotContinued` for another version's."""
    row = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    best = row.get("best")
    try:
        return TrainState(**{**row, "best": best and Best(**best)})
    except TypeError as error:  # a field that is not known here, or that is not there
        raise NotContinued(
            f"{folder} is of another version of memshare ({error})",
            "that version continues it, --resume never starts afresh",
        ) from error


def best_weights(folder: Path, state: TrainState) -> dict[str, Tensor]:
    """The best step's weights in a verified checkpoint; empty where ``state`` names no best."""
    if state.best is None:
        return {}
    # Copied: what was loaded is the file, mapped, which NFS could not delete while it is in use.
    return {name: value.clone() for name, value in load_file(folder / _BEST).items()}


def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put back what `trainable` gave, copied. Raises `CheckpointError` if they are of another."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(param.shape) for name, param in params.items()}
    if {name: tuple(value.shape) for name, value in weights.items()} != shapes:
        raise CheckpointError("these are other weights than this encoder's")
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(like(weights[name], param))


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and optimizer state of a verified checkpoint. Raises `CheckpointError`."""
    try:
        put_weights(model, load_file(folder / "model.safetensors"))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}; start afresh") from error
    load_state_tensors(optimizer, Stored(folder / "optimizer.safetensors").items())
