"""Encoding pools into the rows of a new generation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from memshare.arrays import Floats
from memshare.config import Config
from memshare.pool.store import PoolStore
from memshare.progress import log, track
from memshare.records import Memory
from memshare.retrieval.divided import Peers, Rows, deal, dismiss, engage
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.generation import Generation, current, load
from memshare.retrieval.history import mark_at
from memshare.retrieval.manifest import GenerationError, folder_name, read_manifest

_BLOCK = 2048  # memories encoded at a time: long enough to sort by length, small in memory


@dataclass(frozen=True, eq=False)
class Built:
    """Rows for `publish`: ``vectors`` (rows, dim) float32 with their ``ids``, grouped by pool.

    ``built_by`` is the memory fingerprint of the encoder that made them; `publish` refuses them
    together with any other. ``marks``: of the change at each of the ``positions``.
    """

    vectors: Floats
    ids: list[str]
    spans: dict[str, tuple[int, int]]
    positions: dict[str, int]
    built_by: str
    marks: dict[str, str] = field(default_factory=dict)

    def parts(self) -> dict[str, Any]:
        """Keyword arguments for `publish`."""
        return dict(vars(self))


def build_generation(
    store: PoolStore, config: Config, encoder: Encoder, peers: Peers | None = None
) -> Built:
    """The living, not held memories of the pools that the retriever serves, encoded.

    Vectors that the current generation has already are copied from it, if its memory tower is this
    encoder's. Streamed from the store. Each pool is read up to its position now; what is added or
    deleted meanwhile comes after that position, so a reader that replays the log from there misses
    nothing. Raises `UnknownPool`.

    With several ``peers``, this is process 0's part; the others call `memshare.retrieval.divided.
    serve`, and all encode. Where vectors can be copied, the little that is new is encoded here.
    """
    ids: list[str] = []
    blocks: list[Floats] = [np.empty((0, encoder.dim), dtype=np.float32)]
    spans, positions, marks = {}, {}, {}
    fingerprint = encoder.memory_fingerprint()
    with _current_by(config, fingerprint) as generation:
        vectors = MemoryVectors(encoder, generation)
        divided = peers if peers is not None and peers.size > 1 and generation is None else None
        if peers is not None:
            engage(peers, None if divided is None else fingerprint)
        for pool in config.served_pools:
            start, position = len(ids), store.last_seq(pool)
            if (last := mark_at(store, pool, position)) is not None:
                marks[pool] = last
            rows = _alone(store, vectors, pool, position)
            if divided is not None:
                rows = deal(store, encoder, pool, position, _BLOCK, divided)
            for names, block in rows:
                blocks.append(block)
                ids.extend(names)
            spans[pool], positions[pool] = (start, len(ids)), position
        if divided is not None:
            dismiss(divided)
    return Built(np.concatenate(blocks), ids, spans, positions, fingerprint, marks)


def _alone(store: PoolStore, vectors: MemoryVectors, pool: str, position: int) -> Iterator[Rows]:
    """Ids and vectors of the living memories of ``pool`` up to ``position``, in blocks."""
    memories = store.iter(pool, until_seq=position)
    shown = track(memories, f"encoding {pool}", store.size(pool))
    while block := list(islice(shown, _BLOCK)):
        yield [item.id for item in block], vectors.of(block)


def memory_vectors(
    encoder: Encoder, memories: Sequence[Memory], generation: Generation | None
) -> Floats:
    """``memories`` as unit rows (n, dim), by ``encoder``.

    Those that ``generation``, which must have that encoder's memory tower, holds are copied from
    its index.
    """
    vectors = MemoryVectors(encoder, generation)
    blocks = [np.empty((0, encoder.dim), dtype=np.float32)]
    for start in track(range(0, len(memories), _BLOCK), "encoding memories"):
        blocks.append(vectors.of(memories[start : start + _BLOCK]))
    return np.concatenate(blocks)


class MemoryVectors:
    """Memories' vectors by an encoder, those of them copied that a generation of it holds."""

    def __init__(self, encoder: Encoder, generation: Generation | None) -> None:
        """``generation`` must have ``encoder``'s memory tower; None: all are encoded."""
        self._encoder = encoder
        self._generation = generation
        self._rows: dict[str, dict[bytes, int]] = {}  # pool -> id -> row
        if generation is not None:
            self._rows = {
                pool: {id_: row for row, id_ in enumerate(ids.tolist())}
                for pool, ids in generation.ids.items()
            }

    def of(self, memories: Sequence[Memory]) -> Floats:
        """Unit rows (n, dim), in the order of ``memories``."""
        vectors = np.empty((len(memories), self._encoder.dim), dtype=np.float32)
        places = [self._rows.get(m.pool, {}).get(m.id.encode(), -1) for m in memories]
        missing = [i for i, row in enumerate(places) if row < 0]
        pairs = [(memories[i].prompt, memories[i].answer) for i in missing]
        vectors[missing] = self._encoder.encode_memories(pairs)
        known: dict[str, list[int]] = defaultdict(list)
        for i, row in enumerate(places):
            if row >= 0:
                known[memories[i].pool].append(i)
        for pool, held in known.items():
            assert self._generation is not None  # it has rows
            rows = np.array([places[i] for i in held])
            vectors[held] = self._generation.indexes[pool].reconstruct(rows)
        return vectors


@contextmanager
def _current_by(config: Config, fingerprint: str) -> Iterator[Generation | None]:
    """The current generation if its memory tower has ``fingerprint``, else None."""
    home, generation = config.retriever_dir, None
    number = current(home)
    try:
        if number is not None:
            manifest = read_manifest(home / folder_name(number))
            rounded = manifest.index.get("precision") == "float16"
            wanted = not rounded or config.retriever.index.precision == "float16"
            if manifest.memory_fingerprint == fingerprint and wanted:
                generation = load(home, number, device="cpu")
    except GenerationError as error:
        log(f"all memories are encoded: {error}")
    with generation or nullcontext():
        yield generation
