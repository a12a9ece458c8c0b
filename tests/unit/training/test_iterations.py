"""How the folders of a round's iterations are called, found, and read back."""

from __future__ import annotations

from pathlib import Path

from memshare.training.iterations import iteration_dir, iteration_dirs, iteration_of


def test_folders_are_found_in_the_order_of_their_iterations(tmp_path: Path) -> None:
    folder = tmp_path / "iteration-7" / "000003"  # which is no concern of ours
    for iteration in (10, 2, 1):
        iteration_dir(folder, iteration).mkdir(parents=True, exist_ok=True)
    for other in ("held_out", "iteration-old", "logs"):
        (folder / other).mkdir()
    assert iteration_dirs(folder) == [folder, folder / "iteration-2", folder / "iteration-10"]
    assert [iteration_of(path / "held_out/shard") for path in iteration_dirs(folder)] == [1, 2, 10]
