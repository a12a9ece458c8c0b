"""A round's iterations, each with a folder among its examples and one among its trainings.

The first one's is the round's own, ``000003``; later ones' are inside it: ``000003/iteration-2``.
"""

from __future__ import annotations

from pathlib import Path

_NAME = "iteration-"


def iteration_dir(folder: Path, iteration: int) -> Path:
    """The folder of an iteration (1, 2, ...) of the round in ``folder``."""
    return folder if iteration == 1 else folder / f"{_NAME}{iteration}"


def iteration_dirs(folder: Path) -> list[Path]:
    """Those of the round in ``folder`` that are there, the first iteration's first."""
    later = [path for path in folder.glob(f"{_NAME}*") if iteration_of(path) > 1]
    return [folder, *sorted(later, key=iteration_of)]


def round_of(folder: Path) -> Path:
    """The folder of the round whose iteration has ``folder``."""
    return folder.parent if folder.name.startswith(_NAME) else folder


def iteration_of(path: Path) -> int:
    """Which iteration the file or folder ``path`` of a round belongs to."""
    for name in (each.name for each in (path, *path.parents)):
        number = name.removeprefix(_NAME)
        if number.isdecimal():  # with nothing before it, it is the round's, and all above is none's
            return 1 if number == name else int(number)
    return 1
