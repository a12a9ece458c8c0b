"""The continual loop with its real programs: killed, restarted, stopped, failing, rejected."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from memshare.config import load_config
from memshare.pool.store import PoolStore
from memshare.records import NewMemory
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.generation import current, generations, verify_generation
from memshare.training.examples import load_examples, round_dir
from tests.postgres import PostgresServer
from tests.tiny import tiny_encoder

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MEMSHARE_DATA", ROOT / "../shared/data"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"MEMSHARE_DATA: no {DATA}"),
]


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


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[Any]:
    runs: list[Run] = []

    def make(**sections: Any) -> Run:
        runs.append(Run(tmp_path / f"run{len(runs)}", **sections))
        return runs[-1]

    yield make
    for run in runs:
        for child in run.children:
            if child.poll() is None:
                child.terminate()
                child.wait(60)
        run.store.close()


def test_two_rounds_with_kills_in_every_step(make_run: Any) -> None:
    """With all that a round can do: a query tower over frozen memories, and evaluation."""
    run = make_run(training={"towers": "query-only", "eval_every": 2}, split={"held_out": 0.3})
    run.store.append(banking(0, 8))
    first = round_dir(run.config.examples_dir, 1)
    training = run.folder / "training" / "000001"

    # kill -9 while mining, with shards done
    child = run.start("--once")
    run.wait(child, lambda: (first / "shard-00000.parquet").exists())
    child.kill()
    child.wait()
    # again while training, after a checkpoint
    child = run.start("--once")
    run.wait(child, lambda: any((training / "checkpoints").glob("*")))
    child.kill()
    child.wait()
    shards = {path: path.stat().st_mtime_ns for path in first.glob("*.parquet")}
    # and while building the generation, or right after publishing it
    child = run.start("--once")
    run.wait(child, lambda: bool(run.rounds()) and run.rounds()[-1]["step"] == "index")
    child.kill()
    child.wait()
    weights = {path: path.stat().st_mtime_ns for path in training.glob("encoder/**/*.safetensors")}
    assert len(weights) == 2

    child = run.start("--once")
    errors = child.communicate(timeout=150)[1]
    assert child.returncode == 0, errors
    (done,) = run.rounds()
    assert (done["step"], done["outcome"]) == ("done", "published")
    assert {path: path.stat().st_mtime_ns for path in shards} == shards  # nothing mined twice
    assert {path: path.stat().st_mtime_ns for path in weights} == weights  # nor trained
    assert done["encoder"] == str(run.folder / "tiny")
    root, name = run.config.generations_dir, run.config.retriever.name
    assert [item.number for item in generations(root, name)] == [1] == [current(root, name)]
    verify_generation(root, name, 1)
    assert done["results"]["index"]["gate"]["queries"] > 0
    card = (root / name / "000001" / "encoder" / "README.md").read_text()
    examples = done["results"]["train"]["examples"]
    assert f"on {examples} examples\n({examples} of pool main)" in card
    assert "labelled by given (scorer: given:label)" in card
    assert f"On {done['results']['index']['gate']['queries']} held-out questions" in card
    assert not any(memory.prompt in card for memory in run.store.iter("main"))

    # the second round: new memories, a deleted one erased, warm start from what serves
    gone = load_examples([first])["query_id"][0]
    run.store.delete(gone)
    run.store.append(banking(8, 16))
    child = run.start()
    errors = child.communicate(timeout=150)[1]
    assert child.returncode == 0, errors
    second = run.rounds()[1]
    assert second["outcome"] == "published" and second["number"] == 2
    assert second["encoder"] == str(root / name / "000001" / "encoder")
    assert second["spans"]["main"]["since"] == done["spans"]["main"]["until"]
    mined = load_examples([first, round_dir(run.config.examples_dir, 2)])
    assert gone not in mined["query_id"]
    assert gone not in {item["id"] for row in mined["candidates"] for item in row}
    assert current(root, name) == 2
    assert generations(root, name)[-1].positions["main"] == run.store.last_seq("main")
    # the generation that served proposed, and earlier memories were mined again
    assert (done["results"]["mine"]["proposer"], second["results"]["mine"]["proposer"]) == (0, 1)
    again = second["results"]["mine"]["replayed"]
    assert again == round(0.5 * (second["results"]["mine"]["examples"] - again)) > 0
    # the memory tower stayed the configured encoder's, and each round kept its best step
    frozen = Encoder.load(run.config.encoder).memory_fingerprint()
    assert {item.memory_fingerprint for item in generations(root, name)} == {frozen}
    for round_ in run.rounds():
        evaluation = round_["results"]["train"]["evaluation"]
        assert evaluation["queries"] > 0
        assert evaluation["best"]["nDCG@10"] >= evaluation["start"]["nDCG@10"]
        verify_generation(root, name, round_["number"])
    # of the first training, which nothing reads any more, the figures are left
    left = {path.name for path in training.iterdir()}
    assert not left & {"encoder", "checkpoints"} and {"result.json", "log.jsonl"} <= left
    newest = {path.name for path in (training.parent / "000002").iterdir()}
    assert {"encoder", "checkpoints", "result.json", "log.jsonl"} <= newest


def test_a_round_of_two_iterations_with_kills_in_the_second(make_run: Any) -> None:
    """And the next round's optimizer starts where the last training of this one has ended."""
    run = make_run(mining={"iterations": 2}, training={"warm_optimizer": True})
    run.store.append(banking(0, 8))
    again = round_dir(run.config.examples_dir, 1, 2)
    home = run.folder / "training" / "000001"
    child = run.start("--once")
    run.wait(child, lambda: (again / "shard-00000.parquet").exists())
    child.kill()
    child.wait()
    made = [*home.glob("encoder/**/*.safetensors"), *again.parent.glob("*.parquet")]
    first = {path: path.stat().st_mtime_ns for path in made}
    assert len(first) > 2 and run.rounds()[-1]["iteration"] == 2
    child = run.start("--once")
    run.wait(child, lambda: any((home / "iteration-2" / "checkpoints").glob("*")))
    child.kill()
    child.wait()
    child = run.start("--once")
    errors = child.communicate(timeout=150)[1]
    assert child.returncode == 0, errors
    (done,) = run.rounds()
    assert done["outcome"] == "published"
    assert list(done["results"]) == ["mine-1", "train-1", "mine", "train", "index"]
    assert {path: path.stat().st_mtime_ns for path in first} == first  # nothing was done twice
    # what the first iteration taught proposed in the second, and both trained the same encoder
    proposers = [done["results"][step]["proposer"] for step in ("mine-1", "mine")]
    assert proposers == [0, str(home / "encoder")]
    trained = [done["results"][step] for step in ("train-1", "train")]
    assert [item["encoder"] for item in trained] == [str(run.folder / "tiny")] * 2
    assert done["results"]["index"]["encoder"] == str(home / "iteration-2" / "encoder")
    # a memory that is deleted leaves the examples of both
    gone = load_examples([again])["query_id"][0]
    run.store.delete(gone)
    run.store.append(banking(8, 16))
    child = run.start("--once", "--set", "mining.iterations=1")
    errors = child.communicate(timeout=150)[1]
    assert child.returncode == 0, errors
    for folder in (again.parent, again):
        assert gone not in load_examples([folder])["query_id"]
    assert run.rounds()[1]["warm"] == str(home / "iteration-2")
    said = (run.folder / "logs" / "round-000002-train.log").read_text()
    last = home / "iteration-2" / "checkpoints" / "step-00000004"
    assert f"the optimizer goes on from {last}, with the state of " in said


def test_an_interrupted_training_starts_afresh_with_other_settings(make_run: Any) -> None:
    """And goes on with those that change nothing of it."""
    run = make_run(training={"max_steps": 100_000})
    run.store.append(banking(0, 8))
    log_file = run.folder / "logs" / "round-000001-train.log"
    saved = run.folder / "training" / "000001" / "checkpoints"
    child = run.start("--once")
    run.wait(child, lambda: any(saved.glob("step-*")))
    child.send_signal(signal.SIGTERM)
    assert "stopped" in child.communicate(timeout=60)[1]
    child = run.start("--once", "--set", "training.log_every=1")
    run.wait(child, lambda: "continuing from" in log_file.read_text())
    child.send_signal(signal.SIGTERM)
    assert "stopped" in child.communicate(timeout=60)[1]
    changes = ("continual.num_processes=2", "training.max_steps=4", "training.lr=0.002")
    child = run.start("--once", *(word for change in changes for word in ("--set", change)))
    errors = child.communicate(timeout=150)[1]
    assert child.returncode == 0, errors
    (done,) = run.rounds()
    assert done["outcome"] == "published"
    assert [done["results"]["train"][name] for name in ("steps", "processes")] == [4, 2]
    said = log_file.read_text()
    assert said.count("continuing from") == said.count("begun with other settings") == 1
    for change in ("processes: 1 -> 2", "max_steps: 100000 -> 4", "lr: 0.001 -> 0.002"):
        assert change in said


@pytest.mark.server
def test_it_waits_for_a_database_that_is_away(make_run: Any) -> None:
    with closing(PostgresServer()) as server:
        server.start()
        run = make_run(database_url=server.url(server.create()))
        run.store.append(banking(0, 8))
        child = run.start("--once")
        said = Said(child)
        run.wait(child, lambda: bool(run.rounds()) and run.rounds()[-1]["step"] == "mine")
        server.kill()  # while its program for mining starts, or mines
        run.wait(child, lambda: "the database is away (mine of round 1" in said.text)
        server.start()
        run.wait(child, lambda: run.rounds()[-1]["step"] != "mine")
        assert child.wait(timeout=150) == 0, said.text
        assert run.rounds()[-1]["outcome"] == "published"

        child = run.start()  # between two rounds
        said = Said(child)
        run.wait(child, (run.folder / "continual.lock").exists)
        server.kill()
        run.wait(child, lambda: said.text.count("the database is away") > 1)
        server.start()
        run.store.append(banking(8, 16))
        run.wait(child, lambda: len(run.rounds()) == 2)
        server.kill()
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=60) == 0, said.text


def test_stops_cleanly_and_refuses_a_second_loop(make_run: Any) -> None:
    run = make_run()
    child = run.start()
    run.wait(child, lambda: (run.folder / "continual.lock").exists())
    time.sleep(0.5)
    other = run.start()
    assert "another continual is running" in other.communicate(timeout=60)[1]
    assert other.returncode == 1
    run.store.append(banking(0, 8))
    run.wait(child, lambda: bool(run.rounds()) and run.rounds()[-1]["step"] == "train")
    record = run.folder / "continual.child.json"
    run.wait(child, record.exists)
    session = json.loads(record.read_text())["session"]
    child.send_signal(signal.SIGTERM)
    assert "stopped" in child.communicate(timeout=60)[1]
    assert child.returncode == 0
    assert run.rounds()[-1]["step"] == "train" and not record.exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(session, 0)


def test_a_failing_step_is_told_with_its_log(make_run: Any) -> None:
    run = make_run(training={"lr": 1e30}, mining={"dense_candidates": 0})
    run.store.append(banking(0, 8))
    child = run.start("--once")
    errors = child.communicate(timeout=100)[1]
    assert child.returncode == 1
    assert "contrastive.py" in errors and "is not finite" in errors
    assert run.rounds()[-1]["step"] == "train"


def test_a_launch_that_cannot_be_is_told_at_once(make_run: Any) -> None:
    run = make_run()
    child = run.start("--once", "--set", "continual.accelerate_config=nope.yaml")
    errors = child.communicate(timeout=60)[1]
    assert child.returncode == 2
    assert "continual.accelerate_config: no file nope.yaml, seen from" in errors


@pytest.mark.parametrize(("sections", "told"), [
    ({"encoder": {"model": "/no/such/encoder"}}, "/no/such/encoder"),
    ({"training": {"matryoshka": [8, 500]}}, "training.matryoshka: [500] must be less than 32"),
    ({"training": {"lora": {"enabled": True, "target_modules": ["nothing"]}}},
     "training.lora.target_modules ('nothing',) fits no module"),
])  # fmt: skip
def test_what_cannot_be_trained_is_told_before_anything_is_mined(
    make_run: Any, sections: dict[str, Any], told: str
) -> None:
    run = make_run(**sections)
    run.store.append(banking(0, 8))
    child = run.start("--once")
    errors = child.communicate(timeout=60)[1]
    assert child.returncode == 1 and f"error: {told}" in errors, errors
    assert not run.rounds() and not [*(run.folder / "examples").rglob("*.parquet")]


def test_rejected_and_empty_rounds_are_on_record(make_run: Any) -> None:
    run = make_run(split={"held_out": 1.0})
    run.store.append(banking(0, 8))
    assert run.start("--once").wait(100) == 0
    assert run.rounds()[-1]["outcome"] == "empty"  # every new memory was held out
    assert "train" not in run.rounds()[-1]["results"]

    run = make_run(gate={"margin": 0.0, "resamples": 200}, training={"lr": 1.0, "max_steps": 6})
    run.store.append(banking(0, 20))
    assert run.start("--once").wait(150) == 0
    assert run.rounds()[-1]["outcome"] == "rejected"
    root, name = run.config.generations_dir, run.config.retriever.name
    assert current(root, name) is None
    (line,) = (root / name / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["gate"]["passed"] is False


def test_a_pool_is_kept_under_its_cap(make_run: Any) -> None:
    run = make_run(
        pools={"main": {"max_memories": 20, "prune_by": "near-duplicates"}},
        continual={"min_new": 1000},
    )
    run.store.append(banking(0, 4))
    child = run.start()
    run.wait(child, lambda: run.store.stats("main").memories == 19)
    run.store.append(banking(4, 5))
    run.wait(child, lambda: run.store.stats("main").memories == 19)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 0
    assert run.store.stats("main").deleted == 24 + 6 - 19
    wrong = make_run(pools={"main": {"max_memories": 20, "prune_by": "luck"}})
    child = wrong.start()
    assert "pools.main.prune_by: no pruning policy 'luck'" in child.communicate(timeout=60)[1]
    assert child.returncode == 1
