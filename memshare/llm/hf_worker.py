"""The thread that owns a model in this process: it batches whatever has queued up meanwhile."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from memshare.llm.base import LLMError, LLMUnavailable, LogLikelihood
from memshare.llm.hf_forward import cut_batches, next_token_probabilities, span_loglikelihoods
from memshare.llm.hf_generate import Row, generate
from memshare.llm.tokens import Span

_GATHER_SECONDS = 0.003  # how long the worker waits for company after the first request
Labels = tuple[list[int], list[int]]  # a prompt's ids, and the label ids to read after it
Work = Span | Labels | Row


@dataclass(slots=True)
class _Job:
    work: Work
    future: Future[Any] = field(default_factory=Future)


class Worker:
    """Runs requests on ``model`` in one thread; the order of results is each caller's own affair.

    What has queued up is sorted by length and cut into batches: all kinds by ``batch_tokens``
    (padded), answers also by ``batch_size``. ``name`` is what errors call the model.
    """

    def __init__(
        self, model: Any, name: str, pad_id: int, batch_tokens: int, batch_size: int
    ) -> None:
        self._model = model
        self._name = name
        self._pad_id = pad_id
        self._batch_tokens = batch_tokens
        self._batch_size = batch_size
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self.closed = False
        self._thread = threading.Thread(target=self._run, name="memshare-llm", daemon=True)
        self._thread.start()

    async def submit(self, work: Work) -> Any:
        """Result of ``work``: a LogLikelihood, probabilities, or the `Row` itself, filled in."""
        job = _Job(work)
        with self._closing:  # nothing may be queued behind the end mark: it would never be answered
            if self.closed:
                raise LLMError(f"{self._name}: the backend is closed")
            self._queue.put(job)
        return await asyncio.wrap_future(job.future)

    def close(self) -> None:
        """Finish what is queued, end the thread and drop the model."""
        with self._closing:
            if self.closed:
                return
            self.closed = True
            self._queue.put(None)
        self._thread.join()
        del self._model

    def _run(self) -> None:
        """The worker: wait for a request, take its company along, answer them in batches."""
        open_ = True
        while open_:
            jobs: list[_Job] = []
            job = self._queue.get()
            deadline = time.monotonic() + _GATHER_SECONDS
            while True:
                if job is None:
                    open_ = False
                    break
                if job.future.set_running_or_notify_cancel():
                    jobs.append(job)
                try:
                    job = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    break
            self._answer([job for job in jobs if isinstance(job.work, Span)], self._spans)
            self._answer([job for job in jobs if isinstance(job.work, tuple)], self._labels)
            self._answer([job for job in jobs if isinstance(job.work, Row)], self._rows)

    def _answer(self, jobs: list[_Job], answer: Callable[[list[Any]], Sequence[Any]]) -> None:
        """Cut ``jobs`` into batches and run them; an error belongs to its batch's callers only."""
        work: list[Any] = [job.work for job in jobs]
        for batch in self._cut(work):
            try:
                results = answer([work[i] for i in batch])
            except Exception as error:  # the policy: who asked is told, the worker lives on
                told = error
                # Who else has a part of the memory, such as a trainer, may give it back.
                if isinstance(error, torch.OutOfMemoryError):
                    told = LLMUnavailable(f"{self._name} has no memory left: {error}")
                for i in batch:
                    jobs[i].future.set_exception(told)
            else:
                for i, result in zip(batch, results, strict=True):
                    jobs[i].future.set_result(result)

    def _cut(self, work: list[Any]) -> list[list[int]]:
        tokens, vocabulary = self._batch_tokens, self._vocabulary
        if not work:
            return []
        if isinstance(work[0], Span):
            read = [len(span.ids) - span.start for span in work]
            return cut_batches([len(span.ids) for span in work], read, tokens, vocabulary)
        if isinstance(work[0], tuple):
            return cut_batches([len(w[0]) for w in work], [1] * len(work), tokens, vocabulary)
        lengths = [len(row.ids) + row.sampling.max_tokens for row in work]
        size = self._batch_size
        batches = cut_batches(lengths, [1] * len(work), tokens, vocabulary)
        return [batch[i : i + size] for batch in batches for i in range(0, len(batch), size)]

    def _spans(self, spans: list[Span]) -> list[LogLikelihood]:
        return span_loglikelihoods(self._model, spans)

    def _labels(self, work: list[Labels]) -> list[list[float]]:
        return next_token_probabilities(self._model, [w[0] for w in work], [w[1] for w in work])

    def _rows(self, rows: list[Row]) -> list[Row]:
        generate(self._model, rows, self._pad_id)
        return rows
