"""What finished rounds leave on the disk: weights as long as anything reads them, the rest longer.

A training's ``encoder`` and ``checkpoints`` take up to 36 bytes a weight, and there is one a round
and iteration. A published generation has its own copy of the encoder, so that only these are read
again: the last round's, by whoever indexes or looks at it by hand; that of the encoder that serves,
whose optimizer state a round may start from (``training.warm_optimizer``), and then also those of
the generations that a roll-back could put in its place. Examples, figures and logs stay, unless
``continual.keep_rounds`` says of how many rounds: they are what experiments by hand begin with.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from memshare.config import Config
from memshare.progress import log
from memshare.retrieval.manifest import DamagedGeneration, first_with
from memshare.retrieval.shelf import numbers, read_current
from memshare.training.examples import round_dir
from memshare.training.iterations import iteration_dirs
from memshare.training.journal import Journal
from memshare.training.rounds import training_dir

_WEIGHTS = ("checkpoints", "encoder")


def delete_leftovers(config: Config, journal: Journal) -> None:
    """Delete the weights that nothing will read, and whatever is older than ``keep_rounds``.

    Only of finished rounds in the ``journal``: what was mined or trained by hand is not the loop's
    to delete. What can't be deleted is logged, and tried again at the next call.
    """
    try:
        kept = _read_again(config, journal)
    except (DamagedGeneration, OSError) as error:  # then nobody knows what serves
        log(f"the weights of finished rounds are kept for now: {error}")
        return
    now, keep = journal.open_round, config.continual.keep_rounds
    named = [config.encoder.model, *((now.encoder, now.warm or "") if now else ())]
    done = [item for item in journal.rounds if item is not now]
    for place, item in enumerate(done, start=1):
        folder = training_dir(config.run.dir, item.number)
        old = keep is not None and place <= len(done) - keep
        if old:
            _delete(round_dir(config.examples_dir, item.number))
            for path in (config.run.dir / "logs").glob(f"round-{item.number:06d}-*.log"):
                _delete(path)
        if item.number not in kept and not any(_is_in(folder, name) for name in named):
            for path in [folder] if old else list(_weights(folder)):
                _delete(path)


def _delete(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, if it is there."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log(f"{path}: can't be deleted ({error}); the loop goes on")


def _read_again(config: Config, journal: Journal) -> set[int]:
    """Numbers of the rounds whose weights may be read again."""
    home = config.retriever_dir
    serving, _ = read_current(home)
    served = {serving, *(numbers(home) if config.training.warm_optimizer else ())}
    brought = {first_with(home, number) for number in served if number is not None}
    sources = [journal.published_by(number) for number in brought]
    trained = [item.number for item in journal.rounds if item.outcome in ("published", "rejected")]
    return {*trained[-1:], *(item.number for item in sources if item is not None)}


def _weights(folder: Path) -> Iterator[Path]:
    """What there may be of them in a round's folder: the first iteration's, and later ones'."""
    yield from (path / name for path in iteration_dirs(folder) for name in _WEIGHTS)


def _is_in(folder: Path, name: str) -> bool:
    """Whether ``name`` is a path into ``folder``."""
    return bool(name) and Path(name).resolve().is_relative_to(folder.resolve())
