"""What /metrics tells Prometheus. One registry an application, so that several fit in a process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from memshare.pool.errors import PoolError
from memshare.retrieval.searcher import SearcherStats

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Figures of the database, read when Prometheus asks: of the queue and each pool.

    ``changes`` is a pool's position, the number of changes it has seen (`PoolInfo.last_seq`).
    """

    scoring_queue: int
    memories: dict[str, int]
    held: dict[str, int]
    changes: dict[str, int]


class _SizesCollector(Collector):
    def __init__(self, searcher: Callable[[], SearcherStats], read: Callable[[], Sizes]) -> None:
        self._searcher = searcher
        self._read = read

    def collect(self) -> Iterable[Metric]:
        stats = self._searcher()  # first: a pool has changed at least as often as it has seen
        try:
            sizes = self._read()
        except PoolError:  # that is when the other figures are wanted most
            sizes = None
        yield from self._of_searcher(stats)
        away = "1: the database can't be read, and its figures are missing"
        yield GaugeMetricFamily("memshare_database_error", away, value=float(sizes is None))
        if sizes is not None:
            yield from self._of_database(sizes, stats)

    def _of_searcher(self, stats: SearcherStats) -> Iterable[Metric]:
        last = stats.swaps[-1] if stats.swaps else None
        for name, text, value in (
            ("generation", "Number of the generation that answers", stats.generation or 0),
            ("generation_error", "1: CURRENT can't be served", stats.generation_error is not None),
            ("feed_error", "1: the pools can't be followed", stats.feed_error is not None),
            ("load_seconds", "Loading the latest one", last.load_seconds if last else 0),
            ("swap_seconds", "No search ran while it came in", last.swap_seconds if last else 0),
            ("search_queue", "Searches that wait for the next batch", stats.queue_depth),
            ("delta_rows", "Memories newer than the generation's index", stats.delta_rows),
        ):
            yield GaugeMetricFamily(f"memshare_{name}", text, value=float(value))
        for name, text, count in (
            # The first one is the start.
            ("swaps", "Generations swapped in", max(0, len(stats.swaps) - 1)),
            ("search_batches", "Batches of searches", stats.batches),
            ("searches", "Searches answered", stats.answered),
            ("searches_failed", "Searches failed", stats.failed),
        ):
            yield CounterMetricFamily(f"memshare_{name}", text, value=count)

    def _of_database(self, sizes: Sizes, stats: SearcherStats) -> Iterable[Metric]:
        waiting = "Pairs without a decision, of all gateways"
        yield GaugeMetricFamily("memshare_scoring_queue", waiting, value=sizes.scoring_queue)
        lag = {pool: sizes.changes[pool] - seq for pool, seq in stats.positions.items()}
        for name, text, by_pool in (
            ("memories", "Living memories", sizes.memories),
            ("memories_held", "Held memories", sizes.held),
            ("changes_behind", "Changes of a pool that the searcher has not seen so far", lag),
        ):
            family = GaugeMetricFamily(f"memshare_{name}", text, labels=["pool"])
            for pool, value in by_pool.items():
                family.add_metric([pool], max(0, value))
            yield family


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
            "Time by stage: retrieve, prompt, llm (first byte of a stream), score, store",
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
        self.active = Gauge(
            "memshare_active_requests",
            "Requests being answered: chat, memory (all other)",
            ["kind"],
            registry=self.registry,
        )
        self.shed = Counter(
            "memshare_shed",
            "Requests refused with 429: busy, queue (of the scorer), rate (of a key)",
            ["reason"],
            registry=self.registry,
        )

        self.feedback = Counter(
            "memshare_feedback",
            "Opinions given of memories",
            ["pool", "sign"],
            registry=self.registry,
        )
        self.llm_up = Gauge(
            "memshare_llm_up", "1: the LLM can be reached", ["llm"], registry=self.registry
        )
        ProcessCollector(registry=self.registry)

    def observe(self, stage: str, seconds: float) -> None:
        """One stage of a turn took this long."""
        self.stage_seconds.labels(stage).observe(seconds)

    def watch(self, searcher: Callable[[], SearcherStats], read: Callable[[], Sizes]) -> None:
        """Export both, read anew at every scrape; ``read`` may raise `PoolError`."""
        self.registry.register(_SizesCollector(searcher, read))

    def render(self) -> bytes:
        """The exposition text. Blocking: it asks the store for sizes."""
        return generate_latest(self.registry)
