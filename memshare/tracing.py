"""Spans of OpenTelemetry's API, and how a trace goes on where its work does.

Nothing here exports anything: spans cost next to nothing until a program sets a provider up. What
is done later, by another task or another process, carries its trace along in W3C Trace Context's
own form (https://www.w3.org/TR/trace-context/), so that it becomes part of the same trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_tracer = trace.get_tracer("memshare")
_w3c = TraceContextTextMapPropagator()


@contextmanager
def span(name: str) -> Iterator[None]:
    """A span of the trace that this context belongs to."""
    with _started(name, None, trace.SpanKind.INTERNAL):
        yield


@contextmanager
def resumed(name: str, carrier: Mapping[str, str] | None) -> Iterator[None]:
    """A span of the trace that `carried` returned, there and then, as ``carrier``; else a root."""
    with _started(name, _w3c.extract(carrier or {}, Context()), trace.SpanKind.CONSUMER):
        yield


def carried() -> dict[str, str] | None:
    """This context's trace for work that is done later: traceparent, tracestate; None: no trace."""
    carrier: dict[str, str] = {}
    _w3c.inject(carrier)
    return carrier or None


@contextmanager
def _started(name: str, context: Context | None, kind: trace.SpanKind) -> Iterator[None]:
    """A failure is named by its type: its message may quote a memory, and traces go far."""
    with _tracer.start_as_current_span(
        name, context, kind, record_exception=False, set_status_on_exception=False
    ) as started:
        try:
            yield
        except BaseException as error:
            started.set_status(trace.StatusCode.ERROR, type(error).__name__)
            raise
