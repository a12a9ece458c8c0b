"""A new index for the encoder that serves, after a round that has published none of its own.

A round whose encoder is rejected publishes nothing, and one without examples has nothing to. What
came to the pools since the last publication would be encoded again at every start of a gateway, and
by every round's mining and gate, for as long as rounds end so; and that may be for good, once an
encoder has learned what there is to learn.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from memshare.config import Config
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.retrieval.build import build_generation
from memshare.retrieval.generation import best, load
from memshare.retrieval.history import goes_on
from memshare.retrieval.manifest import GenerationError, first_with, folder_name, read_manifest
from memshare.retrieval.publish import publish
from memshare.retrieval.serving import MAX_DELTA
from memshare.retrieval.shelf import discard, locked, numbers, read_current


def refresh(store: PoolStore, config: Config) -> int | None:
    """Publish CURRENT's encoder again, over today's memories; the new generation's number.

    Only where the pools' logs are more than `MAX_DELTA` changes ahead of it: fewer are no trouble.
    There is nothing to judge, since readers add what an index lacks by the same encoder. Vectors
    are copied as `build_generation` copies them. Of this encoder's generations only the last two
    are left, so that `retriever.keep` goes on counting encoders, near enough.

    None where there is no need, or nothing was ever published, so that the configured encoder
    serves, or an operator has pinned CURRENT. Raises `EncoderError`, `GenerationError`, `PoolError`
    and `OSError`; CURRENT stays as it is.
    """
    home = config.retriever_dir
    number, pinned = read_current(home)
    if number is None or pinned or _changes(store, config, number) <= MAX_DELTA:
        return None
    fresh = _publish(store, config, number)
    log(f"published generation {fresh}: the encoder of {number}, with today's memories")
    try:
        _retire(home, number)
    except (GenerationError, OSError) as error:
        log(f"{home.name}: older indexes of this encoder could not be deleted: {error}")
    return fresh


def _changes(store: PoolStore, config: Config, number: int) -> int:
    """How many there were in the served pools since generation ``number`` read their logs."""
    manifest = read_manifest(config.retriever_dir / folder_name(number))
    count = 0
    for pool in config.served_pools:
        since = manifest.positions.get(pool, 0)
        if not goes_on(store, pool, since, manifest.marks.get(pool)):
            since = 0  # a restored database: readers read all of it
        count += store.last_seq(pool) - since
    return count


def _publish(store: PoolStore, config: Config, number: int) -> int:
    home = config.retriever_dir
    began, same = time.monotonic(), _same(home, number)
    champion = best(home)
    with load(home, number, config.encoder.device, rows=False) as generation:
        metrics = json.loads((generation.folder / "metrics.json").read_text(encoding="utf-8"))
        encoder = generation.encoder
        encoder.compute_as(config.encoder)
        built = build_generation(store, config, encoder)
        metrics |= {"build_seconds": time.monotonic() - began, "created": time.time()}
        return publish(
            home, encoder=encoder, **built.parts(), metrics=metrics, parent=number,
            keep=config.retriever.keep + len(same),  # one of them is left
            best=None if champion in same else champion, index=config.retriever.index,
            origin=generation.manifest.origin or number,
        )  # fmt: skip


def _same(home: Path, number: int) -> list[int]:
    """The generations of generation ``number``'s encoder, oldest first."""
    first = first_with(home, number)
    return [other for other in numbers(home) if first_with(home, other) == first]


def _retire(home: Path, number: int) -> None:
    """Delete the generations of ``number``'s encoder before it; it was current until now.

    So it is in use: by readers, and by a round that trains its encoder further.
    """
    with locked(home):
        held, _ = read_current(home)
        for older in _same(home, number):
            if older < number and older != held:
                discard(home, older)
