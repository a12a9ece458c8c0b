"""One turn of the memory-sharing loop (Gao & Zhang, arXiv 2404.09982): steps 1 to 4.

retrieve: the k most useful memories for a question; answer: the agent LLM with them as examples;
grade_and_store: the scorer grades the bare pair by the pool's rubric, and it is stored at or above
the pool's threshold or dropped, with the reason on record either way. The gateway, the bootstrap
and the demo all take their turns here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from memshare import tracing
from memshare.config import Config
from memshare.llm.agent import Agent, AgentAnswer
from memshare.llm.base import LLM, LLMError, LLMUnavailable
from memshare.llm.rubric import load_rubric
from memshare.llm.scorer import Scorer
from memshare.pool.errors import PoolError
from memshare.pool.feedback import Feedback, Standing
from memshare.pool.queue import Job
from memshare.pool.store import PoolStore
from memshare.pool.uses import UseCounter, UseCounts
from memshare.progress import log
from memshare.records import AppendResult, Memory, NewMemory, Pair, PoolInfo, normalise
from memshare.retrieval.filters import Filter
from memshare.retrieval.searcher import Searcher
from memshare.retrieval.worker import SearchTimeout
from memshare.sharing import turn as ends
from memshare.sharing.turn import Decision, Retrieved, Turn
from memshare.sharing.writer import Writer

T = TypeVar("T")
_USES_SECONDS = 10.0  # between two additions of use counts in the database
_PATIENCE_SECONDS = 30.0  # between two lines about a long start


class SharedMemory:
    """The loop's parts behind one asynchronous face.

    The store and the searcher block, so their calls run on threads of ``threads`` workers here.
    ``observe(name, seconds)`` is told how long each `stage` took (retrieve, prompt, llm, score,
    store); ``llms`` are closed with the rest.
    """

    def __init__(
        self,
        store: PoolStore,
        searcher: Searcher,
        agent: Agent,
        scorer: Scorer,
        config: Config,
        *,
        llms: tuple[LLM, ...] = (),
    ) -> None:
        """Owns its parts from here on: `start` and `aclose` are theirs too."""
        self.store = store
        self.searcher = searcher
        self.agent = agent
        self.scorer = scorer
        self.config = config
        self.llms = llms
        self.feedback = Feedback(store.database)
        self.observe: Callable[[str, float], None] = lambda stage, seconds: None
        threads = config.gateway.threads
        self._reads = ThreadPoolExecutor(threads, thread_name_prefix="shared-read")
        self._writes = ThreadPoolExecutor(threads, thread_name_prefix="shared-write")
        # Apart from the other writes: these also wait until they can be searched for, maybe long.
        self._appends = ThreadPoolExecutor(threads, thread_name_prefix="shared-append")
        self._rubrics: dict[str, str] = {}
        self._known: set[str] = set()
        self.writer = Writer(store, searcher, config, self.stage)
        self._uses = UseCounter(UseCounts(store.database))
        self._flusher: asyncio.Task[None] | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of a turn, and trace it: a span that costs nothing where no one exports."""
        started = time.perf_counter()
        with tracing.span(name):
            yield
        self.observe(name, time.perf_counter() - started)

    async def read(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a blocking call of the store on a thread."""
        return await _on(self._reads, call, *args, **kwargs)

    async def write(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a blocking write on a thread; what stores memories is for `append` and `settle`."""
        return await _on(self._writes, call, *args, **kwargs)

    async def append(self, memories: list[NewMemory], trusted: bool = False) -> list[AppendResult]:
        """`Writer.append_visible` on a thread."""
        return await _on(self._appends, self.writer.append_visible, memories, trusted)

    async def know(self, pool: str) -> None:
        """Raise `UnknownPool` unless there is such a pool. Pools stay, so each is asked for once.

        That spares every request a thread and a transaction.
        """
        if pool not in self._known:
            await self.read(self.store.pool, pool)
            self._known.add(pool)

    async def retrieve(
        self,
        pool: str,
        question: str,
        k: int,
        *,
        filter: Filter | None = None,
        exclude_copies: bool = False,
        standings: bool = False,
    ) -> Retrieved:
        """The ``k`` most useful memories of ``pool``, or all there are if it holds fewer.

        ``exclude_copies`` leaves out memories whose normalised prompt equals the question: an
        evaluation must not show an answer to the very question it asks, and is not counted as a use
        of what it finds. ``standings``: with the memories' own. Raises `UnknownPool`.
        """
        with self.stage("retrieve"):
            return await self._retrieve(pool, question, k, filter, exclude_copies, standings)

    async def _retrieve(
        self,
        pool: str,
        question: str,
        k: int,
        filter: Filter | None,
        exclude_copies: bool,
        with_standings: bool,
    ) -> Retrieved:
        own = normalise(question)
        wanted = k
        share = self.config.retriever.max_principal_share
        if share < 1.0 and (filter is None or filter.agent is None):
            filter = replace(filter or Filter(), max_per_agent=max(1, int(share * k + 1e-9)))
        while True:
            found = await self.searcher.asearch(pool, question, wanted, filter)
            ids = [hit.id for hit in found.hits]
            texts, standings = await self.read(self._look_up, ids, with_standings)
            kept = [
                (texts[hit.id], hit.similarity)
                for hit in found.hits
                # It may have been deleted or put on hold between the two calls.
                if hit.id in texts
                and not texts[hit.id].held
                and not (exclude_copies and normalise(texts[hit.id].prompt) == own)
            ][:k]
            if len(kept) == k or len(found.hits) < wanted:
                break
            wanted *= 2
        memories = tuple(memory for memory, _ in kept)
        if not exclude_copies:
            self._uses.count(memory.id for memory in memories)
        similarities = tuple(similarity for _, similarity in kept)
        return Retrieved(found.generation, memories, similarities, standings)

    def _look_up(
        self, ids: Sequence[str], with_standings: bool
    ) -> tuple[dict[str, Memory], dict[str, Standing]]:
        """Texts and standings in one call: under load, each change of thread costs more than it."""
        standings = self.feedback.standings(ids) if with_standings else {}
        return self.store.get_many(ids), standings

    async def answer(
        self, question: str, retrieved: Retrieved, seed: int | None = None
    ) -> AgentAnswer:
        """The agent's answer with these memories as examples. Raises `LLMError`."""
        with self.stage("llm"):
            return await self.agent.answer(question, retrieved.memories, seed)

    async def grade_and_store(self, pair: Pair, job: Job | None = None) -> Decision:
        """Grade the pair by its pool's rubric and store it, or drop it with the reason on record.

        A stored pair is searchable when this returns. A pair that can't be stored whatever its
        grade (empty, cut off, unusable text) is not graded. ``job``: its place in the queue, which
        it leaves in the transaction that decides (see `pool.queue`). Raises `UnknownPool`,
        `ClaimLost`, and with nothing decided `LLMUnavailable` if the scorer can't be asked now, and
        `RubricError` if the rubric can't be read.
        """
        info = await self.read(self.store.pool, pair.pool)
        decision = self.writer.hopeless(pair) or await self._grade(pair, info)
        return await self.settle(pair, decision, job)

    async def _grade(self, pair: Pair, info: PoolInfo) -> Decision:
        """The decision, which nothing has carried out so far."""
        rubric = await self._rubric(info)
        try:
            with self.stage("score"):
                grade = await self.scorer.grade(pair.prompt, pair.answer, rubric)
        except LLMUnavailable:
            raise
        except LLMError as error:  # this pair can't be graded, and asking again won't help
            return Decision("rejected", ends.REFUSED, detail=str(error))
        if grade.value is None:
            return Decision("rejected", ends.UNREADABLE_GRADE, detail=grade.reason)
        if grade.value < info.threshold:
            return Decision("rejected", ends.BELOW_THRESHOLD, grade.value, detail=grade.reason)
        return Decision("stored", ends.STORED, grade.value, detail=grade.reason)

    async def settle(self, pair: Pair, decision: Decision, job: Job | None = None) -> Decision:
        """Carry a decision out: one transaction stores the pair if it is to be stored, puts the
        decision on the pool's record and takes ``job`` out of the queue. Returns what it came to;
        a stored pair can be searched for by then (see `Writer.append_visible`).
        """
        threads = self._appends if decision.status == "stored" else self._writes
        return await _on(threads, self.writer.settle, pair, decision, job)

    async def turn(
        self,
        pool: str,
        question: str,
        *,
        shots: int | None = None,
        seed: int | None = None,
        agent: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        exclude_copies: bool = False,
    ) -> Turn:
        """One whole turn of the loop for one question."""
        shots = self.config.agent.shots if shots is None else shots
        retrieved = Retrieved(None, (), ())
        if shots:
            retrieved = await self.retrieve(pool, question, shots, exclude_copies=exclude_copies)
        answer = await self.answer(question, retrieved, seed)
        pair = self.pair(pool, question, answer, retrieved.memories, agent, metadata)
        return Turn(retrieved, answer, await self.grade_and_store(pair))

    def pair(
        self,
        pool: str,
        question: str,
        answer: AgentAnswer,
        shown: Iterable[Memory] = (),
        agent: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Pair:
        """The agent's answer, with ``shown`` in its prompt, as a pair to grade."""
        completion = answer.completion
        text = completion.text.strip()
        return Pair(
            pool,
            question,
            text,
            completion.finish_reason,
            agent,
            self.agent.llm.model,
            metadata or {},
            self.writer.guard.copied(text, [item for item in shown if item.id in answer.used]),
        )

    async def start(self) -> None:
        """Load encoder and generation; when this returns, memories can be searched for.

        Raises what makes that impossible (`EncoderError`), or `SearcherClosed` if `aclose` comes
        first.
        """
        self.searcher.start()
        self._flusher = asyncio.create_task(self._flush_uses())
        while True:
            try:
                return await self.read(self.searcher.wait_ready, _PATIENCE_SECONDS)
            except SearchTimeout as error:
                log(f"still loading: {error}")

    async def _flush_uses(self) -> None:
        while True:
            await asyncio.sleep(_USES_SECONDS)
            await self._flush_now()

    async def _flush_now(self) -> None:
        try:
            await self.write(self._uses.flush)
            await self.write(self.store.scrub)
        except PoolError as error:  # searches don't depend on it; the counts are kept
            log(f"uses of memories can't be counted now: {error}")

    async def aclose(self) -> None:
        """Stop searcher and LLMs, let the threads finish, close the store."""
        if self._flusher is not None:
            self._flusher.cancel()
            await asyncio.wait([self._flusher])
            await self._flush_now()
        await self.read(self.searcher.close)
        for llm in self.llms:
            await llm.aclose()
        for threads in (self._appends, self._writes, self._reads):
            await asyncio.to_thread(threads.shutdown)
        await asyncio.to_thread(self.store.close)

    async def _rubric(self, info: PoolInfo) -> str:
        if info.rubric not in self._rubrics:
            self._rubrics[info.rubric] = await self.read(load_rubric, info.rubric)
        return self._rubrics[info.rubric]


async def _on(threads: ThreadPoolExecutor, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run a blocking call on a thread, in this task's context: its request and its trace."""
    run = partial(copy_context().run, call, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(threads, run)
