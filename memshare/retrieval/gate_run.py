"""Running the gate: search held-out questions with every rival, judge, decide."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from memshare.config import Config
from memshare.metrics.ir import mean_metrics
from memshare.pool.store import PoolStore
from memshare.progress import log, track
from memshare.records import Memory, normalise
from memshare.retrieval.approximate import exact
from memshare.retrieval.bm25 import BM25
from memshare.retrieval.build import Built
from memshare.retrieval.canaries import judge_canaries, read_canaries
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.filters import Filter
from memshare.retrieval.gate import GateResult, Runs, Sample, choose_queries, decide, judge
from memshare.retrieval.generation import Generation, best, load, load_current
from memshare.retrieval.manifest import DamagedGeneration, NoGeneration
from memshare.retrieval.serving import FROZEN, Query, Serving, frozen_serving
from memshare.retrieval.text import memory_text

_SHOWN = 3  # memories of each retriever in a sample
_BLOCK = 64  # questions searched at a time

# Gains of candidates for one query's answer: nats per token over no example, or 1 / 0 by labels.
Gains = Sequence[float]
Relevance = Callable[[Memory, Sequence[Memory]], Awaitable[Gains]]


def run_gate(
    store: PoolStore,
    config: Config,
    current: Serving,
    following: Serving,
    best: Serving | None,
    queries: Sequence[Memory],
    relevance: Relevance,
) -> GateResult:
    """Judge ``following`` against ``current`` and ``best`` (None: the current one is the best).

    Each `Serving` must be caught up, so that all search the same memories. At most
    ``gate.max_queries`` of ``queries`` (held-out memories) are used. A question is never answered
    with itself or a copy of it. ``relevance`` gives the gain of each candidate; all queries are
    judged concurrently, in an event loop of this call's own.
    Where ``gate.canaries`` names some, they must be found as well as before, too. Raises
    `CanaryError` where the file can't be used.
    """
    rivals = {"current": current, "next": following} | ({} if best is None else {"best": best})
    verdict = _judge_held_out(store, config, rivals, queries, relevance)
    if config.gate.canaries is None:
        return verdict
    canaries = judge_canaries(store, config.gate, read_canaries(config.gate.canaries), rivals)
    figures = {**verdict.figures, "canaries": canaries.figures}
    if not canaries.failures:
        return replace(verdict, figures=figures)
    failures = canaries.failures if verdict.passed else (verdict.reason, *canaries.failures)
    return replace(verdict, passed=False, reason="; ".join(failures), figures=figures)


def _judge_held_out(
    store: PoolStore,
    config: Config,
    rivals: Mapping[str, Serving],
    queries: Sequence[Memory],
    relevance: Relevance,
) -> GateResult:
    current, following, best = rivals["current"], rivals["next"], rivals.get("best")
    chosen = choose_queries(
        [query for query in queries if query.pool in following.shards],
        config.gate.max_queries,
        config.run.seed,
    )
    if not chosen:
        return GateResult(True, "no held-out queries", 0)
    copies = _copies(store, chosen)
    depth = config.gate.depth
    runs = {name: _search(rival, chosen, depth, copies) for name, rival in rivals.items()}
    runs["bm25"] = _search_bm25(store, config, chosen, depth, copies)
    gains = _gains(store, chosen, runs, relevance)
    metrics = judge(runs, gains, config.relevant_above)
    verdict = decide(
        metrics["current"], metrics["next"], metrics.get("best"), config.gate, config.run.seed
    )
    if not verdict.queries:
        return replace(verdict, reason="no held-out query has a relevant memory")
    top, champion = metrics["next"], best or current
    earlier = mean_metrics(metrics["best" if best is not None else "current"])
    is_best = mean_metrics(top)["nDCG@10"] >= earlier["nDCG@10"]
    figures = {
        **verdict.figures,
        "bm25": mean_metrics(metrics["bm25"]),
        "generations": {name: rival.number for name, rival in rivals.items() if name != "next"},
        "without_relevant": len(chosen) - verdict.queries,
    }
    shown = [query for query in chosen if query.id in top][: config.wandb.samples]
    return replace(
        verdict,
        figures=figures,
        best=None if is_best else champion.number,
        samples=_samples(store, shown, {name: runs[name] for name in ("current", "next")}, gains),
    )


def _samples(
    store: PoolStore,
    queries: Sequence[Memory],
    runs: Mapping[str, Runs],
    gains: Mapping[str, Mapping[str, float]],
) -> tuple[Sample, ...]:
    """The first memories that each retriever found for some questions."""
    wanted = {id for run in runs.values() for query in queries for id in run[query.id][:_SHOWN]}
    found = store.get_many(list(wanted))
    return tuple(
        Sample(
            query.prompt, name, rank, memory_text(found[id].prompt, found[id].answer),
            gains[query.id][id],
        )
        for query in queries
        for name, run in runs.items()
        for rank, id in enumerate(run[query.id][:_SHOWN], 1)
        if id in found and id in gains[query.id]
    )  # fmt: skip


def gate_built(
    store: PoolStore,
    config: Config,
    encoder: Encoder,
    built: Built,
    queries: Sequence[Memory],
    relevance: Relevance,
) -> GateResult:
    """`run_gate` for rows that are about to be published, against what is on disk.

    The current generation is CURRENT (an intact older one if it is damaged, the configured encoder
    if there is none); the best so far is what the newest generation names. All are searched
    exactly, whatever kind of index they have.
    """
    home, device = config.retriever_dir, config.encoder.device
    with ExitStack() as stack:
        try:
            generation = load_current(home, device)
        except DamagedGeneration as error:
            log(f"the gate compares with the configured encoder: {error}")
            generation = None
        if generation is None:
            current = frozen_serving(config)
        else:
            stack.enter_context(generation)
            current = _exact(generation, store, config)
        champion, number = None, best(home)
        if number == FROZEN != current.number:
            champion = frozen_serving(config)
        elif number not in (None, current.number):
            try:
                kept = stack.enter_context(load(home, number, device))
                champion = _exact(kept, store, config)
            except (NoGeneration, DamagedGeneration) as error:
                log(f"the gate can't compare with the best so far: {error}")
        following = Serving.of_built(encoder, built, store)
        if queries or config.gate.canaries is not None:
            for rival in (current, following, champion):
                if rival is not None:
                    rival.encoder.compute_as(config.encoder)  # as it would serve
                    rival.catch_up(store)
        verdict = run_gate(store, config, current, following, champion, queries, relevance)
        # Where nothing could be measured, the best stays the best.
        return verdict if verdict.queries else replace(verdict, best=number)


def _exact(generation: Generation, store: PoolStore, config: Config) -> Serving:
    """A generation whose rows are all looked at, as the next one's are: encoders are compared."""
    for pool in list(generation.indexes):
        generation.indexes[pool] = exact(generation.indexes[pool])
    return Serving.of(generation, store, config.served_pools)


def _copies(store: PoolStore, queries: Sequence[Memory]) -> dict[str, frozenset[str]]:
    """For each query the memories of its pool with the same prompt, itself included."""
    same: dict[tuple[str, str], set[str]] = {
        (query.pool, normalise(query.prompt)): {query.id} for query in queries
    }
    for pool in sorted({query.pool for query in queries}):
        for memory in store.iter(pool):
            found = same.get((pool, normalise(memory.prompt)))
            if found is not None:
                found.add(memory.id)
    return {query.id: frozenset(same[query.pool, normalise(query.prompt)]) for query in queries}


def _search(
    serving: Serving, queries: Sequence[Memory], depth: int, copies: dict[str, frozenset[str]]
) -> dict[str, list[str]]:
    runs = {}
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK]
        answers = serving.answer(
            [
                Query(query.pool, query.prompt, depth, Filter(exclude=copies[query.id]))
                for query in block
            ]
        )
        for query, answer in zip(block, answers, strict=True):
            runs[query.id] = [hit.id for hit in answer.hits]
    return runs


def _search_bm25(
    store: PoolStore,
    config: Config,
    queries: Sequence[Memory],
    depth: int,
    copies: dict[str, frozenset[str]],
) -> dict[str, list[str]]:
    by_pool: dict[str, list[Memory]] = defaultdict(list)
    for query in queries:
        by_pool[query.pool].append(query)
    runs = {}
    for pool, members in by_pool.items():
        texts = {item.id: memory_text(item.prompt, item.answer) for item in store.iter(pool)}
        index = BM25(config.bm25).fit(list(texts), list(texts.values()))
        found = index.top(
            [query.prompt for query in members], depth, [copies[query.id] for query in members]
        )
        for query, ranked in zip(members, found, strict=True):
            runs[query.id] = [id for id, _ in ranked]
    return runs


def _gains(
    store: PoolStore,
    queries: Sequence[Memory],
    runs: dict[str, dict[str, list[str]]],
    relevance: Relevance,
) -> dict[str, dict[str, float]]:
    """Query id -> memory id -> gain, over the union of what the runs return."""
    candidates: list[list[Memory]] = []
    for query in track(queries, "gate: judging"):
        union = sorted({id for run in runs.values() for id in run[query.id]})
        living = store.get_many(union)
        candidates.append([living[id] for id in union if id in living and not living[id].held])

    async def judged() -> list[Gains]:
        return await asyncio.gather(*map(relevance, queries, candidates))

    return {
        query.id: {memory.id: float(gain) for memory, gain in zip(found, gains, strict=True)}
        for query, found, gains in zip(queries, candidates, asyncio.run(judged()), strict=True)
    }
