"""Spans of a request's pair belong to the request's trace, whoever works on it, and when."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Receive, Scope, Send

from memshare import tracing
from memshare.gateway.app import create_app
from memshare.gateway.background import ScoringQueue
from memshare.gateway.metrics import Metrics
from memshare.llm.base import LLMUnavailable
from memshare.llm.scorer import Scorer
from memshare.pool.queue import PairQueue
from memshare.pool.store import PoolStore
from memshare.records import Grade, Pair
from memshare.sharing import SharedMemory, assemble, open_shared
from tests.loop import loop_config
from tests.unit.gateway.conftest import LOCAL
from tests.unit.gateway.test_chat import STOPS

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE = int(CALLER.split("-")[1], 16)


class Traces:
    """Finished spans of this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, provider: TracerProvider) -> None:
        self._exporter = InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = provider.get_tracer("test")
        monkeypatch.setattr(tracing, "_tracer", self.tracer)

    def spans(self, *names: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name in names]


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Traces:
    return Traces(monkeypatch, TracerProvider())


class Instrumented:
    """As OpenTelemetry's instrumentation of ASGI: a span a request, below the caller's."""

    def __init__(self, app: ASGIApp, traces: Traces) -> None:
        self.app = app
        self.traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope.get("headers", ())}
        above = TraceContextTextMapPropagator().extract(headers)
        with self.traces.tracer.start_as_current_span("request", above):
            await self.app(scope, receive, send)


class Grades(Scorer):
    """90 for everything; away for the first ``absences`` calls."""

    def __init__(self, absences: int = 0) -> None:
        self.absences = absences

    async def _grade(self, prompt: str, answer: str, rubric_text: str) -> Grade:
        if self.absences:
            self.absences -= 1
            raise LLMUnavailable(f"PLANTED {prompt}")
        return Grade(90.0)


def parents(spans: Sequence[ReadableSpan]) -> set[int | None]:
    return {span.parent.span_id if span.parent else None for span in spans}


def ids(spans: Sequence[ReadableSpan]) -> set[int]:
    return {span.context.span_id for span in spans}


@pytest.mark.parametrize("stream", [False, True])
def test_a_chats_pair_is_graded_and_stored_in_its_trace(
    tmp_path: Path, models: Path, traces: Traces, stream: bool
) -> None:
    shared = assemble(loop_config(tmp_path, models))
    shared.scorer = Grades()
    app = create_app(shared)
    app.add_middleware(Instrumented, traces=traces)
    with TestClient(app, LOCAL) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.02)
        seeds = itertools.count()
        while not traces.spans("store"):  # the answers of some seeds are cut off, or empty
            body = {
                "messages": [{"role": "user", "content": "Why?"}], "memory": {"shots": 0},
                "stream": stream, "seed": next(seeds), "temperature": 1.0, "stop": STOPS,
            }  # fmt: skip
            reply = client.post("/v1/chat/completions", json=body, headers={"traceparent": CALLER})
            assert reply.status_code == 200, reply.text
    decided = traces.spans("decide")
    assert parents(decided) <= ids(traces.spans("request"))
    assert {span.kind for span in decided} == {SpanKind.CONSUMER}
    assert ids(decided) == parents(traces.spans("score")) == parents(traces.spans("store"))
    graded = [*decided, *traces.spans("score", "store")]
    assert {span.context.trace_id for span in graded} == {TRACE}


def test_a_pair_of_a_dead_gateway_stays_in_its_trace(
    tmp_path: Path, models: Path, traces: Traces
) -> None:
    """Another gateway takes it over, fails, and comes to it once more."""
    config = loop_config(tmp_path, models)

    async def first(shared: SharedMemory) -> None:
        queue = ScoringQueue(shared, Metrics())
        with traces.tracer.start_as_current_span("request"):
            await queue.put([Pair("keep", "Why?", "Because.")])
        await queue.put([Pair("keep", "How?", "So.")])  # nobody traced it
        PairQueue(shared.store.database).claim(2, 0.1)  # and then it is gone

    async def second(shared: SharedMemory) -> None:
        shared.scorer = Grades(absences=1)
        queue = ScoringQueue(shared, Metrics())
        queue.start()
        await queue.join()
        await queue.stop()

    async def run() -> None:
        for gateway in (first, second):
            async with open_shared(config) as shared:
                await gateway(shared)

    asyncio.run(run())
    (request,) = traces.spans("request")
    mine = [s for s in traces.spans("decide") if s.context.trace_id == request.context.trace_id]
    others = [s for s in traces.spans("decide") if s not in mine]
    assert parents(mine) == ids([request]) and parents(others) == {None}
    tries = [(span.status.description, span.status.is_ok) for span in (*mine, *others)]
    assert tries.count(("LLMUnavailable", False)) == 1 and len(tries) == 3
    assert len(traces.spans("store")) == 2
    assert parents(traces.spans("score")) == ids([*mine, *others])
    assert "PLANTED" not in "".join(s.to_json() for s in traces.spans("decide", "score", "store"))


def test_what_is_not_sampled_stays_so(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever began the trace has decided that it is not recorded, and none of it is."""
    traces = Traces(monkeypatch, TracerProvider(sampler=ParentBased(ALWAYS_OFF)))

    async def run() -> None:
        async with open_shared(loop_config(tmp_path, models)) as shared:
            shared.scorer = Grades()
            queue = ScoringQueue(shared, Metrics())
            with traces.tracer.start_as_current_span("request"):
                await queue.put([Pair("keep", "Why?", "Because.")])
            queue.start()
            await queue.join()
            await queue.stop()

    asyncio.run(run())
    assert not traces.spans("request", "decide", "score", "store")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PoolStore]:
    with PoolStore.open(f"sqlite:///{tmp_path}/pool.db") as store:
        store.create_pool("main")
        yield store


def test_the_state_of_vendors_travels_along_and_without_a_trace_nothing_does(
    store: PoolStore, traces: Traces
) -> None:
    queue = PairQueue(store.database)
    queue.put([Pair("main", "1", "a")])
    sent = {"traceparent": CALLER, "tracestate": "vendor=opaque"}
    above = TraceContextTextMapPropagator().extract(sent)
    with traces.tracer.start_as_current_span("request", above):
        queue.put([Pair("main", "2", "a")])
    first, second = queue.claim(2, 60)
    assert first.trace is None and second.trace is not None
    assert second.trace["tracestate"] == "vendor=opaque"
    assert second.trace["traceparent"].split("-")[1] == CALLER.split("-")[1]
    with store.database.read() as connection:
        rows = connection.exec_driver_sql("SELECT trace FROM pending WHERE trace IS NULL").all()
    assert len(rows) == 1
