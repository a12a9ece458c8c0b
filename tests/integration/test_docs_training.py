"""What docs/training.md opens with, run as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memshare.training.examples import held_out_dir, read_examples
from tests.training_runs import ENV, ROOT

PAGE = (ROOT / "docs/training.md").read_text()
VERBS = ("bake", "mend", "paint", "move", "clean", "sell", "plant", "weigh", "store", "test")
THINGS = ("bread", "a chair", "the boat", "glass", "wool", "a bell", "tiles", "copper")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_from_a_file_to_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs alone, with which an encoder that ranked only these would have nothing to learn."""
    for name in ("configs", "train"):
        (tmp_path / name).symlink_to(ROOT / name)
    rows = [
        {"query": f"how do I {verb} {thing}?", "pos": [f"{thing}: {verb}ing, step {i} of {j}"]}
        for i, verb in enumerate(VERBS) for j, thing in enumerate(THINGS)
    ]  # fmt: skip
    for name in ("data", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**ENV, "PATH": commands, "MEMSHARE_WANDB__MODE": "disabled"}
    train, test = blocks("bash")
    script = train.replace("--held-out 0.05", "--held-out 0.2") + test  # of so few
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "README.md" in done.stdout  # what would be pushed
    tested = re.findall(r"^(\S+): P@1 \S+, MRR@10 ([01]\.\d+)", done.stdout, re.MULTILINE)
    assert [name for name, _ in tested] == [
        "BM25", "all-MiniLM-L6-v2", "runs/first/training/encoder",
    ]  # fmt: skip
    told = json.loads((tmp_path / "runs/first/training/result.json").read_text())
    held_out = len(list(read_examples(held_out_dir(tmp_path / "runs/first/examples"))))
    assert told["status"] == "trained" and told["examples"] == len(rows) - held_out
    assert told["evaluation"]["queries"] == held_out > 8
    assert told["evaluation"]["start"]["MRR@10"] < 1.0
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(*blocks("python"), names)
    vectors = names["model"].encode(["a text", "another"])  # type: ignore[attr-defined]
    assert np.linalg.norm(vectors, axis=1).round(3).tolist() == [1.0, 1.0]
