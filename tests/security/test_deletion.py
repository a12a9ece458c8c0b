"""Deleting a memory reaches every place that its text has got to.

A marker in prompt, answer, metadata and a comment flows through the real programs: searched, mined
with candidates, cached, trained on, built, published, served, exported. Then it is deleted, and
every file of the run is searched for it, Parquet columns unpacked. Known exceptions, which nothing
here can reach: an export is its maker's; PostgreSQL keeps a deleted row until vacuum; vectors stay
in the generations on disk until those are pruned, and what weights have learned stays learned.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from memshare.config import load_config
from memshare.pool.store import PoolStore
from memshare.pool.transfer import export_jsonl
from memshare.retrieval.build import build_generation
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.serving import Query, Serving
from memshare.training.steps import Steps
from tests.loop import loop_config_file
from tests.retrieving import fill, make_config, open_store
from tests.tiny import tiny_encoder
from tests.training_runs import ROOT, load_program
from tests.unit.gateway.conftest import running

pytestmark = pytest.mark.slow
MARKER = "quixotryzebra"
SECTIONS: dict[str, Any] = {
    "pools": {"keep": {"threshold": 0}},
    "mining": {"labels": "likelihood", "candidates": 8, "dense_candidates": 4, "shard_rows": 8},
    "training": {"max_steps": 2, "batch_size": 4, "eval_every": 1, "checkpoint_every": 1},
    "split": {"held_out": 0.3},
    "gate": {"margin": 2.0, "resamples": 50, "max_queries": 6},
    "continual": {"poll_seconds": 0.05, "min_new": 1000},
    "wandb": {"mode": "disabled"},
}


def holders(folder: Path) -> set[str]:
    """Files under ``folder`` in which the marker can be read."""
    found = set()
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data += repr(pq.read_table(path).to_pylist()).encode()
        if MARKER.encode() in data:
            found.add(str(path.relative_to(folder)))
    return found


def items() -> list[dict[str, Any]]:
    topics = ["tea", "rain", "iron", "moss", "salt", "wool"]
    made = [
        {
            "pool": "keep",
            "prompt": f"{topics[n % 6]} question {n}",
            "answer": f"{topics[n % 6]} {n}",
        }
        for n in range(36)
    ]
    made[7] |= {
        "prompt": f"rain question {MARKER}",
        "answer": f"rain {MARKER}",
        "metadata": {"note": MARKER},
    }
    return made


def test_a_deleted_text_is_nowhere_any_more(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    models, run = tmp_path_factory.mktemp("models"), tmp_path / "run"
    with running(run, models, **SECTIONS) as client:
        file = loop_config_file(run, models, **SECTIONS)
        results = client.post("/v1/memories", json={"items": items()}).json()["results"]
        secret = results[7]["id"]
        opinion = {"value": "down", "comment": f"what is {MARKER}"}
        assert client.post(f"/v1/memories/{secret}/feedback", json=opinion).status_code == 200
        search = {"pool": "keep", "query": "rain question", "k": 36}

        def found() -> list[str]:
            reply = client.post("/v1/memories/search", json=search).json()
            return [memory["id"] for memory in reply["memories"]]

        assert secret in found()
        for program in ("mine", "contrastive", "index"):
            arguments = ["--config", str(file)]
            if program == "contrastive":
                arguments += ["--examples", str(run / "examples/000001"), "--output"]
                arguments += [str(run / "training/000001")]
                arguments += ["--encoder", str(models / "encoder")]
            assert load_program(ROOT / "train" / f"{program}.py").main(arguments) == 0, program
        until = time.monotonic() + 30
        while client.post("/v1/memories/search", json=search).json()["generation"] != 1:
            assert time.monotonic() < until, "the generation was not swapped in"
            time.sleep(0.05)
        with PoolStore.open(f"sqlite:///{run}/pool.db") as store:
            export_jsonl(store, "keep", tmp_path / "export.jsonl")
        before = holders(tmp_path)
        assert "export.jsonl" in before
        assert any(name.startswith("run/pool.db") for name in before)
        assert any(name.endswith(".parquet") for name in before)
        assert any("held_out" in name for name in before), "nothing held out saw it"

        assert client.delete(f"/v1/memories/{secret}").status_code == 200
        idle(file)
        assert secret not in found()
        assert client.get(f"/v1/memories/{secret}").status_code == 404
        until = time.monotonic() + 10  # a reader of the database at that moment delays it
        while "run/pool.db-wal" in holders(tmp_path) and time.monotonic() < until:
            time.sleep(0.1)
        assert holders(tmp_path) == {"export.jsonl"}
        with PoolStore.open(f"sqlite:///{run}/pool.db") as store:
            export_jsonl(store, "keep", tmp_path / "export.jsonl")
        assert holders(tmp_path) == set()


def idle(file: Path) -> None:
    """Let the continual loop look once for work, of which there is none."""
    config, stop = load_config(file), threading.Event()
    module = load_program(ROOT / "train" / "continual.py")
    with PoolStore.open(config.url) as store:
        steps = Steps(config, store, ROOT / "train", [], stop)
        thread = threading.Thread(target=module.loop, args=(config, store, steps, stop, False))
        thread.start()
        time.sleep(1.0)
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def test_what_is_deleted_while_an_index_is_built_is_not_in_service_later(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "encoder")
    config = make_config(tmp_path / "run", folder)
    with open_store(config) as store:
        memories = fill(store, "p", 30)
        encoder = Encoder.from_folder(folder, device="cpu")
        built = build_generation(store, config, encoder)
        gone, held = memories[3], memories[4]
        assert store.delete(gone.id) and store.hold(held.id)
        serving = Serving.of_built(encoder, built, store)
        serving.catch_up(store)
        (answer,) = serving.answer([Query("p", gone.prompt, 30)])
        ids = {hit.id for hit in answer.hits}
        assert ids == {memory.id for memory in memories} - {gone.id, held.id}
