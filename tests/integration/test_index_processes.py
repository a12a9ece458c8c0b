"""train/index.py under `accelerate launch`: two processes write one generation, as one would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import yaml

from memshare.config import Config, ContinualConfig
from memshare.pool.errors import PoolUnavailable
from memshare.retrieval.generation import current, load
from memshare.training.child import accelerate_command
from memshare.training.journal import Round
from memshare.training.outcome import DATABASE_AWAY
from memshare.training.steps import Steps
from tests.postgres import free_port
from tests.retrieving import fill, make_config, open_store
from tests.tiny import tiny_encoder
from tests.training_runs import ENV, ROOT, launch

PROGRAM = ROOT / "train" / "index.py"


def publish(config: Config, folder: Path, processes: int) -> str:
    """Publish a first generation of ``config`` as the loop does; what the program logged."""
    path = folder / f"{processes}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    words = ["--config", str(path), "--encoder", "frozen", "--no-gate"]
    words += ["--result", str(folder / f"{processes}.json")]
    start = accelerate_command(ContinualConfig(num_processes=processes), always=False)
    assert ("accelerate.commands.launch" in start) == (processes > 1)
    done = subprocess.run(
        [*start, str(PROGRAM), *words], env=ENV, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_two_processes_publish_what_one_does(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder")
    both = []
    for processes in (1, 2):
        config = make_config(tmp_path / str(processes), encoder)
        with open_store(config) as store:
            made = fill(store, "p", 50)
            store.delete(made[7].id)
            store.hold(made[31].id)
        told = publish(config, tmp_path, processes)
        assert ("encoding p by 2 processes: 1 done" in told) == (processes == 2)
        outcome = json.loads((tmp_path / f"{processes}.json").read_text())
        assert outcome["outcome"] == "published"
        number = current(config.retriever_dir)
        assert number == outcome["generation"] == 1
        generation = load(config.retriever_dir, number, device="cpu")
        rows = np.arange(len(generation.ids["p"]))
        both.append((rows, generation.indexes["p"].reconstruct(rows)))
        generation.close()
    assert len(both[0][0]) == 48
    np.testing.assert_allclose(both[1][1], both[0][1], atol=1e-6, rtol=0)


def test_the_loops_number_of_processes_wins_over_accelerates_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # which would win over what is told
    env = {name: value for name, value in ENV.items() if name != "OMP_NUM_THREADS"}
    program = tmp_path / "count.py"
    program.write_text(
        "import torch\n"
        "from memshare.training.gather import World, launch, leave\n"
        "accelerator = launch()\n"
        "world = World(accelerator.device)\n"
        "print(f'{world.size} {torch.get_num_threads()}\\n', end='', flush=True)\n"
        "leave(accelerator, world)\n"
    )
    for name, processes in (("cpu.yaml", 2), ("cpu2.yaml", 1), ("cpu2.yaml", None)):
        path = ROOT / "configs/accelerate" / name
        start = accelerate_command(ContinualConfig(accelerate_config=path, num_processes=processes))
        done = subprocess.run(
            [*start, str(program)], env=env, cwd=ROOT, capture_output=True, text=True
        )
        count = processes or 2
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        assert done.stdout.split("\n") == [*[f"{count} {threads}"] * count, ""], done.stderr


def test_a_mistake_of_the_main_process_ends_all(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", tiny_encoder(tmp_path / "encoder"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    child = launch(2, PROGRAM, ["--config", str(path)])  # nothing was ever trained
    _, told = child.communicate(timeout=60)
    assert child.returncode != 0 and "no trained encoder" in told


def test_the_loop_learns_from_two_processes_that_their_database_is_away(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", tiny_encoder(tmp_path / "encoder"))
    shutil.copytree(tmp_path / "encoder", tmp_path / "run/training/000001/encoder")
    away = {"database_url": f"postgresql://127.0.0.1:{free_port()}/none"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**config.model_dump(mode="json"), **away}))
    two = config.model_copy(update={"continual": ContinualConfig(num_processes=2)})
    with open_store(config) as store:
        steps = Steps(two, store, ROOT / "train", ["--config", str(path)], Event())
        with pytest.raises(PoolUnavailable, match="index of round 1"):
            steps.index(Round(1, {}, "start", step="index"))
    told = (tmp_path / "run/logs/round-000001-index.log").read_text()
    assert "--num_processes 2" in told
    report = json.loads((tmp_path / "run/training/000001/index.json").read_text())
    assert report == {"outcome": DATABASE_AWAY}
