"""Training within an experiment: the trainer's own steps, and its checks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memshare.config import load_config
from memshare.evaluation import learn
from memshare.evaluation.learn import train_encoder
from memshare.retrieval.encoder import Encoder
from memshare.training.select import select
from memshare.training.step_result import NonFinite
from tests.loop import loop_config
from tests.tiny import tiny_encoder
from tests.training_data import examples, unlearnable


def test_an_encoder_learns(tmp_path: Path) -> None:
    before = Encoder.from_folder(tiny_encoder(tmp_path / "encoder"), "cpu")
    settings = ["training.max_steps=3", "training.lr=1e-3", f"encoder.model={tmp_path}/encoder"]
    config = load_config(None, settings)
    after, report = train_encoder(config, select(examples(20), config.training).items)
    assert report["steps"] == 3 and report["loss"] > 0
    queries = [encoder.encode_queries(["a question"]) for encoder in (before, after)]
    assert np.abs(queries[0] - queries[1]).max() > 1e-3


def test_what_teaches_nothing_leaves_the_encoder_as_it_came(tmp_path: Path) -> None:
    before = Encoder.from_folder(tiny_encoder(tmp_path / "encoder"), "cpu").model.state_dict()
    settings = ["training.max_steps=3", "training.lr=1e-3", f"encoder.model={tmp_path}/encoder"]
    config = load_config(None, settings)
    encoder, report = train_encoder(config, select(unlearnable(5), config.training).items)
    assert report == {"steps": 3, "skipped_steps": 3, "loss": 0.0}
    after = encoder.model.state_dict()
    assert all(after[name].equal(value) for name, value in before.items())


def test_rewards_by_another_rubric_teach_another_encoder(tmp_path: Path) -> None:
    """A trained encoder is kept by all that decides it; likelihoods know no rubric."""
    rubric = tmp_path / "rubric.md"

    def name(labels: str, text: str) -> str:
        rubric.write_text(text)
        pools = {"keep": {"rubric": str(rubric)}}
        sections = {"mining": {"labels": labels}, "scorer": {"kind": "rubric"}, "pools": pools}
        return learn._name(loop_config(tmp_path / "run", tmp_path, **sections), {"keep": []})

    assert name("reward", "# Good?") == name("reward", "# Good?") != name("reward", "# True?")
    assert name("likelihood", "# Good?") == name("likelihood", "# True?")


@pytest.mark.parametrize(("steps", "failed"), [(1, "step 1: what the encoder gives"), (3, "step")])
def test_weights_that_are_no_good_are_found_whichever_step_made_them(
    tmp_path: Path, steps: int, failed: str
) -> None:
    """Those of the last step, too, which no further step judges."""
    tiny_encoder(tmp_path / "encoder")
    settings = ["training.lr=1e38", f"training.max_steps={steps}"]
    config = load_config(None, [*settings, f"encoder.model={tmp_path}/encoder"])
    with pytest.raises(NonFinite, match=failed):
        train_encoder(config, select(examples(20), config.training).items)
