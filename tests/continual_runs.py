"""Runs of train/continual.py for tests: a folder with a pool, and the loop's processes on it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import yaml

from memshare.config import load_config
from memshare.pool.store import PoolStore
from memshare.records import NewMemory
from tests.tiny import tiny_encoder

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("MEMSHARE_DATA", ROOT / "../shared/data"))


def banking(start: int, stop: int) -> list[NewMemory]:
    """Rows ``start:stop`` of each of six intents."""
    with (DATA / "banking77/train.csv").open(encoding="utf-8", newline="") as handle:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(handle)]
    labels = list(dict.fromkeys(label for _, label in rows))[:6]
    return [
        NewMemory("main", text, label, metadata={"label": label})
        for label in labels
        for text in [text for text, own in rows if own == label][start:stop]
    ]


class Run:
    """One run folder, and the loop's processes on it."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        encoder = tiny_encoder(folder / "tiny")
        tree: dict[str, Any] = {
            "run": {"dir": str(folder)},
            "encoder": {"model": str(encoder), "max_length": 48, "device": "cpu"},
            "mining": {
                "labels": "given",
                "candidates": 6,
                "dense_candidates": 3,
                "shard_rows": 8,
            },
            "training": {"batch_size": 8, "lr": 1e-3, "checkpoint_every": 1, "max_steps": 4},
            "continual": {"min_new": 30, "poll_seconds": 0.1, "rounds": 2},
            "gate": {"margin": 1.0, "resamples": 200},
            "wandb": {"mode": "disabled"},
        }
        for name, section in sections.items():
            tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
        self.file = folder / "config.yaml"
        self.file.write_text(yaml.safe_dump(tree))
        self.config = load_config(self.file)
        self.store = PoolStore.open(self.config.url)
        self.store.create_pool("main")
        self.children: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "train/continual.py", "--config", str(self.file), *arguments],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.children.append(child)
        return child

    def rounds(self) -> list[dict[str, Any]]:
        path = self.folder / "continual.json"
        found: list[dict[str, Any]] = (
            json.loads(path.read_text())["rounds"] if path.exists() else []
        )
        return found

    def wait(self, child: subprocess.Popen[str], reached: Any, seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, "not reached in time"
            assert child.poll() is None, child.communicate()
            time.sleep(0.02)


class Said:
    """What a program writes to its standard error, as far as it has come."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.text = ""
        threading.Thread(target=self._read, args=(child,), daemon=True).start()

    def _read(self, child: subprocess.Popen[str]) -> None:
        assert child.stderr is not None
        for line in child.stderr:
            self.text += line
