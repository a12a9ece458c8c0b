"""What /metrics tells Prometheus. One registry an application, so that several fit in a process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Figures read when Prometheus asks: the searcher's, and memories by pool."""

    generation: int
    swaps: int
    swap_seconds: float
    search_queue: int
    memories: dict[str, int]
    held: dict[str, int]


class _SizesCollector(Collector):
    def __init__(self, read: Callable[[], Sizes]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        sizes = self._read()
        for name, text, value in (
            ("generation", "Number of the generation that answers", sizes.generation),
            ("swaps", "Generations swapped in since the start", sizes.swaps),
            ("swap_seconds", "How long the latest swap took", sizes.swap_seconds),
            ("search_queue", "Searches that wait for the next batch", sizes.search_queue),
        ):
            yield GaugeMetricFamily(f"memshare_{name}", text, value=value)
        memories = GaugeMetricFamily("memshare_memories", "Living memories", labels=["pool"])
        held = GaugeMetricFamily("memshare_memories_held", "Held memories", labels=["pool"])
        for pool, count in sizes.memories.items():
            memories.add_metric([pool], count)
            held.add_metric([pool], sizes.held[pool])
        yield memories
        yield held


class Metrics:
    """The gateway's counters and histograms; `watch` adds figures that are read on demand."""

    def __init__(self) -> None:
        """An empty registry with every metric declared."""
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "memshare_requests",
            "Requests answered",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "memshare_request_seconds",
            "From request to the last byte of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "memshare_stage_seconds",
            "Time by stage: retrieve, llm (first byte of a stream), score, store",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.decisions = Counter(
            "memshare_decisions",
            "Pairs decided, by reason",
            ["pool", "reason"],
            registry=self.registry,
        )
        self.scoring_queue = Gauge(
            "memshare_scoring_queue", "Pairs that wait for a decision", registry=self.registry
        )

    def observe(self, stage: str, seconds: float) -> None:
        """One stage of a turn took this long."""
        self.stage_seconds.labels(stage).observe(seconds)

    def watch(self, read: Callable[[], Sizes]) -> None:
        """Export `Sizes`, read anew at every scrape."""
        self.registry.register(_SizesCollector(read))

    def render(self) -> bytes:
        """The exposition text. Blocking: it asks the store for sizes."""
        return generate_latest(self.registry)


class RequestMetrics:
    """ASGI middleware that counts and times requests by route, streams until their last byte."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Wrap ``app``."""
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            # The route's template, never the path itself: labels must stay few.
            route: Any = scope.get("route")
            path = getattr(route, "path", None) or "unmatched"
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.metrics.requests.labels(method, path, str(status)).inc()
            self.metrics.request_seconds.labels(path).observe(time.perf_counter() - started)


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
