"""train/index.py after a run of the same round that was killed once it had decided."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from memshare.retrieval.generation import current, verify_generation
from memshare.retrieval.manifest import folder_name
from tests.retrieving import fill, make_config, open_store
from tests.tiny import tiny_encoder
from tests.training_runs import ROOT, load_program


def test_a_round_is_published_once_and_a_damaged_generation_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path / "run", tiny_encoder(tmp_path / "encoder"))
    with open_store(config) as store:
        fill(store, "p", 5)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    program = load_program(ROOT / "train" / "index.py")

    def index(number: int) -> int:
        words = ["--encoder", "frozen", "--no-gate", "--round", str(number)]
        assert program.main(["--config", str(file), *words]) == 0
        outcome = json.loads(capsys.readouterr().out)
        assert (outcome["outcome"], outcome["round"]) == ("published", number)
        return int(outcome["generation"])

    def metrics(generation: int) -> Path:
        return config.generations_dir / "main" / folder_name(generation) / "metrics.json"

    assert [index(number) for number in (1, 2, 1)] == [1, 2, 1]
    metrics(2).write_text(metrics(2).read_text()[:8])
    assert [index(number) for number in (1, 2)] == [1, 3]
    verify_generation(config.generations_dir, "main", 3)
    metrics(3).unlink()
    assert index(1) == 1
    assert current(config.generations_dir, "main") == 3  # nothing more was published
