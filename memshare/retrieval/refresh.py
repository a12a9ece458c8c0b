"""A new index for the encoder that serves, after a round whose own encoder was rejected.

A rejection publishes nothing. What came to the pools since the last publication would be encoded
again at every start of a gateway, and by every round's mining and gate, for as long as encoders are
rejected; and that is the rule once an encoder has learned what there is to learn.
"""

from __future__ import annotations

import json
import time

from memshare.config import Config
from memshare.pool.errors import PoolError
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.retrieval.build import build_generation
from memshare.retrieval.encoder import EncoderError
from memshare.retrieval.generation import GenerationError, best, generations, load
from memshare.retrieval.manifest import folder_name, read_manifest
from memshare.retrieval.publish import publish
from memshare.retrieval.serving import MAX_DELTA
from memshare.retrieval.shelf import discard, home_of, locked, read_current


def refresh(store: PoolStore, config: Config) -> int | None:
    """Publish CURRENT's encoder again, over today's memories; the new generation's number.

    Only where the pools' logs are more than `MAX_DELTA` changes ahead of it: fewer are no trouble.
    There is nothing to judge, since readers add what an index lacks by the same encoder. Vectors
    that CURRENT holds are copied. Older generations of this encoder are of no more use and go, so
    that `retriever.keep` goes on counting encoders.

    None where nothing was published, or an operator has pinned CURRENT, or it fails, which the log
    says: the round has ended by then.
    """
    root, name = config.generations_dir, config.retriever.name
    try:
        number, pinned = read_current(home_of(root, name))
        if number is None or pinned or _changes(store, config, number) <= MAX_DELTA:
            return None
        fresh = _publish(store, config, number)
        _retire(config, fresh)
    except (EncoderError, GenerationError, PoolError) as error:
        log(f"the index of the current generation stays as it is: {error}")
        return None
    log(f"published generation {fresh}: the encoder of {number}, with today's memories")
    return fresh


def _changes(store: PoolStore, config: Config, number: int) -> int:
    """How many there were in the served pools since generation ``number`` read their logs."""
    home = home_of(config.generations_dir, config.retriever.name)
    positions = read_manifest(home / folder_name(number)).positions
    return sum(store.last_seq(pool) - positions.get(pool, 0) for pool in config.served_pools)


def _publish(store: PoolStore, config: Config, number: int) -> int:
    root, name = config.generations_dir, config.retriever.name
    began, champion = time.monotonic(), best(root, name)
    generation = load(root, name, number, config.encoder.device, rows=False)
    try:
        metrics = json.loads((generation.folder / "metrics.json").read_text(encoding="utf-8"))
        encoder = generation.encoder
        encoder.compute_as(config.encoder)
        built = build_generation(store, config, encoder)
        metrics |= {"build_seconds": time.monotonic() - began, "created": time.time()}
        return publish(
            root, name, encoder=encoder, **built.parts(), metrics=metrics, parent=number,
            keep=config.retriever.keep + len(_same(config, number)),  # which go in a moment
            best=None if champion == number else champion, index=config.retriever.index,
        )  # fmt: skip
    finally:
        generation.close()


def _same(config: Config, number: int) -> list[int]:
    """All generations of generation ``number``'s encoder, itself among them."""
    made = {
        manifest.number: (manifest.query_fingerprint, manifest.memory_fingerprint)
        for manifest in generations(config.generations_dir, config.retriever.name)
    }
    return [other for other, by in made.items() if by == made[number]]


def _retire(config: Config, fresh: int) -> None:
    """Delete older generations of ``fresh``'s encoder; leased ones are left for the next time."""
    home = home_of(config.generations_dir, config.retriever.name)
    with locked(home):
        for number in _same(config, fresh):
            if number < fresh and number != read_current(home)[0]:
                discard(home, number)
