"""What answers searches at one moment: one encoder, and every pool's rows in its space."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memshare.arrays import Floats
from memshare.config import Config
from memshare.pool.errors import UnknownPool
from memshare.pool.store import PoolStore
from memshare.progress import log, track
from memshare.records import Memory, SearchAnswer
from memshare.retrieval.build import Built
from memshare.retrieval.delta import Shard, Snapshot
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.filters import Filter
from memshare.retrieval.generation import Generation
from memshare.retrieval.gpu import GpuPlace
from memshare.retrieval.history import AnotherHistory, goes_on, mark
from memshare.retrieval.index import FlatIndex

PAGE = 1000  # changes read at a time
MAX_DELTA = 4096  # rows; a larger delta becomes an index before serving begins
FROZEN = 0  # the number of the configured encoder, before anything was published

Run = Callable[[Callable[[], None]], None]


def run_here(step: Callable[[], None]) -> None:
    """Run ``step`` in this thread: for a `Serving` that serves nobody yet."""
    step()


@dataclass(frozen=True, slots=True)
class Query:
    """One search: the ``k`` best memories of ``pool`` for the question ``text``.

    With an ``answer`` the two are a memory, and those nearest to it are meant.
    """

    pool: str
    text: str
    k: int
    restrict: Filter | None = None
    answer: str | None = None


@dataclass(eq=False)
class Serving:
    """Encoder, index and id map that belong together. One thread at a time owns it.

    ``number`` is the generation's; `FROZEN` stands for the configured encoder, untrained here, with
    every memory in the delta.
    """

    number: int
    encoder: Encoder
    shards: dict[str, Shard]
    generation: Generation | None = None

    @classmethod
    def frozen(cls, encoder: Encoder, pools: Iterable[str]) -> Serving:
        """Generation 0: nothing but an encoder."""
        return cls(FROZEN, encoder, {pool: Shard(encoder.dim) for pool in pools})

    @classmethod
    def of(
        cls,
        generation: Generation,
        store: PoolStore,
        pools: Iterable[str],
        before: Mapping[str, Snapshot] | None = None,
    ) -> Serving:
        """A loaded generation; a pool that it does not know starts with everything in the delta.

        What ``before``, the rows that serve now, tells by pool is not read from the store again.
        """
        shards = {}
        for pool in pools:
            if pool in generation.indexes:
                ids = generation.ids[pool]
                position = generation.manifest.positions[pool]
                index, last = generation.indexes[pool], generation.manifest.marks.get(pool)
                shards[pool] = Shard(generation.encoder.dim, index, ids, position, last)
            else:
                shards[pool] = Shard(generation.encoder.dim)
        serving = cls(generation.number, generation.encoder, shards, generation)
        serving._load_columns(store, before or {})
        return serving

    @classmethod
    def of_built(cls, encoder: Encoder, built: Built, store: PoolStore) -> Serving:
        """Rows that are not published yet, searched exactly; for the gate. Its number is -1."""
        shards = {}
        for pool, (start, stop) in built.spans.items():
            index = FlatIndex.build(built.vectors[start:stop])
            ids = np.array([id.encode() for id in built.ids[start:stop]] or [b""], np.bytes_)
            at, last = built.positions[pool], built.marks.get(pool)
            shards[pool] = Shard(encoder.dim, index, ids[: stop - start], at, last)
        serving = cls(-1, encoder, shards)
        serving._load_columns(store, {})
        return serving

    def close(self) -> None:
        """Give the generation's lease back; call it after the last search."""
        if self.generation is not None:
            self.generation.close()

    @property
    def delta_rows(self) -> int:
        """Rows that are in no index, over all pools."""
        return sum(shard.delta_rows for shard in self.shards.values())

    def behind(self, store: PoolStore) -> dict[str, int]:
        """How many changes each pool's rows lack; pools that lack none are left out.

        Fewer than none: the log ends before them, see `feed`.
        """
        last = {info.name: info.last_seq for info in store.pools()}
        gaps = {pool: last.get(pool, 0) - shard.position for pool, shard in self.shards.items()}
        return {pool: gap for pool, gap in gaps.items() if gap != 0}

    def feed(self, store: PoolStore, pool: str, run: Run, step: int = PAGE) -> bool:
        """Take in the next page of a pool's changes; False if there was none.

        The store is read in the calling thread; rows change, and ``step`` memories at a time are
        encoded, in the thread in which ``run`` executes what it is given. Raises `AnotherHistory`
        where the log lacks the change that was taken in last.
        """
        shard = self.shards[pool]
        seen = min(shard.position, 1)  # the change that was taken in last is read once more
        try:
            page = store.changes(pool, shard.position - seen, PAGE + seen)
        except UnknownPool:  # not made yet, or not in this database
            page = []
        if seen and not (page and shard.mark in (None, mark(page[0]))):
            raise AnotherHistory(
                f"the log of pool {pool} is not the one that was read up to {shard.position}: the "
                "database was restored, or is another one. All of it is read anew"
            )
        del page[:seen]
        if not page:
            return False
        # The present state, not the log's: repeating it is harmless, and a memory that was deleted
        # since is never encoded. What changes after this reading is in a later page.
        living = store.get_many([change.id for change in page])
        states = {change.id: living.get(change.id) for change in page}
        left: list[Memory] = []

        def advance() -> None:
            memories = left[:step]
            if memories:
                pairs = [(memory.prompt, memory.answer) for memory in memories]
                shard.add(memories, self.encoder.encode_memories(pairs))
                del left[:step]
            if not left:
                shard.position, shard.mark = page[-1].seq, mark(page[-1])

        def begin() -> None:
            left.extend(shard.reconcile(states))
            advance()

        run(begin)
        while left:
            run(advance)
        return True

    def catch_up(
        self,
        store: PoolStore,
        gaps: Mapping[str, int] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        run: Run = run_here,
        step: int = PAGE,
    ) -> None:
        """`feed` each pool by ``gaps`` changes (None: all there are now), until ``stopped``.

        Where that takes many pages, the log says how far it is.
        """
        gaps = self.behind(store) if gaps is None else gaps
        until = {pool: self.shards[pool].position + gap for pool, gap in gaps.items()}

        def pages(pool: str) -> Iterator[None]:
            while self.shards[pool].position < until[pool] and not stopped():
                if not self.feed(store, pool, run, step):
                    return
                yield

        for pool, gap in gaps.items():
            fed: Iterable[None] = pages(pool)
            if gap > MAX_DELTA:
                what = f"encoding what the index of {pool} lacks, by {PAGE} changes"
                fed = track(fed, what, -(-gap // PAGE))
            for _ in fed:
                pass

    def snapshot(self) -> dict[str, Snapshot]:
        """What is known of every pool's rows now, copied."""
        return {pool: shard.snapshot() for pool, shard in self.shards.items()}

    def settle(self, place: GpuPlace | None) -> None:
        """Before serving begins: index large deltas, and warm encoder and indexes up."""
        for shard in self.shards.values():
            if shard.delta_rows > MAX_DELTA:
                shard.freeze(place)
        self.warm_up()

    def warm_up(self) -> None:
        """Search every pool once, for one text."""
        vector = self.encoder.encode_queries(["warm-up"])
        for shard in self.shards.values():
            shard.top(vector, 1)

    def move_up(self, device: str, place: GpuPlace | None) -> None:
        """From the CPU onto ``device`` and ``place``, in the thread that owns this."""
        self.encoder.move(device)
        for shard in self.shards.values():
            shard.to_gpu(place)
        self.warm_up()

    def answer(self, queries: Sequence[Query]) -> list[SearchAnswer]:
        """Search, all queries in one batch of the encoder, all by this generation."""
        if not queries:
            return []
        vectors = self._encode(queries)
        groups: dict[tuple[str, Filter | None], list[int]] = defaultdict(list)
        for i, query in enumerate(queries):
            groups[query.pool, query.restrict].append(i)
        answers: dict[int, SearchAnswer] = {}
        for (pool, restrict), members in groups.items():
            most = max(queries[i].k for i in members)
            for i, hits in zip(
                members, self.shards[pool].top(vectors[members], most, restrict), strict=True
            ):
                answers[i] = SearchAnswer(self.number, hits[: queries[i].k])
        return [answers[i] for i in range(len(queries))]

    def _encode(self, queries: Sequence[Query]) -> Floats:
        """Questions by the query tower, memories by theirs; (queries, dim)."""
        memories = [i for i, query in enumerate(queries) if query.answer is not None]
        texts = [query.text for query in queries if query.answer is None]
        if not memories:
            return self.encoder.encode_queries(texts)
        vectors = np.empty((len(queries), self.encoder.dim), np.float32)
        pairs = [(query.text, query.answer) for query in queries if query.answer is not None]
        vectors[memories] = self.encoder.encode_memories(pairs)
        if texts:
            others = np.setdiff1d(np.arange(len(queries)), memories)
            vectors[others] = self.encoder.encode_queries(texts)
        return vectors

    def _load_columns(self, store: PoolStore, before: Mapping[str, Snapshot]) -> None:
        last = {info.name: info.last_seq for info in store.pools()}
        for pool, shard in self.shards.items():
            if not goes_on(store, pool, shard.position, shard.mark):
                log(
                    f"generation {self.number}: built at position {shard.position} of another log "
                    f"of pool {pool}, which is at {last.get(pool, 0)}: a restored database? "
                    "Reading all of it"
                )
                shard.position = 0
            if pool in before and shard.rows:
                shard.load_columns(store.get_many(shard.adopt(before[pool])).values())
            elif pool in last and shard.rows:
                # Held ones too, and to the end: each row's state as of now. What changes from here
                # on comes after `position` in the log, and is replayed by `feed`.
                shard.load_columns(store.iter(pool, include_held=True))


def frozen_serving(config: Config) -> Serving:
    """Generation 0 of a configuration. Raises `EncoderError`."""
    return Serving.frozen(Encoder.load(config.encoder), config.served_pools)
