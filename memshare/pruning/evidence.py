"""What a policy may ask about the memories of a pool. Each answer is found when first asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import numpy.typing as npt

from memshare.config import Config
from memshare.pool.feedback import Feedback
from memshare.pool.store import PoolStore
from memshare.pool.uses import UseCounts
from memshare.retrieval.build import MemoryVectors
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.generation import load_current
from memshare.training.examples import read_examples, round_dirs

_BLOCK = 2048


@dataclass(frozen=True, slots=True)
class Entry:
    """A memory as pruning sees it: everything but its text."""

    id: str
    seq: int
    score: float | None
    created_at: str


class Evidence:
    """The memories of one pool that may go: living ones, not held, as of now, oldest first."""

    def __init__(self, store: PoolStore, config: Config, pool: str) -> None:
        """Reads the pool once, without keeping its text. Raises `UnknownPool`."""
        info = store.pool(pool)
        self.pool = pool
        self.threshold = info.threshold
        self.entries = tuple(
            Entry(memory.id, memory.seq, memory.score, memory.created_at)
            for memory in store.iter(pool, until_seq=info.last_seq)
        )
        self._store = store
        self._config = config

    @cached_property
    def uses(self) -> Mapping[str, int]:
        """How often each memory was found; those that never were are left out."""
        return UseCounts(self._store.database).of_pool(self.pool)

    @cached_property
    def standings(self) -> Mapping[str, float]:
        """What principals think of each memory, -1 to 1; without feedback it is left out."""
        found = Feedback(self._store.database).of_pool(self.pool)
        return {id: standing.value for id, standing in found.items()}

    @cached_property
    def gains(self) -> Mapping[str, tuple[float, int]]:
        """Measured usefulness of the memories that were ever a candidate: (sum, number) of gains.

        A gain is what showing the memory added to the likelihood of the right answer, in nats per
        token, as mining measured it (`Example.baseline_loglik`).
        """
        sums: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        for folder in round_dirs(self._config.examples_dir):
            for example in read_examples(folder):
                if example.pool != self.pool or example.baseline_loglik is None:
                    continue
                for candidate in example.candidates:
                    if candidate.loglik is not None:
                        total, number = sums[candidate.id]
                        gain = candidate.loglik - example.baseline_loglik
                        sums[candidate.id] = total + gain, number + 1
        return dict(sums)

    @cached_property
    def vectors(self) -> npt.NDArray[np.float32]:
        """Unit rows (entries, dim) by the encoder that serves; most come from its index."""
        config = self._config
        generation = load_current(config.generations_dir, config.retriever.name, device="cpu")
        try:
            encoder = Encoder.load(config.encoder) if generation is None else generation.encoder
            source = MemoryVectors(encoder, generation)
            return np.concatenate(list(self._encoded(source, encoder.dim)))
        finally:
            if generation is not None:
                generation.close()

    def _encoded(self, source: MemoryVectors, dim: int) -> Iterator[npt.NDArray[np.float32]]:
        yield np.empty((0, dim), np.float32)
        ids = iter([entry.id for entry in self.entries])
        while block := list(islice(ids, _BLOCK)):
            found = self._store.get_many(block)
            rows = np.zeros((len(block), dim), np.float32)  # of one deleted meanwhile: near nothing
            places = [place for place, id in enumerate(block) if id in found]
            rows[places] = source.of([found[block[place]] for place in places])
            yield rows
