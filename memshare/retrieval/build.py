"""Encoding pools into the rows of a new generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from memshare.config import Config
from memshare.pool.store import PoolStore
from memshare.progress import track
from memshare.records import Memory
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.generation import Generation

_BLOCK = 2048  # memories encoded at a time: long enough to sort by length, small in memory


@dataclass(frozen=True, eq=False)
class Built:
    """Rows for `publish`: ``vectors`` (rows, dim) float32 with their ``ids``, grouped by pool.

    ``built_by`` is the memory fingerprint of the encoder that made them; `publish` refuses them
    together with any other.
    """

    vectors: npt.NDArray[np.float32]
    ids: list[str]
    spans: dict[str, tuple[int, int]]
    positions: dict[str, int]
    built_by: str

    def parts(self) -> dict[str, Any]:
        """Keyword arguments for `publish`."""
        return dict(vars(self))


def build_generation(
    store: PoolStore, config: Config, encoder: Encoder, pools: Sequence[str] | None = None
) -> Built:
    """Encode the living, not held memories of ``pools`` (None: those that the retriever serves).

    Streamed from the store. Each pool is read up to its position now; what is added or deleted
    meanwhile comes after that position, so a reader that replays the log from there misses nothing.
    Raises `UnknownPool`.
    """
    ids: list[str] = []
    blocks: list[npt.NDArray[np.float32]] = [np.empty((0, encoder.dim), dtype=np.float32)]
    spans, positions = {}, {}
    for pool in config.served_pools if pools is None else pools:
        start, positions[pool] = len(ids), store.last_seq(pool)
        memories = store.iter(pool, until_seq=positions[pool])
        total = store.stats(pool).memories
        shown = track(memories, f"encoding {pool}", total)
        while block := list(islice(shown, _BLOCK)):
            blocks.append(encoder.encode_memories([(item.prompt, item.answer) for item in block]))
            ids.extend(item.id for item in block)
        spans[pool] = (start, len(ids))
    return Built(np.concatenate(blocks), ids, spans, positions, encoder.memory_fingerprint())


def memory_vectors(
    encoder: Encoder, memories: Sequence[Memory], generation: Generation | None
) -> npt.NDArray[np.float32]:
    """``memories`` of one pool as unit rows (n, dim), by ``encoder``.

    Those that ``generation``, which must be that encoder's, holds are copied from its index.
    """
    vectors = np.empty((len(memories), encoder.dim), dtype=np.float32)
    missing = list(range(len(memories)))
    if generation is not None and memories and memories[0].pool in generation.indexes:
        pool = memories[0].pool
        rows = {id_.decode(): row for row, id_ in enumerate(generation.ids[pool].tolist())}
        found = np.array([rows.get(memory.id, -1) for memory in memories])
        vectors[found >= 0] = generation.indexes[pool].reconstruct(found[found >= 0])
        missing = np.flatnonzero(found < 0).tolist()
    blocks = range(0, len(missing), _BLOCK)
    for start in track(blocks, "encoding memories"):
        block = missing[start : start + _BLOCK]
        pairs = [(memories[i].prompt, memories[i].answer) for i in block]
        vectors[block] = encoder.encode_memories(pairs)
    return vectors
