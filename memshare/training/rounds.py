"""What a round of continual training reads and leaves: spans of the change log, and its folders.

A round covers what came since the one before (`open_spans`), or since mining by hand. Its examples
are in ``examples/<round>``, its training in ``training/<round>``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from memshare.config import Config
from memshare.files import write_json
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.retrieval.errors import EncoderError
from memshare.retrieval.manifest import first_with, folder_name
from memshare.retrieval.shelf import read_current
from memshare.training.examples import read_marker, round_dir, round_dirs
from memshare.training.iterations import iteration_dirs
from memshare.training.journal import Journal, Round, Span, read_spans
from memshare.training.shard import ExamplesError

_PAGE = 10_000


def last_mined(examples_dir: Path, pools: Sequence[str]) -> tuple[int, dict[str, int]]:
    """Number of the last finished round of mining (0: none), and the position of ``pools`` then.

    The last round first, and no more of them than it takes: a loop looks every few seconds.
    """
    positions: dict[str, int] = {}
    number = 0
    for folder in reversed(round_dirs(examples_dir)):
        marker = read_marker(folder)
        try:
            number = number or int(marker["round"])
            found = read_spans(marker["spans"]).items()
        except (KeyError, TypeError, ValueError) as error:
            raise ExamplesError(f"{folder}: its marker names no round or spans") from error
        positions = {name: span.until for name, span in found} | positions
        if positions.keys() >= set(pools):
            break
    return number, {pool: positions[pool] for pool in pools if pool in positions}


def last_begun(examples_dir: Path) -> int:
    """Number of the last round that mining has begun, finished or not (0: none)."""
    return max((int(path.parent.name) for path in examples_dir.glob("[0-9]*/plan.json")), default=0)


def new_ids(store: PoolStore, pool: str, span: Span) -> list[str]:
    """Ids of the memories that were added or released within ``span``, first come first.

    Some may have been deleted or put on hold since.
    """
    found: dict[str, None] = {}
    since = span.since
    while since < span.until:
        page = store.changes(pool, since, _PAGE)
        for change in page:
            if change.seq <= span.until and change.kind in ("add", "release"):
                found.setdefault(change.id)
        if len(page) < _PAGE:
            break
        since = page[-1].seq
    return list(found)


def count_new(
    store: PoolStore, positions: Mapping[str, int], pools: Sequence[str], need: int = 1
) -> int:
    """How many memories came since ``positions``, over all ``pools``; 0 if fewer than ``need``.

    The logs are read only once they are long enough, so that waiting costs next to nothing.
    """
    spans = open_spans(store, positions, pools)
    if sum(span.until - span.since for span in spans.values()) < need:
        return 0
    found = sum(len(new_ids(store, pool, span)) for pool, span in spans.items())
    return found if found >= need else 0


def open_spans(
    store: PoolStore, positions: Mapping[str, int], pools: Sequence[str]
) -> dict[str, Span]:
    """From ``positions`` to each pool's present end.

    A pool whose log ends before its position is another one than was mined, or restored from a
    backup: it counts from its beginning, since nothing tells how much of it is known.
    """
    ends = {pool: store.last_seq(pool) for pool in pools}
    begins = {pool: positions.get(pool, 0) for pool in pools}
    return {pool: Span(begins[pool] if begins[pool] <= end else 0, end)
            for pool, end in ends.items()}  # fmt: skip


def training_dir(run_dir: Path, number: int, iteration: int = 1) -> Path:
    """Where an iteration of round ``number`` keeps its checkpoints, encoder and results."""
    return round_dir(run_dir / "training", number, iteration)


def latest_encoder(run_dir: Path) -> Path:
    """The encoder that training wrote last. Raises `EncoderError` if there is none."""
    rounds = sorted((run_dir / "training").glob("[0-9]*"))
    trained = (path / "encoder" for folder in rounds for path in iteration_dirs(folder))
    found = [path for path in trained if path.exists()]
    if not found:
        raise EncoderError(
            f"{run_dir / 'training'}: no trained encoder; run train/contrastive.py, or give "
            "--encoder FOLDER (`frozen`: the configured one)"
        )
    return found[-1]


def covered(config: Config, journal: Journal) -> dict[str, int]:
    """Up to where each pool is mined already, by the loop or by hand."""
    pools, begun = config.served_pools, journal.positions
    mined = last_mined(config.examples_dir, pools)[1]
    return {pool: max(begun.get(pool, 0), mined.get(pool, 0)) for pool in pools}


def next_round(config: Config, store: PoolStore, journal: Journal) -> Round:
    """The round over all that is new; it trains the encoder that serves on."""
    numbers = [item.number for item in journal.rounds]
    number = max([*numbers, last_begun(config.examples_dir)]) + 1
    known = covered(config, journal)
    spans = open_spans(store, known, config.served_pools)
    for pool in (pool for pool, span in spans.items() if span.since < known[pool]):
        log(
            f"{pool}: mined up to {known[pool]}, and its log ends at {spans[pool].until}: it was "
            "restored, or is another one; all of it is mined again"
        )
    encoder, warm = _beginning(config, journal)
    return Round(number, spans, encoder, iterations=config.mining.iterations, warm=warm)


def with_encoder(config: Config, journal: Journal) -> Journal:
    """``journal`` as it is, unless the folder that its open round has yet to train from is gone.

    Whoever publishes by hand meanwhile deletes old generations, and a run folder may be moved. The
    round trains what serves now instead; it would fail at every start.
    """
    now = journal.open_round
    if now is None or now.step == "index" or may_be_there(now.encoder):
        return journal
    encoder, warm = _beginning(config, journal)
    if encoder != now.encoder:
        log(f"round {now.number}: {now.encoder} is gone; it trains {encoder}, which serves now")
    return Journal((*journal.rounds[:-1], replace(now, encoder=encoder, warm=warm)))


def without_unserved(config: Config, journal: Journal) -> Journal:
    """``journal`` as it is, unless its open round is to mine pools that are served no more.

    They leave the round, which would fail at every start, and are as new to a later one that has
    them again.
    """
    now = journal.open_round
    if now is None or now.step != "mine" or now.spans.keys() <= set(config.served_pools):
        return journal
    spans = {pool: span for pool, span in now.spans.items() if pool in config.served_pools}
    log(f"round {now.number}: without {sorted(now.spans.keys() - spans)}, served no more")
    return Journal((*journal.rounds[:-1], replace(now, spans=spans)))


def _beginning(config: Config, journal: Journal) -> tuple[str, str | None]:
    """The encoder that serves, and the training that brought it where its optimizer goes on."""
    home = config.retriever_dir
    serving, _ = read_current(home)
    encoder, source = config.encoder.model, None
    if serving is not None:
        encoder = str(home / folder_name(serving) / "encoder")
        source = journal.published_by(first_with(home, serving))
    warm = None
    if config.training.warm_optimizer and source is not None:
        # Of the iteration that trained it: the last one may have found nothing to learn from.
        warm = str(Path(source.results["index"]["encoder"]).parent)
    return encoder, warm


def may_be_there(name: str) -> bool:
    """Whether an encoder is a folder that is there, or may be one of the hub's (``org/model``)."""
    path = Path(name).expanduser()
    return path.is_dir() or not (path.is_absolute() or len(path.parts) > 2)


def forget_stale_checkpoints(output: Path, examples: Path) -> bool:
    """Delete the checkpoints in ``output`` if its examples changed since the last call.

    Deleting a memory changes them; what was learned from it must not be continued. Returns whether
    they were stale.
    """
    shards = sorted(examples.rglob("shard-*.parquet"))  # held-out ones choose the best step
    stamps = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in shards]
    inputs = {"examples": hashlib.sha256("\n".join(stamps).encode()).hexdigest()}
    path = output / "inputs.json"
    stale = path.exists() and json.loads(path.read_text(encoding="utf-8")) != inputs
    if stale:
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    write_json(path, inputs)
    return stale
