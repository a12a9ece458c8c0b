"""The jobs of slurm/ on a real SLURM of two nodes: whole, warned, cut off, and with parts dying."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor

from memshare.files import run_lock
from memshare.pool.store import PoolStore
from memshare.records import NewMemory
from memshare.training.examples import is_whole, round_dir
from tests.fake_vllm import fake_python
from tests.loop import loop_config_file
from tests.postgres import PostgresServer
from tests.slurm import Cluster, cluster, missing, until
from tests.tiny import tiny_encoder
from tests.tiny_lm import tiny_lm
from tests.training_data import TOPICS, examples, write_round
from tests.training_runs import ENV, ROOT, load_program, result, steps_saved

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {missing()}; see make servers"),
]
STEPS = 200


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    # Not pytest's folder: munged refuses a folder that others may enter, sockets a long name.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, cluster(Path(folder)) as made:
        made.env.update(ENV, SLURM_CONF=made.env["SLURM_CONF"])
        yield made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder, a round of examples, a configuration and a site file."""
    folder = tmp_path_factory.mktemp("base")
    encoder = tiny_encoder(folder / "encoder")
    write_round(folder / "round-1", examples(60))
    training = {"batch_size": 4, "lr": 1e-3, "max_steps": STEPS, "checkpoint_every": 5}
    tree = {
        "run": {"dir": str(folder / "run")},
        "encoder": {"model": str(encoder)},
        "training": training,
        "wandb": {"mode": "offline"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    site: dict[str, Any] = {"python": sys.executable, "logs": str(folder / "logs")}
    site |= {"warning_seconds": 30, "env": {"PYTHONPATH": str(ROOT)}}
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    return folder


def command(base: Path, action: str, *more: str) -> list[str]:
    """``memshare slurm ACTION`` with the files in ``base``."""
    site, config = base / "site.yaml", base / "config.yaml"
    words = ["slurm", action, "--site", str(site), "--config", str(config), *more]
    return [sys.executable, "-m", "memshare.cli", *words]


def train(slurm: Cluster, base: Path, output: Path, *more: str) -> str:
    """Submit a training; its job number."""
    words = ["train", "--examples", str(base / "round-1"), "--output", str(output)]
    return slurm.call(*command(base, "submit", *more, *words), cwd=base).strip()


def log_of(base: Path, job: str, attempt: int, name: str = "memshare-train") -> str:
    return (base / "logs" / name / job / f"attempt-{attempt}.log").read_text()


def await_attempt(slurm: Cluster, base: Path, job: str, attempt: int) -> None:
    """Until the one before is gone and ``attempt`` has begun."""
    log = base / "logs/memshare-train" / job / f"attempt-{attempt}.log"
    until(log.exists, 90, lambda: f"{slurm.job(job)}\n{log_of(base, job, attempt - 1)}")


def ranks(output: Path) -> list[psutil.Process]:
    """The processes that train into ``output``, without their launchers."""
    found = {}
    for process in psutil.process_iter(["cmdline", "ppid"]):
        words = process.info["cmdline"] or []
        if str(output) in words and str(ROOT / "train/contrastive.py") in words[:3]:
            found[process.pid] = process
    # A rank that starts a program has a child that looks like itself until it becomes that.
    return [process for process in found.values() if process.info["ppid"] not in found]


@contextmanager
def paused(output: Path, count: int, after: int = 0) -> Iterator[list[psutil.Process]]:
    """Hold all ``count`` ranks once they have saved a checkpoint of more than ``after`` steps."""
    until(lambda: max(steps_saved(output), default=0) > after, 120, lambda: "no checkpoint")
    found = ranks(output)
    assert len(found) == count, found
    for process in found:
        process.send_signal(signal.SIGSTOP)
    try:
        yield found
    finally:
        for process in found:
            if process.is_running():
                process.send_signal(signal.SIGCONT)


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "encoder" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(slurm: Cluster, base: Path) -> Path:
    """An uninterrupted training on two nodes."""
    output = base / "whole"
    job = train(slurm, base, output, "--nodes=2")
    assert slurm.wait(job) == "COMPLETED", log_of(base, job, 0)
    return output


def test_two_nodes_train_as_one_process(slurm: Cluster, base: Path, tmp_path: Path) -> None:
    """Here without the environment of whoever submits, as sites advise; steps would get none."""
    few = ("--set=training.max_steps=10", "--set=training.dropout=false")
    job = train(slurm, base, tmp_path / "two", "--nodes=2", "--sbatch=--export=NONE", *few)
    arguments = ["--config", str(base / "config.yaml"), *few, "--set=training.batch_size=8"]
    arguments += ["--examples", str(base / "round-1"), "--output", str(tmp_path / "one")]
    assert slurm.wait(job) == "COMPLETED", log_of(base, job, 0)
    assert load_program().main(arguments) == 0
    assert result(tmp_path / "two")["processes"] == 2
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((one[n] - two[n]).abs().max()) for n in one) < 1e-5
    assert "on n[1-2]" in log_of(base, job, 0)
    assert (base / "logs/memshare-train/latest").read_text() == log_of(base, job, 0)


def test_an_interrupted_job_ends_as_an_uninterrupted_one(
    slurm: Cluster, base: Path, whole: Path
) -> None:
    """Time limit, `scontrol requeue`, preemption, a lost node: the same weights, bit for bit."""
    output = base / "broken"
    job = train(slurm, base, output, "--nodes=2", "--sbatch=--time=1")
    request = base / "logs/memshare-train" / job / "stop-0"
    # SLURM warns by itself, half a minute before the limit or up to another half earlier.
    until(lambda: request.exists() or bool(steps_saved(output)), 90, lambda: log_of(base, job, 0))
    if not request.exists():
        with paused(output, 2):
            until(request.exists, 90, lambda: log_of(base, job, 0))
    # The next attempt takes the result away when it begins, seconds later.
    until((output / "result.json").exists, 90, lambda: log_of(base, job, 0))
    ids = {result(output)["wandb"]["id"]}  # type: ignore[index]
    await_attempt(slurm, base, job, 1)
    log = log_of(base, job, 0)
    assert "warned by SLURM" in log and "training with: stopped" in log and "requeued" in log
    steps = steps_saved(output)[-1]
    assert 1 <= steps < STEPS

    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    with paused(output, 2, after=steps):
        slurm.call("scontrol", "requeue", job)
    await_attempt(slurm, base, job, 2)
    steps = steps_saved(output)[-1]
    assert steps < STEPS

    with paused(output, 2, after=steps):  # SLURM lets them go on, then tells them, not the shell
        words = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
        slurm.call("sbatch", *words, "--wrap=true")
        await_attempt(slurm, base, job, 3)
    log = log_of(base, job, 2)
    assert "training with: stopped" in log and "requeued" in log and "by SLURM" not in log
    steps = steps_saved(output)[-1]
    assert steps < STEPS

    with paused(output, 2, after=steps):
        slurm.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    await_attempt(slurm, base, job, 4)
    assert slurm.wait(job) == "COMPLETED", slurm.job(job)
    assert "continuing from" in log_of(base, job, 4)
    ids.add(result(output)["wandb"]["id"])  # type: ignore[index]
    assert len(ids) == 1 and {path.name[-8:] for path in output.rglob("offline-run-*")} == ids
    assert len(list(whole.rglob("offline-run-*"))) == 1  # of two processes
    ours, theirs = weights(output), weights(whole)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_one_process_preempted_with_a_grace_time_stops_at_a_step(
    slurm: Cluster, base: Path
) -> None:
    """Its launcher waits for it: else SLURM would kill what the step has left."""
    output = base / "alone"
    job = train(slurm, base, output, "--nodes=1", "--sbatch=--exclusive")
    with paused(output, 1):
        words = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
        slurm.call("sbatch", *words, "--wrap=true")
        await_attempt(slurm, base, job, 1)
    slurm.call("scancel", job)
    log = log_of(base, job, 0)
    assert "training with: stopped" in log and "requeued" in log and "by SLURM" not in log


def test_a_killed_rank_ends_the_job_with_its_reason(slurm: Cluster, base: Path) -> None:
    output = base / "killed"
    job = train(slurm, base, output, "--nodes=2")
    with paused(output, 2) as found:
        found[1].kill()
    assert slurm.wait(job, 60) == "FAILED"
    log = log_of(base, job, 0)
    assert "SIGKILL" in log and "the training ended without a result" in log
    assert not ranks(output)


def test_a_refused_job_leaves_the_earlier_result(slurm: Cluster, base: Path, whole: Path) -> None:
    earlier = result(whole)
    job = train(slurm, base, whole, "--nodes=2", "--set=training.lr=1e-2")
    assert slurm.wait(job) == "FAILED"
    log = log_of(base, job, 0)
    assert "training.lr: 0.001 -> 0.01" in log and "the training ended without a result" in log
    assert result(whole) == earlier


def test_a_mistake_is_found_before_anything_is_submitted(slurm: Cluster, base: Path) -> None:
    told = subprocess.run(
        command(base, "submit", "train"), env=slurm.env, cwd=ROOT, capture_output=True, text=True
    )
    assert told.returncode == 2 and "--examples" in told.stderr and "--output" in told.stderr


def test_an_array_mines_what_is_missing_and_nothing_twice(
    slurm: Cluster, tmp_path: Path, postgres: PostgresServer
) -> None:
    """Two shares, each with an LLM server of its own, one failing at first: as one share mines.

    One that is warned while its server starts is requeued, and not the other one with it.
    """
    url = postgres.url(postgres.create())
    lm, go = tiny_lm(tmp_path / "lm"), tmp_path / "go"
    server = {"python": str(fake_python(tmp_path / "python", lm, go))}
    scorer = {"backend": "vllm", "model": str(lm), "url": "http://127.0.0.1:8001", "server": server}
    mining = {"labels": "likelihood", "candidates": 4, "dense_candidates": 0, "shard_rows": 6}
    array, alone, warned = (tmp_path / name for name in ("array", "alone", "warned"))
    for run in (array, alone, warned):
        run.mkdir()
        tree: dict[str, Any] = {"run": {"dir": str(run)}, "database_url": url}
        tree |= {"mining": mining, "scorer_llm": scorer, "split": {"held_out": 0.0}}
        (run / "config.yaml").write_text(yaml.safe_dump(tree))
    with PoolStore.open(url) as store:
        store.create_pool("main", threshold=80.0)
        rows = [
            NewMemory("main", f"how is {topic} made in place {i}", topic)
            for i in range(4) for topic in TOPICS
        ]  # fmt: skip
        store.append(rows)

    logs = tmp_path / "logs"
    logs.mkdir()
    env = {**slurm.env, "MEMSHARE_PYTHON": sys.executable, "MEMSHARE_LOGS": str(logs)}

    def submit(run: Path, tasks: int) -> str:
        words = ["sbatch", "--parsable", f"--output={logs}/%A_%a.out", f"--array=0-{tasks - 1}"]
        words += ["slurm/mine.sbatch", "--config", f"{run}/config.yaml", "--round", "1"]
        told = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
        return told.stdout.strip()

    def mined(run: Path, tasks: int) -> list[str]:
        job = submit(run, tasks)
        return [slurm.wait(f"{job}_{task}") for task in range(tasks)]

    job = submit(warned, 2)
    first, second = (logs / "memshare-mine" / f"{job}_1/attempt-{n}.log" for n in (0, 1))
    until(lambda: first.exists() and "starting" in first.read_text(), 60, lambda: str(first))
    slurm.call("scancel", "--batch", "--signal=USR1", f"{job}_1")
    until(second.exists, 90, first.read_text)
    assert "requeued" in first.read_text() and "mining ended" not in first.read_text()
    assert slurm.job(f"{job}_0")["Restarts"] == "0"
    go.touch()
    assert [slurm.wait(f"{job}_{task}") for task in (0, 1)] == ["COMPLETED"] * 2
    assert mined(alone, 1) == ["COMPLETED"]

    with run_lock(array, "mining-1-of-2"):
        assert mined(array, 2) == ["COMPLETED", "FAILED"]
    folder = round_dir(array / "examples", 1)
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    assert stamps and not is_whole(folder)
    told = [path.read_text() for path in logs.glob("memshare-mine/*_1/attempt-0.log")]
    assert any("another mining-1-of-2" in text for text in told)
    served = {path.name for path in (array / "logs").iterdir()}
    assert len(served) == 2 and "vllm-8001.log" not in served

    assert mined(array, 2) == ["COMPLETED", "COMPLETED"]
    assert is_whole(folder)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    shards = sorted(round_dir(alone / "examples", 1).glob("shard-*"))
    assert len(shards) == 6
    assert [(folder / path.name).read_bytes() for path in shards] == [
        path.read_bytes() for path in shards
    ]


def test_a_cancelled_server_stops_cleanly_and_stays_away(slurm: Cluster, base: Path) -> None:
    run = base / "serve"
    config = loop_config_file(run, base / "models", wandb={"mode": "disabled"})
    site = ["--site", str(base / "site.yaml"), "--config", str(config)]
    submit = [sys.executable, "-m", "memshare.cli", "slurm", "submit", *site, "serve"]
    job = slurm.call(*submit, cwd=base).strip()
    path = base / "logs/memshare-serve" / job / "attempt-0.log"
    until(lambda: path.exists() and "serving on" in path.read_text(), 90, lambda: str(path))
    slurm.call("scancel", job)
    assert slurm.wait(job, 60) == "CANCELLED"
    until(lambda: "serve/up.py ended" in path.read_text(), 60, path.read_text)
    log = path.read_text()
    assert "started continual" not in log and "requeued" not in log
    assert "cancelled by SLURM" in log and "stopped gateway (exit 0)" in log


def told_of_agent(url: str) -> str:
    """What a gateway says of its agent's LLM; nothing while it does not answer."""
    try:
        told: str = httpx.get(f"{url}/readyz").json()["llm"]["agent"]
    except httpx.TransportError:
        return ""
    return told


def test_the_loop_learns_is_requeued_learns_on_and_falls_with_a_part(
    slurm: Cluster, base: Path, postgres: PostgresServer
) -> None:
    """On PostgreSQL, with an agent of two replicas on GPUs and ports that the job chose."""
    run = base / "loop"
    lm = tiny_lm(base / "replicated")
    go = base / "go"
    python = fake_python(base / "python", lm, go)
    agent = {"backend": "vllm", "model": str(lm), "url": "http://127.0.0.1:8001",
             "server": {"replicas": 2, "python": str(python)}}  # fmt: skip
    config = loop_config_file(
        run, base / "models", wandb={"mode": "disabled"}, mining={"labels": "given"},
        database_url=postgres.url(postgres.create()), agent_llm=agent,
        training={"max_steps": 2, "batch_size": 8}, gate={"margin": 1.0, "resamples": 200},
        continual={"min_new": 24, "poll_seconds": 0.2}, split={"held_out": 0.3},
    )  # fmt: skip
    facts = yaml.safe_load((base / "site.yaml").read_text())
    facts["env"]["CUDA_VISIBLE_DEVICES"] = "3,5,6"  # as a node with GPUs would set it
    (base / "gpus.yaml").write_text(yaml.safe_dump(facts))
    site = ["--site", str(base / "gpus.yaml"), "--config", str(config)]
    submit = [sys.executable, "-m", "memshare.cli", "slurm", "submit", *site, "loop"]
    job = slurm.call(*submit, cwd=base).strip()

    def add(url: str, start: int) -> None:
        items = [
            {"pool": "keep", "prompt": f"how is {topic} made in place {i}", "answer": topic}
            for i in range(start, start + 6) for topic in TOPICS
        ]  # fmt: skip
        httpx.post(f"{url}/v1/memories", json={"items": items}, timeout=60).raise_for_status()

    def log(attempt: int) -> str:
        path = base / "logs/memshare-loop" / job / f"attempt-{attempt}.log"
        return path.read_text() if path.exists() else str(slurm.job(job))

    until((run / "gateway.json").exists, 120, lambda: log(0))
    url = json.loads((run / "gateway.json").read_text())["url"]
    until(lambda: "unreachable" in told_of_agent(url), 120, lambda: log(0))
    time.sleep(3)  # of waiting, and asking every second
    assert "started gateway" in log(0) and "started continual" not in log(0)
    go.touch()
    until(lambda: "started continual" in log(0), 120, lambda: log(0))
    assert "GPUs: 3 for trainer and searcher" in log(0)
    told = "".join(path.read_text() for path in sorted((run / "logs").glob("vllm-*.log")))
    assert re.findall(r"port \d+, GPUs (\d+)", told) == ["5", "6"] and "port 8001" not in told
    add(url, 0)
    until(lambda: "status: generation 1" in log(0), 150, lambda: log(0))

    slurm.call("scancel", "--batch", "--signal=USR1", job)
    until(lambda: slurm.job(job)["Restarts"] == "1", 90, lambda: log(0))
    assert log(0).index("stopped continual") < log(0).index("stopped gateway")
    assert "requeued" in log(0)

    until(lambda: "started continual" in log(1), 120, lambda: log(1))
    until(lambda: "status: generation 1" in log(1), 60, lambda: log(1))
    add(json.loads((run / "gateway.json").read_text())["url"], 6)
    until(lambda: "status: generation 2" in log(1), 150, lambda: log(1))
    (pid,) = re.findall(r"started gateway \(pid (\d+)", log(1))
    os.kill(int(pid), signal.SIGKILL)
    assert slurm.wait(job, 90) == "FAILED"
    assert "gateway ended with exit code -9" in log(1) and "stopped continual" in log(1)
