"""The loop's last step, blocking: what was decided is carried out, and found from then on.

Everything that is written into a pool while it is served comes through here, so that limits,
holds and near-duplicates are looked at in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

from memshare.config import Config
from memshare.pool import decisions
from memshare.pool.errors import InvalidMemory
from memshare.pool.limits import Limits
from memshare.pool.queue import Job, PairQueue
from memshare.pool.store import PoolStore
from memshare.pool.validate import check_memory
from memshare.records import AppendResult, Memory, NewMemory, Pair
from memshare.retrieval.searcher import Searcher
from memshare.sharing import turn as ends
from memshare.sharing.guard import Guard, NotStored, placed
from memshare.sharing.near import NearDuplicates
from memshare.sharing.turn import Decision, prompt_hash

_REASONS = {"duplicate": ends.DUPLICATE, "held": ends.HELD, "rejected": ends.LIMIT}


class Writer:
    """Writes of a store that a searcher serves. Thread-safe.

    ``stage("store")`` is entered around each: see `SharedMemory.stage`.
    """

    def __init__(
        self,
        store: PoolStore,
        searcher: Searcher,
        config: Config,
        stage: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """Store and searcher are the caller's."""
        self.guard = Guard(config)
        self._store = store
        self._searcher = searcher
        self._config = config
        self._stage = stage
        self._near = NearDuplicates(store, searcher, config)

    def append_visible(
        self, memories: list[NewMemory], trusted: bool = False
    ) -> list[AppendResult]:
        """Blocking: append, and wait until the memories can be searched for.

        ``trusted``: an administrator's, for whom no limits hold and nothing is suspicious. A pool
        that this retriever doesn't serve is only stored into. Where a pool's near-duplicates are
        watched for, memories are stored one by one. Raises `SearchTimeout` with everything stored;
        appending again is harmless.
        """
        limits = {} if trusted else self.guard.limits
        with self._stage("store"):
            if not trusted:
                memories = [self.guard.look_at(memory) for memory in memories]
            if any(self._near.watches(memory.pool) for memory in memories):
                return [self._append_placed(memory, limits) for memory in memories]
            return self._append(memories, limits)

    def _append_placed(self, memory: NewMemory, limits: Mapping[str, Limits]) -> AppendResult:
        with placed(self._near, memory) as place:
            earlier = place.twin
            if place.new is not None:
                (result,) = self._append([place.new], limits)
                if result.status == "rejected":
                    raise NotStored
                earlier = (
                    self._near.confirm(place, result.id) if result.status == "stored" else None
                )
                if earlier is None:
                    return result
            assert earlier is not None
            return AppendResult(earlier.id, "duplicate", earlier.seq)
        return result

    def _append(
        self, memories: list[NewMemory], limits: Mapping[str, Limits]
    ) -> list[AppendResult]:
        results = self._store.append(memories, limits)
        self._wait_visible(memories, results)
        return results

    def _wait_visible(self, memories: list[NewMemory], results: list[AppendResult]) -> None:
        for pool in {memory.pool for memory in memories} & set(self._config.served_pools):
            seqs = [
                result.seq
                for memory, result in zip(memories, results, strict=True)
                if memory.pool == pool
            ]
            self._searcher.wait_visible(
                pool, max(seqs), self._config.gateway.visible_timeout_seconds
            )

    def settle(self, pair: Pair, decision: Decision, job: Job | None) -> Decision:
        """Carry a decision out: see `SharedMemory.settle`."""
        if decision.status != "stored":
            return self._decide(pair, decision, [], job)
        limit = self._config.gateway.max_text_chars
        memory = self.guard.look_at(check_memory(self._memory(pair, decision.score), limit))
        with self._stage("store"), placed(self._near, memory) as place:
            if place.new is None:
                assert place.twin is not None
                return self._decide(pair, _near_duplicate(decision, place.twin), [], job)
            decision = self._decide(pair, decision, [place.new], job)
            if decision.status == "rejected":
                raise NotStored
            earlier = None
            if decision.status == "stored":
                assert decision.memory_id is not None
                earlier = self._near.confirm(place, decision.memory_id)
            # On record it stays stored, as it was, until the change log says deleted.
            return decision if earlier is None else _near_duplicate(decision, earlier)
        return decision

    def _decide(
        self, pair: Pair, decision: Decision, new: list[NewMemory], job: Job | None
    ) -> Decision:
        with self._store.database.write() as connection:
            results = self._store.append_in(connection, new, self.guard.limits)
            for result in results:
                decision = replace(decision, memory_id=result.id or None)
                if result.status != "stored":
                    reason = _REASONS[result.status]
                    detail = result.reason or decision.detail
                    decision = replace(decision, status=result.status, reason=reason, detail=detail)
            decisions.record(
                connection, pair.pool, decision.reason, prompt_hash(pair.prompt), decision.score,
                pair.agent, decision.memory_id,
            )  # fmt: skip
            if job:
                PairQueue.finish(connection, job)
        if new:
            self._wait_visible(new, results)
        return decision

    def hopeless(self, pair: Pair) -> Decision | None:
        """Why ``pair`` can't be stored whatever its grade; None if it can."""
        if not pair.prompt.strip() or not pair.answer.strip():
            return Decision("rejected", ends.EMPTY)
        if pair.finish_reason == "length":
            return Decision("rejected", ends.CUT_OFF)
        if pair.finish_reason != "stop":  # a filter's word, or a server's that was stopped
            return Decision("rejected", ends.UNFINISHED, detail=pair.finish_reason)
        try:
            check_memory(self._memory(pair, None), self._config.gateway.max_text_chars)
        except InvalidMemory as error:
            return Decision("rejected", ends.INVALID, detail=str(error))
        return None

    def _memory(self, pair: Pair, score: float | None) -> NewMemory:
        return NewMemory(
            pair.pool,
            pair.prompt,
            pair.answer,
            score=score,
            agent=pair.agent,
            model=pair.model,
            metadata=pair.metadata,
            copy_of=pair.copy_of,
        )


def _near_duplicate(decision: Decision, of: Memory) -> Decision:
    return replace(decision, status="duplicate", reason=ends.NEAR_DUPLICATE, memory_id=of.id)
