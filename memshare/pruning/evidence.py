"""What a policy may ask about the memories of a pool. Each answer is found when first asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from memshare.arrays import Floats
from memshare.config import Config
from memshare.pool.feedback import Feedback
from memshare.pool.store import PoolStore
from memshare.pool.uses import UseCounts
from memshare.pruning.agreement import HASHES, Signatures, signatures
from memshare.records import Memory
from memshare.retrieval.build import MemoryVectors
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.generation import Generation, load_current
from memshare.training.examples import mined_dirs, read_examples, round_dirs

_BLOCK = 2048

Number = TypeVar("Number", np.float32, np.uint32)


@dataclass(frozen=True, slots=True)
class Entry:
    """A memory as pruning sees it: everything but its text."""

    id: str
    seq: int
    score: float | None
    created_at: str


class Evidence:
    """The memories of one pool that may go: living ones, not held, as of now, oldest first."""

    def __init__(self, store: PoolStore, config: Config, pool: str, cap: int = 0) -> None:
        """Reads the pool once, without keeping its text. Raises `UnknownPool`."""
        info = store.pool(pool)
        self.pool = pool
        self.threshold = info.threshold
        self.entries = tuple(
            Entry(memory.id, memory.seq, memory.score, memory.created_at)
            for memory in store.iter(pool, until_seq=info.last_seq)
        )
        self.excess = max(0, len(self.entries) - cap)  # so many are to go
        self._store = store
        self._config = config

    def grade(self, entry: Entry) -> tuple[float, int]:
        """Sorts the worst graded first, of equals the oldest; without a grade: just admitted."""
        return self.threshold if entry.score is None else entry.score, entry.seq

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
        token, or to its reward, as mining measured it (`Example.baseline_loglik`). One is no
        measure of the other: what was measured last counts.
        """
        sums: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        labels: str | None = None
        rounds = reversed(round_dirs(self._config.examples_dir))
        for folder in chain.from_iterable(map(mined_dirs, rounds)):
            for example in read_examples(folder):
                if example.pool != self.pool or example.baseline_loglik is None:
                    continue
                labels = labels or example.labels
                if example.labels != labels:
                    continue
                for candidate in example.candidates:
                    if candidate.loglik is not None:
                        total, number = sums[candidate.id]
                        gain = candidate.loglik - example.baseline_loglik
                        sums[candidate.id] = total + gain, number + 1
        return dict(sums)

    @cached_property
    def vectors(self) -> Floats:
        """Unit rows (entries, dim) by the encoder that serves; most come from its index."""
        with self._serving() as (encoder, generation):
            source = MemoryVectors(encoder, generation)
            return self._rows(source.of, np.zeros((len(self.entries), encoder.dim), np.float32))

    @cached_property
    def questions(self) -> Floats:
        """The prompts as queries: unit rows (entries, dim) by the encoder that serves.

        All are encoded, which takes as long as a new generation's memories do.
        """
        with self._serving() as (encoder, _):
            return self._rows(
                lambda found: encoder.encode_queries([memory.prompt for memory in found]),
                np.zeros((len(self.entries), encoder.dim), np.float32),
            )

    @cached_property
    def answers(self) -> Signatures:
        """The answers' signatures (entries, `HASHES`), which tell how far two of them agree."""
        return self._rows(
            lambda found: signatures(memory.answer for memory in found),
            np.zeros((len(self.entries), HASHES), np.uint32),
        )

    @contextmanager
    def _serving(self) -> Iterator[tuple[Encoder, Generation | None]]:
        """The encoder that serves, or would, and its generation, if there is one.

        On the CPU: a loop prunes in its own process, which must leave the GPU to its programs.
        """
        config, device = self._config, "cpu"
        generation = load_current(config.retriever_dir, device)
        if generation is None:
            yield Encoder.load(config.encoder.model_copy(update={"device": device})), None
            return
        with generation:
            yield generation.encoder, generation

    def _rows(
        self, of: Callable[[list[Memory]], npt.NDArray[Number]], rows: npt.NDArray[Number]
    ) -> npt.NDArray[Number]:
        """``rows``, filled with what ``of`` makes of the entries' memories.

        A row is left as it is where the memory was deleted meanwhile: near nothing.
        """
        ids = [entry.id for entry in self.entries]
        for start in range(0, len(ids), _BLOCK):
            block = ids[start : start + _BLOCK]
            found = self._store.get_many(block)
            places = [place for place, id in enumerate(block, start) if id in found]
            rows[places] = of([found[ids[place]] for place in places])
        return rows
