"""train/contrastive.py with processes that see different data: told by all of them, and soon."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import tiny_encoder
from tests.training_data import example, examples, write_round
from tests.training_runs import PROGRAM, launch, options, result

# The program with other arguments on process 1.
WORKER = f"""
import os, runpy, sys
cut = sys.argv.index("--only-on-1")
more = sys.argv[cut + 1 :] if os.environ["RANK"] == "1" else []
sys.argv = [{str(PROGRAM)!r}, *sys.argv[1:cut], *more]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "other", "what"),
    [
        ([], ["--examples", "empty"], "examples"),
        (["--examples", "empty"], ["--examples", "some"], "examples"),
        ([], ["--examples", "others"], "examples"),
        ([], ["--set=training.towers=separate"], "training.towers"),
    ],
    ids=["one-empty", "main-empty", "other-examples", "more-weights"],
)
def test_processes_with_different_data_end_soon_and_say_so(
    tmp_path: Path, main: list[str], other: list[str], what: str
) -> None:
    some = examples(24)
    tiny_encoder(tmp_path / "encoder")
    write_round(tmp_path / "round-1", some)
    write_round(tmp_path / "some", some)
    # As many as `some`, of the same kinds: only their texts tell them apart.
    write_round(tmp_path / "others", examples(24, seed=1))
    write_round(tmp_path / "empty", [example("without candidates")])

    def here(arguments: list[str]) -> list[str]:
        return [word if word.startswith("-") else str(tmp_path / word) for word in arguments]

    output, worker = tmp_path / "out", tmp_path / "worker.py"
    worker.write_text(WORKER)
    arguments = [*options(tmp_path, output, *here(main), steps=4), "--only-on-1", *here(other)]
    with launch(2, worker, arguments) as process:
        try:
            _, errors = process.communicate(timeout=120)
        finally:
            process.terminate()  # a launcher that waits for processes that wait ends them
    assert process.returncode != 0
    told = f"processes [1] see other {what} than process 0"
    assert errors.count(f"error: {told}") == 2, errors
    assert result(output)["status"] == "failed" and told in str(result(output)["error"])
    assert not (output / "encoder").exists() and not (output / "checkpoints").exists()
