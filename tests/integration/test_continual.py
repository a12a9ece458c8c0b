"""The continual loop with its real programs: killed, interrupted, restarted, without a database."""

from __future__ import annotations

import signal
from contextlib import closing
from typing import Any

import pytest

from memshare.retrieval.encoder import Encoder
from memshare.retrieval.generation import current, generations, verify_generation
from memshare.training.examples import read_examples, read_training, round_dir
from tests.continual_runs import DATA, Said, banking
from tests.postgres import PostgresServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"MEMSHARE_DATA: no {DATA}"),
]


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
    home = run.config.retriever_dir
    assert [item.number for item in generations(home)] == [1] == [current(home)]
    verify_generation(home, 1)
    assert done["results"]["index"]["gate"]["queries"] > 0
    card = (home / "000001" / "encoder" / "README.md").read_text()
    examples = done["results"]["train"]["examples"]
    assert f"on {examples} examples\n({examples} of pool main)" in card
    assert "labelled by given (scorer: given:label)" in card
    assert f"On {done['results']['index']['gate']['queries']} held-out questions" in card
    assert not any(memory.prompt in card for memory in run.store.iter("main"))

    # the second round: new memories, a deleted one erased, warm start from what serves
    gone = next(read_examples(first)).query_id
    run.store.delete(gone)
    run.store.append(banking(8, 16))
    child = run.start()
    errors = child.communicate(timeout=150)[1]
    assert child.returncode == 0, errors
    second = run.rounds()[1]
    assert second["outcome"] == "published" and second["number"] == 2
    assert second["encoder"] == str(home / "000001" / "encoder")
    assert second["spans"]["main"]["since"] == done["spans"]["main"]["until"]
    mined = list(read_training([first, round_dir(run.config.examples_dir, 2)]))
    assert gone not in {row.query_id for row in mined}
    assert gone not in {item.id for row in mined for item in row.candidates}
    assert current(home) == 2
    assert generations(home)[-1].positions["main"] == run.store.last_seq("main")
    # the generation that served proposed, and earlier memories were mined again
    assert (done["results"]["mine"]["proposer"], second["results"]["mine"]["proposer"]) == (0, 1)
    again = second["results"]["mine"]["replayed"]
    assert again == round(0.5 * (second["results"]["mine"]["examples"] - again)) > 0
    # the memory tower stayed the configured encoder's, and each round kept its best step
    frozen = Encoder.load(run.config.encoder).memory_fingerprint()
    assert {item.memory_fingerprint for item in generations(home)} == {frozen}
    for round_ in run.rounds():
        evaluation = round_["results"]["train"]["evaluation"]
        assert evaluation["queries"] > 0
        assert evaluation["best"]["nDCG@10"] >= evaluation["start"]["nDCG@10"]
        verify_generation(home, round_["number"])
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
    gone = next(read_examples(again)).query_id
    run.store.delete(gone)
    run.store.append(banking(8, 16))
    child = run.start("--once", "--set", "mining.iterations=1")
    errors = child.communicate(timeout=150)[1]
    assert child.returncode == 0, errors
    for folder in (again.parent, again):
        assert gone not in {row.query_id for row in read_examples(folder)}
    assert run.rounds()[1]["warm"] == str(home / "iteration-2")
    said = (run.folder / "logs" / "round-000002-train.log").read_text()
    last = home / "iteration-2" / "checkpoints" / "step-00000004"
    assert f"the optimizer goes on from {last}, with the state of " in said


def test_an_interrupted_training_starts_afresh_with_other_settings(make_run: Any) -> None:
    """And goes on with those that change nothing of it, or its memory alone."""
    run = make_run(training={"max_steps": 100_000})
    run.store.append(banking(0, 8))
    log_file = run.folder / "logs" / "round-000001-train.log"
    saved = run.folder / "training" / "000001" / "checkpoints"
    child = run.start("--once")
    run.wait(child, lambda: any(saved.glob("step-*")))
    child.send_signal(signal.SIGTERM)
    assert "stopped" in child.communicate(timeout=60)[1]
    free = ("--set", "training.log_every=1", "--set", "training.batch_tokens=512")
    child = run.start("--once", *free)
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
    assert said.count("continuing from") == said.count("made with other settings") == 1
    assert "are done; since then:\n  training.batch_tokens: 4096 -> 512\n" in said
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
