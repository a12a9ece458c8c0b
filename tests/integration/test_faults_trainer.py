"""Faults of the trainer beside a gateway under load: killed, and its work goes on where it was."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from memshare.config import load_config
from memshare.retrieval.generation import current, generations, verify_generation
from tests.faults import Load, check
from tests.gateways import ROOT, gateway
from tests.loop import loop_config_file

pytestmark = pytest.mark.slow
RECOVERY_SECONDS = 120.0  # from its last start to the first answer by the generation that it made
SECTIONS = {
    "mining": {"labels": "none", "candidates": 4, "dense_candidates": 0},
    "training": {"batch_size": 8, "max_steps": 4, "checkpoint_every": 1},
    "continual": {"min_new": 20, "poll_seconds": 0.1},
    "gate": {"margin": 1.0, "resamples": 100, "max_queries": 16},
    "retriever": {"pools": ["keep"]},
    "wandb": {"mode": "disabled"},
}


def start(config: Path, log: Path) -> subprocess.Popen[str]:
    with log.open("a") as output:
        return subprocess.Popen(
            [sys.executable, "train/continual.py", "--config", str(config), "--once"],
            cwd=ROOT, stdout=output, stderr=output, text=True,
        )  # fmt: skip


def test_killed_under_load(tmp_path: Path) -> None:
    rng = random.Random(6)
    models, run, log = tmp_path / "models", tmp_path / "run", tmp_path / "trainer.log"
    models.mkdir()
    config = loop_config_file(run, models, **SECTIONS)
    settings = load_config(config)
    child: subprocess.Popen[str] | None = None
    with gateway(run, models, **SECTIONS) as url:
        try:
            with Load(url, pause=0.1).running() as load:
                load.more(30)
                for _ in range(2):
                    child = start(config, log)
                    time.sleep(1 + 4 * rng.random())  # while starting, mining or training
                    child.kill()
                    child.wait()
                    load.more(5)
                began = time.monotonic()
                child = start(config, log)
                while generation(url) == 0:
                    assert time.monotonic() - began < RECOVERY_SECONDS, log.read_text()
                    assert child.poll() in (None, 0), log.read_text()
                    time.sleep(0.1)
                recovery = time.monotonic() - began
                load.more(5)
            assert child.wait(60) == 0, log.read_text()
        finally:
            if child is not None and child.poll() is None:
                child.terminate()
                child.wait(60)
        assert not load.refusals
        assert generation(url) == 1
        check(settings.url, url, load)
    home = settings.retriever_dir
    assert [item.number for item in generations(home)] == [1] == [current(home)]
    verify_generation(home, 1)
    print(f"{recovery:.1f} s to the first answer of what the restarted trainer made")


def generation(url: str) -> int:
    body = {"pool": "keep", "query": "writer", "k": 1}
    reply = httpx.post(f"{url}/v1/memories/search", json=body, timeout=30)
    return int(reply.raise_for_status().json()["generation"])
