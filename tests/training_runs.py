"""Runs of train/contrastive.py for tests: in this process, as a child, and as several."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

from memshare.retrieval.manifest import MANIFEST, METRIC, Manifest, folder_name
from memshare.training import checkpoint

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "train" / "contrastive.py"
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),
}


def options(base: Path, output: Path, *more: str, steps: int = 60) -> list[str]:
    settings = {
        "training.max_steps": steps,
        "training.batch_size": 8,
        "training.lr": 1e-3,
        "training.checkpoint_every": 5,
        "training.dropout": "true",  # so that random numbers matter to what goes on or is resumed
        "wandb.mode": "disabled",
    }
    return [
        "--examples", str(base / "round-1"), "--encoder", str(base / "encoder"),
        "--output", str(output),
        *(f"--set={key}={value}" for key, value in settings.items()), *more,
    ]  # fmt: skip


def start(arguments: list[str], more: Mapping[str, str] = {}) -> subprocess.Popen[str]:
    """A child, with ``more`` in its environment."""
    command = [sys.executable, str(PROGRAM), *arguments]
    env = {**ENV, **more}
    return subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def launch(
    processes: int, program: Path, arguments: list[str], *, divided: bool = False
) -> subprocess.Popen[str]:
    """One process or several; ``divided`` by FSDP."""
    fsdp = ["--config_file", str(ROOT / "configs/accelerate/fsdp.yaml")]
    how = fsdp if divided else ["--multi_gpu"] if processes > 1 else ["--cpu"]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *how,
        "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", "0", str(program), *arguments,
    ]  # fmt: skip
    return subprocess.Popen(command, env=ENV, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "nothing happened for two minutes"
        time.sleep(0.01)


def steps_saved(output: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint.checkpoints(output / "checkpoints")]


def result(output: Path) -> dict[str, object]:
    loaded = json.loads((output / "result.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


def load_program(path: Path = PROGRAM) -> ModuleType:
    """A program as a module, to call its main without starting a process each time."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logged(output: Path) -> list[dict[str, float]]:
    """What a training logged of its steps, without their times."""
    keys = ("step", "loss", "lr", "grad_norm")
    lines = (output / "log.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in keys} for line in lines]


def refreshed(home: Path, number: int, *, origin: int) -> None:
    """Generation ``number`` without its files: the encoder of ``origin``, with newer rows."""
    manifest = Manifest(
        number, "main", "", origin, number, 4, METRIC, "q", "m", {}, {}, {}, origin=origin
    )
    (home / folder_name(number)).mkdir(parents=True)
    (home / folder_name(number) / MANIFEST).write_text(manifest.dump())
