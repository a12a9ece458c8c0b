"""What finished rounds leave on the disk: figures for good, weights as long as anything reads them.

A training's ``encoder`` and ``checkpoints`` take up to 36 bytes a weight, and there is one a round
and iteration. A published generation has its own copy of the encoder, so that only these are read
again: the last round's, by whoever indexes or looks at it by hand; that of the encoder that serves,
whose optimizer state a round may start from (``training.warm_optimizer``), and then also those of
the generations that a roll-back could put in its place.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from memshare.config import Config
from memshare.progress import log
from memshare.retrieval.manifest import DamagedGeneration, first_with
from memshare.retrieval.shelf import numbers, read_current
from memshare.training.journal import Journal
from memshare.training.rounds import training_dir

_WEIGHTS = ("checkpoints", "encoder")


def delete_weights(config: Config, journal: Journal) -> None:
    """Delete the weights of finished rounds' trainings that nothing will read.

    Only of rounds in the ``journal``: what was trained by hand is not the loop's to delete. What
    can't be deleted is logged, and tried again at the next call.
    """
    try:
        kept = _read_again(config, journal)
    except (DamagedGeneration, OSError) as error:  # then nobody knows what serves
        log(f"the weights of finished rounds are kept for now: {error}")
        return
    now = journal.open_round
    named = [config.encoder.model, *((now.encoder, now.warm or "") if now else ())]
    for item in journal.rounds:
        folder = training_dir(config.run.dir, item.number)
        if item is now or item.number in kept or any(_is_in(folder, name) for name in named):
            continue
        for path in _weights(folder):
            try:
                shutil.rmtree(path)
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
    """What there is of them in a round's folder: the first iteration's, and later ones'."""
    for name in _WEIGHTS:
        yield from folder.glob(name)
        yield from folder.glob(f"iteration-*/{name}")


def _is_in(folder: Path, name: str) -> bool:
    """Whether ``name`` is a path into ``folder``."""
    return bool(name) and Path(name).resolve().is_relative_to(folder.resolve())
