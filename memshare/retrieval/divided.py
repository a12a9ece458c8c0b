"""Encoding a pool by several processes: the main one deals spans out, all of them encode.

The main process alone knows what is to be done: it cuts the pool into spans of as many living
memories each, tells every process which one is its own, and collects ids and vectors, span by span,
so that nobody but it holds more than one span. Every process reads its memories from the store
itself. Whatever is deleted meanwhile is missing or not, as it would be with one process: it comes
after the position that the generation claims.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol, TypeVar

from memshare.arrays import Floats
from memshare.pool.store import PoolStore
from memshare.progress import track
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.errors import EncoderError

T = TypeVar("T")
Rows = tuple[list[str], Floats]  # ids, and unit vectors (n, dim)
Span = tuple[str, int, int]  # pool, after this seq, up to this seq


class Peers(Protocol):
    """The processes that encode together; `memshare.training.gather.World` is one.

    Every method is called by all of them at one time.
    """

    rank: int
    size: int

    def from_main(self, value: T) -> T:
        """What process 0 gives, for every process."""

    def to_main(self, value: T) -> list[T]:
        """What every process gives, in order, for process 0; nothing for the others."""


def deal(
    store: PoolStore, encoder: Encoder, pool: str, position: int, most: int, peers: Peers
) -> Iterator[Rows]:
    """The main process's part, for the living memories of ``pool`` up to ``position``, in order.

    Spans of equally many memories, at most ``most``. `engage` comes first, `dismiss` at the end.
    """
    total = store.size(pool)
    if not total:  # all that it had was deleted
        return
    rounds = math.ceil(total / (peers.size * most))
    count = math.ceil(total / (peers.size * rounds))  # the last round is as full as the first
    shown = track(
        _cut(store, pool, position, count, peers.size),
        f"encoding {pool} by {peers.size} processes",
        rounds,
    )
    for spans in shown:
        peers.from_main(spans)
        yield from peers.to_main(_encode(store, encoder, spans[peers.rank]))


def _cut(
    store: PoolStore, pool: str, position: int, count: int, processes: int
) -> Iterator[list[Span]]:
    """Spans of ``count`` memories each, for all processes at a time."""
    after = 0
    while after < position:
        ends = [after]
        for _ in range(processes):
            ends.append(store.span_end(pool, ends[-1], position, count))
        after = ends[-1]
        yield [(pool, low, high) for low, high in pairwise(ends)]


def engage(peers: Peers, fingerprint: str | None) -> None:
    """The main process's part: the others are to encode by the encoder of ``fingerprint``.

    None: they are not needed. Every `serve` waits for this.
    """
    peers.from_main(fingerprint)


def dismiss(peers: Peers) -> None:
    """The main process's part: all of it is encoded."""
    peers.from_main(None)


def serve(store: PoolStore, encoder: Encoder, peers: Peers) -> None:
    """Every other process's part: encode what the main one deals out, until it dismisses all.

    Raises `EncoderError` where this encoder is another than the main process's.
    """
    wanted: str | None = peers.from_main(None)
    if wanted is None:
        return
    if wanted != encoder.memory_fingerprint():
        raise EncoderError(
            f"process {peers.rank} has another encoder than process 0: give every process the "
            "same files and settings (a shared file system, or equal copies)"
        )
    spans: list[Span] | None
    while (spans := peers.from_main(None)) is not None:
        peers.to_main(_encode(store, encoder, spans[peers.rank]))


def _encode(store: PoolStore, encoder: Encoder, span: Span) -> Rows:
    pool, after, until = span
    memories = list(store.iter(pool, after, until))
    pairs = [(memory.prompt, memory.answer) for memory in memories]
    return [memory.id for memory in memories], encoder.encode_memories(pairs)
