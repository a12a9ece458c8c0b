"""Mining: every new memory (x, y) becomes a training example (step 5 of the loop).

BM25 and the serving retriever propose memories for x (`proposals`), itself and its copies (same
normalised prompt) left out; a labeller says what each is worth (`labels`). Held-out memories are
neither queries nor candidates; those that the split gives to neither side are candidates only. As
in EPR (Rubin et al. 2022) and LLM-R (Wang et al. 2023), except that the pool grows: a round mines
what is new, and a sample of what is older (``mining.replay``) again, so that nothing is forgotten.
Older examples are not used as they are: a weaker retriever proposed their candidates.

Where training is to be evaluated (``training.eval_every``), some held-out memories get candidates
and labels in the same way, into a folder of their own (`held_out_dir`).

A round is planned once (``plan.json``: which query goes into which shard) and then worked off shard
by shard. Each shard is written atomically, so a restarted run goes on at the first one missing.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from memshare.config import Config
from memshare.files import write_json
from memshare.pool.store import PoolStore
from memshare.progress import log, track
from memshare.records import Candidate, Example, Memory, answer_key
from memshare.retrieval.gate import choose_queries
from memshare.retrieval.text import memory_text
from memshare.training.examples import (
    ExamplesError,
    held_out_dir,
    is_whole,
    read_examples,
    read_marker,
    shard_path,
    write_marker,
    write_shard,
)
from memshare.training.journal import Span
from memshare.training.labels import Labeller, Share
from memshare.training.proposals import PoolProposals, Proposal, Proposer, disliked
from memshare.training.relevance import judging
from memshare.training.rounds import new_ids
from memshare.training.select import text_key
from memshare.training.split import Fate, kept_split

PLAN = "plan.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """The queries of one shard, all from one pool."""

    pool: str
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a round mines; ``left_out`` counts new memories that are no queries, by reason.

    ``proposer`` is the generation whose encoder proposes beside BM25 (0: the configured encoder),
    or the folder of one; None: BM25 alone. ``replayed`` counts the queries that are older than the
    round's spans. ``held_out``: the shards of what only evaluates.
    """

    round: int
    spans: Mapping[str, Span]
    settings: Mapping[str, Any]
    proposer: int | str | None
    left_out: Mapping[str, int]
    replayed: int
    shards: tuple[Shard, ...]
    held_out: tuple[Shard, ...] = ()


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
    proposer: int | str | None,
) -> Plan:
    """The plan of round ``number``, read back where it stands already.

    Raises `ExamplesError` where it was begun with other settings or over other spans.
    """
    settings = _settings(config)
    path = folder / PLAN
    if path.exists():
        plan = read_plan(folder)
        if (plan.settings, plan.spans, plan.proposer) != (settings, spans, proposer):
            raise ExamplesError(
                f"{path}: round {number} was begun with {dict(plan.settings)} over {plan.spans}, "
                f"not {settings} over {dict(spans)}; finish it with those, or delete {folder}"
            )
        return plan
    shards: list[Shard] = []
    left_out: dict[str, int] = defaultdict(int)
    replayed = 0
    for pool, span in spans.items():
        ids, out = new_ids(store, pool, span), disliked(store, config, pool)
        alive = store.get_many(ids)
        queries = []
        for memory_id in ids:
            memory = alive.get(memory_id)
            if memory is None or memory.held:
                left_out["deleted or on hold"] += 1
            elif memory_id in out:
                left_out["disliked"] += 1
            elif (fate := fates.get(memory_id)) != "train":
                left_out["held out" if fate == "held_out" else "near both sides"] += 1
            else:
                queries.append(memory_id)
        draw = random.Random(f"{config.run.seed}/{number}/{pool}")
        earlier = _earlier(store, pool, span, fates, out.union(queries))
        again = draw.sample(earlier, min(len(earlier), round(config.mining.replay * len(queries))))
        replayed += len(again)
        queries += again
        shards += _shards(pool, queries, config)
    held_out = _held_out(store, config, spans, fates)
    plan = Plan(
        number, dict(spans), settings, proposer, dict(left_out), replayed, tuple(shards), held_out
    )
    write_json(path, asdict(plan))
    return plan


def _shards(pool: str, ids: Sequence[str], config: Config) -> list[Shard]:
    size = config.mining.shard_rows
    return [Shard(pool, tuple(ids[start : start + size])) for start in range(0, len(ids), size)]


def _held_out(
    store: PoolStore, config: Config, spans: Mapping[str, Span], fates: Mapping[str, Fate]
) -> tuple[Shard, ...]:
    """The held-out memories, old and new, that training is evaluated on; none unless it asks.

    The gate takes the first by its order, so these are the last: where there are enough, what chose
    the best step does not judge the result as well. Later rounds take much the same ones, whose
    likelihoods are in the cache.
    """
    if config.training.eval_every is None:
        return ()
    memories = [
        memory
        for pool, span in spans.items()
        for memory in store.iter(pool, until_seq=span.until)
        if fates.get(memory.id) == "held_out"
    ]
    ordered = choose_queries(memories, len(memories), config.run.seed)
    chosen = ordered[-config.mining.held_out_queries :]
    return tuple(
        shard
        for pool in spans
        for shard in _shards(pool, [item.id for item in chosen if item.pool == pool], config)
    )


def _earlier(
    store: PoolStore, pool: str, span: Span, fates: Mapping[str, Fate], out: frozenset[str]
) -> list[str]:
    """Memories from before the round that may be its queries, in their order, all but ``out``."""
    if span.since == 0:
        return []
    return [
        memory.id
        for memory in store.iter(pool, until_seq=span.since)
        if fates.get(memory.id) == "train" and memory.id not in out
    ]


def read_plan(folder: Path) -> Plan:
    """The plan of a round. Raises `ExamplesError` if it is missing or damaged."""
    try:
        row = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        spans = {pool: Span(**span) for pool, span in row["spans"].items()}
        shards = {
            part: tuple(Shard(item["pool"], tuple(item["ids"])) for item in row.get(part, ()))
            for part in ("shards", "held_out")
        }
        return Plan(**{**row, "spans": spans, **shards})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExamplesError(
            f"{folder / PLAN}: unreadable ({error!r}); delete {folder} to mine the round again"
        ) from error


def _settings(config: Config) -> dict[str, Any]:
    """What must not change within a round."""
    mining = config.mining.model_dump(mode="json", exclude={"iterations"})
    if config.training.eval_every is None:
        mining["held_out_queries"] = 0
    llm = None if config.mining.labels in ("none", "given") else config.scorer_llm.model
    return {**mining, "bm25": config.bm25.model_dump(mode="json"), "scorer": llm}


async def mine(
    store: PoolStore,
    config: Config,
    plan: Plan,
    fates: Mapping[str, Fate],
    labeller: Labeller,
    folder: Path,
    proposer: Proposer | None,
    share: Share | None = None,
) -> dict[str, Any] | None:
    """Write the shards of ``plan`` that are missing, then the round's marker, which is returned.

    With a ``share`` only those of its shards; None while shards of another's are missing.
    ``proposer`` is the one that the plan names. Memories deleted or put on hold meanwhile are
    skipped. An LLM that fails stops the round; what was scored until then stays in the cache.
    """
    if is_whole(folder):
        return read_marker(folder)
    begun = time.monotonic()
    proposals: PoolProposals | None = None
    teach = replace(labeller, has_baseline=labeller.has_baseline and config.mining.baseline)
    work = [(shard_path(folder, i), shard, teach) for i, shard in enumerate(plan.shards)]
    work += [
        (shard_path(held_out_dir(folder), i), shard, judging(labeller))
        for i, shard in enumerate(plan.held_out)
    ]
    pools = list(plan.spans)
    work.sort(key=lambda item: pools.index(item[1].pool))  # each pool is read once
    own = work if share is None else work[share.index :: share.of]
    missing = [item for item in own if not item[0].exists()]
    done = len(own) - len(missing)
    if done:
        log(f"round {plan.round}: {done} shard(s) were done before")
    for index, (path, shard, measuring) in enumerate(missing, done + 1):
        if proposals is None or proposals.pool != shard.pool:
            until = plan.spans[shard.pool].until
            proposals = PoolProposals(store, config, shard.pool, until, fates, proposer)
        title = f"round {plan.round}: mining shard {index}/{len(own)}"
        examples = await _mine_shard(store, config, plan.round, shard, proposals, measuring, title)
        write_shard(path, examples)
    if not all(path.exists() for path, _, _ in work):
        return None
    if plan.held_out:  # before the round's own marker, which makes all of it whole
        write_marker(held_out_dir(folder), {"round": plan.round, "shards": len(plan.held_out)})
    marker = _marker(plan, labeller, folder, time.monotonic() - begun)
    write_marker(folder, marker)
    return marker


async def _mine_shard(
    store: PoolStore,
    config: Config,
    number: int,
    shard: Shard,
    proposals: PoolProposals,
    labeller: Labeller,
    title: str,
) -> list[Example]:
    alive = store.get_many(shard.ids)
    queries = [alive[i] for i in shard.ids if i in alive and not alive[i].held]
    proposed = proposals.propose(queries)
    found = store.get_many([proposal.id for row in proposed for proposal in row])
    tasks = []
    for query, row in zip(queries, proposed, strict=True):
        candidates = [
            (proposal, found[proposal.id])
            for proposal in row
            if proposal.id in found and not found[proposal.id].held
        ]
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
    candidates: Sequence[tuple[Proposal, Memory]],
    config: Config,
    number: int,
    labeller: Labeller,
) -> Example:
    measure = labeller.measure
    baseline: float | None = None
    worth: Sequence[float | None] = [None] * len(candidates)
    if measure is not None:
        if labeller.has_baseline:
            baseline = await measure(query, None)
        worth = await asyncio.gather(*(measure(query, memory) for _, memory in candidates))
    rows = [
        _candidate(memory, proposal, value)
        for (proposal, memory), value in zip(candidates, worth, strict=True)
    ]
    if measure is None:  # its own memory is the positive
        rows.insert(0, _candidate(query, Proposal(query.id, None, None), None))
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


def _candidate(memory: Memory, proposal: Proposal, worth: float | None) -> Candidate:
    text, key = memory_text(memory.prompt, memory.answer), answer_key(memory.answer)
    return Candidate(
        memory.id, text, proposal.bm25_rank, worth, key, proposal.dense_rank,
        prompt_key=text_key(memory.prompt), principal=memory.agent,
    )  # fmt: skip


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
        "proposer": plan.proposer,
        "shards": len(plan.shards),
        "examples": examples,
        "candidates": candidates,
        "unmeasured": unmeasured if labeller.measure is not None else 0,
        "held_out": sum(len(shard.ids) for shard in plan.held_out),
        "left_out": dict(plan.left_out),
        "replayed": plan.replayed,
        "llm_calls": labeller.calls(),
        "seconds": seconds,
    }
