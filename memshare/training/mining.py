"""Mining: every new memory (x, y) becomes a training example (step 5 of the loop).

BM25 proposes ``mining.candidates`` memories for x, itself and its copies (same normalised prompt)
left out; a labeller says what each is worth (`labels`). Held-out memories are neither queries nor
candidates; those that the split gives to neither side are candidates only. As in EPR (Rubin et al.
2022) and LLM-R (Wang et al. 2023), except that the pool grows and only new memories are mined.

A round is planned once (``plan.json``: which query goes into which shard) and then worked off shard
by shard. Each shard is written atomically, so a restarted run goes on at the first one missing.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memshare.config import Config
from memshare.files import write_json
from memshare.pool.store import PoolStore
from memshare.progress import log, track
from memshare.records import Candidate, Example, Memory, answer_key, normalise
from memshare.retrieval.bm25 import BM25
from memshare.retrieval.text import memory_text
from memshare.training.examples import (
    ExamplesError,
    is_whole,
    read_examples,
    read_marker,
    shard_path,
    write_marker,
    write_shard,
)
from memshare.training.labels import Labeller
from memshare.training.rounds import Span, new_ids
from memshare.training.split import Fate, kept_split

PLAN = "plan.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """The queries of one shard, all from one pool."""

    pool: str
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a round mines; ``left_out`` counts new memories that are no queries, by reason."""

    round: int
    spans: Mapping[str, Span]
    settings: Mapping[str, Any]
    left_out: Mapping[str, int]
    shards: tuple[Shard, ...]


def split_memories(store: PoolStore, config: Config) -> dict[str, Fate]:
    """Every memory's fate, over all served pools, kept in the run folder from call to call.

    Memories on hold take part, so that releasing one moves no other.
    """
    memories = (
        memory for pool in config.served_pools for memory in store.iter(pool, include_held=True)
    )
    return kept_split(config.run.dir / "split.json", memories, config.split)


def plan_round(
    store: PoolStore,
    config: Config,
    number: int,
    spans: Mapping[str, Span],
    fates: Mapping[str, Fate],
    folder: Path,
) -> Plan:
    """The plan of round ``number``, read back where it stands already.

    Raises `ExamplesError` where it was begun with other settings or over other spans.
    """
    settings = _settings(config)
    path = folder / PLAN
    if path.exists():
        plan = read_plan(folder)
        if plan.settings != settings or plan.spans != spans:
            raise ExamplesError(
                f"{path}: round {number} was begun with {dict(plan.settings)} over {plan.spans}, "
                f"not {settings} over {dict(spans)}; finish it with those, or delete {folder}"
            )
        return plan
    shards: list[Shard] = []
    left_out: dict[str, int] = defaultdict(int)
    for pool, span in spans.items():
        ids = new_ids(store, pool, span)
        alive = store.get_many(ids)
        queries = []
        for memory_id in ids:
            memory = alive.get(memory_id)
            if memory is None or memory.held:
                left_out["deleted or on hold"] += 1
            elif (fate := fates.get(memory_id)) != "train":
                left_out["held out" if fate == "held_out" else "near both sides"] += 1
            else:
                queries.append(memory_id)
        size = config.mining.shard_rows
        shards += [
            Shard(pool, tuple(queries[start : start + size]))
            for start in range(0, len(queries), size)
        ]
    plan = Plan(number, dict(spans), settings, dict(left_out), tuple(shards))
    write_json(path, asdict(plan))
    return plan


def read_plan(folder: Path) -> Plan:
    """The plan of a round. Raises `ExamplesError` if it is missing or damaged."""
    try:
        row = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        spans = {pool: Span(**span) for pool, span in row["spans"].items()}
        shards = tuple(Shard(item["pool"], tuple(item["ids"])) for item in row["shards"])
        return Plan(int(row["round"]), spans, row["settings"], row["left_out"], shards)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExamplesError(
            f"{folder / PLAN}: unreadable ({error!r}); delete {folder} to mine the round again"
        ) from error


def _settings(config: Config) -> dict[str, Any]:
    """What must not change within a round."""
    mining = config.mining.model_dump(mode="json")
    llm = None if config.mining.labels in ("none", "given") else config.scorer_llm.model
    return {**mining, "bm25": config.bm25.model_dump(mode="json"), "scorer": llm}


async def mine(
    store: PoolStore,
    config: Config,
    plan: Plan,
    fates: Mapping[str, Fate],
    labeller: Labeller,
    folder: Path,
) -> dict[str, Any]:
    """Write the shards of ``plan`` that are missing, then the round's marker, which is returned.

    Memories deleted or put on hold meanwhile are skipped. An LLM that fails stops the round; what
    was scored until then stays in the cache.
    """
    if is_whole(folder):
        return read_marker(folder)
    begun = time.monotonic()
    pool_index: _PoolIndex | None = None
    missing = [i for i in range(len(plan.shards)) if not shard_path(folder, i).exists()]
    if len(missing) < len(plan.shards):
        log(f"round {plan.round}: {len(plan.shards) - len(missing)} shard(s) were done before")
    for index in missing:
        shard = plan.shards[index]
        if pool_index is None or pool_index.pool != shard.pool:
            pool_index = _PoolIndex(store, config, shard.pool, plan.spans[shard.pool].until, fates)
        title = f"round {plan.round}: mining shard {index + 1}/{len(plan.shards)}"
        examples = await _mine_shard(store, config, plan.round, shard, pool_index, labeller, title)
        write_shard(shard_path(folder, index), examples)
    marker = _marker(plan, labeller, folder, time.monotonic() - begun)
    write_marker(folder, marker)
    return marker


class _PoolIndex:
    """BM25 over one pool's candidates, and which of them are copies of one another."""

    def __init__(
        self, store: PoolStore, config: Config, pool: str, until: int, fates: Mapping[str, Fate]
    ) -> None:
        self.pool = pool
        self.copies: dict[str, list[str]] = defaultdict(list)
        ids, texts = [], []
        for memory in store.iter(pool, until_seq=until):
            if fates.get(memory.id) != "held_out":
                ids.append(memory.id)
                texts.append(memory_text(memory.prompt, memory.answer))
                self.copies[normalise(memory.prompt)].append(memory.id)
        self.bm25 = BM25(config.bm25).fit(ids, texts)

    def candidates(self, queries: Sequence[Memory], count: int) -> list[list[str]]:
        """Ids for each query, best first, without itself and its copies."""
        exclude = [{q.id, *self.copies.get(normalise(q.prompt), ())} for q in queries]
        hits = self.bm25.top([query.prompt for query in queries], count, exclude)
        return [[memory_id for memory_id, _ in row] for row in hits]


async def _mine_shard(
    store: PoolStore,
    config: Config,
    number: int,
    shard: Shard,
    index: _PoolIndex,
    labeller: Labeller,
    title: str,
) -> list[Example]:
    alive = store.get_many(shard.ids)
    queries = [alive[i] for i in shard.ids if i in alive and not alive[i].held]
    proposed = index.candidates(queries, config.mining.candidates)
    found = store.get_many([memory_id for row in proposed for memory_id in row])
    tasks = []
    for query, ids in zip(queries, proposed, strict=True):
        candidates = [(rank, found[i]) for rank, i in enumerate(ids) if i in found]
        work = _example(query, candidates, config, number, labeller)
        tasks.append(asyncio.create_task(work))
    try:
        return [await task for task in track(tasks, title)]
    finally:  # after an error: no stray LLM calls
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _example(
    query: Memory,
    candidates: Sequence[tuple[int, Memory]],
    config: Config,
    number: int,
    labeller: Labeller,
) -> Example:
    measure = labeller.measure
    baseline: float | None = None
    worth: Sequence[float | None] = [None] * len(candidates)
    if measure is not None:
        if labeller.has_baseline and config.mining.baseline:
            baseline = await measure(query, None)
        worth = await asyncio.gather(*(measure(query, memory) for _, memory in candidates))
    rows = [
        _candidate(memory, rank, value)
        for (rank, memory), value in zip(candidates, worth, strict=True)
    ]
    if measure is None:  # its own memory is the positive
        rows.insert(0, _candidate(query, -1, None))
    return Example(
        query_id=query.id,
        query=query.prompt,
        answer=query.answer,
        pool=query.pool,
        principal=query.agent,
        round=number,
        seq=query.seq,
        scorer=labeller.scorer,
        labels=config.mining.labels,
        baseline_loglik=baseline,
        candidates=tuple(rows),
    )


def _candidate(memory: Memory, rank: int, worth: float | None) -> Candidate:
    text = memory_text(memory.prompt, memory.answer)
    return Candidate(memory.id, text, rank, worth, answer_key(memory.answer))


def _marker(plan: Plan, labeller: Labeller, folder: Path, seconds: float) -> dict[str, Any]:
    """The round in figures. ``unmeasured``: candidates that got no score though they should.

    ``llm_calls`` and ``seconds`` are those of the run that finished it.
    """
    examples = candidates = unmeasured = 0
    for example in read_examples(folder, len(plan.shards)):
        examples += 1
        candidates += len(example.candidates)
        unmeasured += sum(item.loglik is None for item in example.candidates)
    return {
        "round": plan.round,
        "spans": {pool: asdict(span) for pool, span in plan.spans.items()},
        "labels": plan.settings["labels"],
        "scorer": labeller.scorer,
        "shards": len(plan.shards),
        "examples": examples,
        "candidates": candidates,
        "unmeasured": unmeasured if labeller.measure is not None else 0,
        "left_out": dict(plan.left_out),
        "llm_calls": labeller.calls(),
        "seconds": seconds,
    }
