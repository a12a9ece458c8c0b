"""What is deleted of finished rounds' trainings, and what is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from memshare.config import Config, load_config
from memshare.retrieval.manifest import folder_name
from memshare.training.examples import round_dir
from memshare.training.journal import Journal, Round
from memshare.training.leftovers import delete_leftovers
from memshare.training.rounds import latest_encoder, training_dir
from tests.training_runs import refreshed

Make = Callable[..., Config]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Seven trainings of two iterations; generation 1 is of round 1, and 2, of round 3, serves."""

    def run(*settings: str) -> Config:
        config = load_config(None, [f"run.dir={tmp_path}", *settings])
        for folder in (training_dir(tmp_path, n, i) for n in range(1, 8) for i in (1, 2)):
            for name in ("encoder", "checkpoints/step-00000004"):
                (folder / name).mkdir(parents=True)
                (folder / name / "model.safetensors").write_text("weights")
            for name in ("result.json", "log.jsonl", "index.json"):
                (folder / name).write_text("{}")
        home = config.retriever_dir
        for number in (1, 2):
            (home / folder_name(number)).mkdir(parents=True)
        (home / "CURRENT").write_text("2\n")
        return config

    return run


def finished(number: int, generation: int | None = None) -> Round:
    outcome = "rejected" if generation is None else "published"
    return Round(number, {}, "start", "done", outcome, {"index": {"generation": generation}})


JOURNAL = Journal((finished(1, 1), finished(2), finished(3, 2), finished(4), finished(5)))


def left(config: Config) -> set[int]:
    """Rounds that have all their weights; all others have none, and every one its figures."""
    home = config.run.dir / "training"
    assert len([*home.rglob("*.json*")]) == 7 * 2 * 3
    found = [path.relative_to(home).parts[0] for path in home.rglob("model.safetensors")]
    assert all(found.count(name) == 4 for name in found)
    assert len([*home.rglob("encoder")]) == len([*home.rglob("checkpoints")]) == len(found) / 2
    return {int(name) for name in found}


def test_weights_are_kept_of_the_last_round_and_of_what_serves(make: Make) -> None:
    config = make()
    delete_leftovers(config, JOURNAL)
    assert left(config) == {3, 5, 6, 7}  # 6 and 7 are none of this journal's
    delete_leftovers(config, JOURNAL)
    assert left(config) == {3, 5, 6, 7}


def test_the_training_of_an_encoder_that_serves_with_newer_rows_is_kept(make: Make) -> None:
    config = make()
    home = config.retriever_dir
    refreshed(home, 3, origin=2)
    (home / "CURRENT").write_text("3\n")
    delete_leftovers(config, JOURNAL)
    assert left(config) == {3, 5, 6, 7}


def test_a_round_that_trained_nothing_is_not_the_last_one(make: Make) -> None:
    config = make()
    for number in (6, 7):
        shutil.rmtree(training_dir(config.run.dir, number))
    empty = Round(6, {}, "start", "done", "empty")
    delete_leftovers(config, Journal((*JOURNAL.rounds, empty)))
    assert latest_encoder(config.run.dir).is_relative_to(training_dir(config.run.dir, 5))


def test_a_warm_optimizer_may_need_those_of_a_roll_back(make: Make) -> None:
    config = make("training.warm_optimizer=true")
    delete_leftovers(config, JOURNAL)
    assert left(config) == {1, 3, 5, 6, 7}
    shutil.rmtree(config.retriever_dir / folder_name(1))
    delete_leftovers(config, JOURNAL)
    assert left(config) == {3, 5, 6, 7}


def test_a_round_under_way_keeps_what_it_reads(make: Make) -> None:
    config = make()
    warm = str(training_dir(config.run.dir, 1, 2))
    encoder = str(training_dir(config.run.dir, 2) / "encoder")
    delete_leftovers(config, JOURNAL.begin(Round(6, {}, encoder, step="train", warm=warm)))
    assert left(config) == {1, 2, 3, 5, 6, 7}


def test_the_configured_encoder_is_kept(make: Make) -> None:
    config = make()
    model = training_dir(config.run.dir, 4) / "encoder"
    encoder = config.encoder.model_copy(update={"model": str(model)})
    delete_leftovers(config.model_copy(update={"encoder": encoder}), JOURNAL)
    assert left(config) == {3, 4, 5, 6, 7}


def test_what_cannot_be_deleted_is_told_and_tried_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a kill on the way, it leaves the rest to the next call."""
    config = make()
    stuck = training_dir(config.run.dir, 2) / "checkpoints"
    remove = shutil.rmtree

    def fails(path: Path) -> None:
        if path == stuck:
            raise PermissionError(13, "Permission denied", str(path))
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fails)
        delete_leftovers(config, JOURNAL)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{stuck}: can't be deleted" in line and "Permission denied" in line
    assert stuck.exists() and not (stuck.parent / "encoder").exists()
    delete_leftovers(config, JOURNAL)
    assert left(config) == {3, 5, 6, 7}


def test_nothing_is_deleted_while_nobody_knows_what_serves(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make()
    (config.retriever_dir / "CURRENT").write_text("torn")
    delete_leftovers(config, JOURNAL)
    assert left(config) == {1, 2, 3, 4, 5, 6, 7}
    assert "kept for now" in capsys.readouterr().err


def test_nothing_but_what_is_read_again_stays_of_rounds_older_than_those_kept(
    make: Make, tmp_path: Path
) -> None:
    config = make("continual.keep_rounds=2")
    for number in range(1, 8):
        (round_dir(config.examples_dir, number) / "held_out").mkdir(parents=True)
        (tmp_path / "logs").mkdir(exist_ok=True)
        (tmp_path / "logs" / f"round-{number:06d}-mine.log").write_text("")
    under_way = Round(6, {}, str(training_dir(tmp_path, 1) / "encoder"), "train")
    for journal in (JOURNAL, Journal((*JOURNAL.rounds, under_way))):
        delete_leftovers(config, journal)
        logs = sorted(path.name for path in (tmp_path / "logs").iterdir())
        assert logs == [f"round-{number:06d}-mine.log" for number in (4, 5, 6, 7)]
        assert names(config.examples_dir) == [4, 5, 6, 7]
        # 3 has brought the encoder that serves.
        assert names(tmp_path / "training") == [3, 4, 5, 6, 7]
    assert not [*training_dir(tmp_path, 4).rglob("encoder")]


def names(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir())
