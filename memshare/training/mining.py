"""Mining: every new memory (x, y) becomes a training example (step 5 of the loop).

BM25 and the serving retriever propose memories for x (`proposals`), itself and its copies (same
normalised prompt) left out; a labeller says what each is worth (`labels`). As in EPR (Rubin et al.
2022) and LLM-R (Wang et al. 2023), except that the pool grows: see `mining_plan` for what a round
mines.

Where training is to be evaluated (``training.eval_every``), some held-out memories get candidates
and labels in the same way, into a folder of their own (`held_out_dir`).

A round is worked off shard by shard. Each shard is written atomically, so a restarted run goes on
at the first one missing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from memshare.config import Config
from memshare.pool.store import PoolStore
from memshare.progress import log, track
from memshare.records import Candidate, Example, Memory, answer_key
from memshare.retrieval.text import memory_text
from memshare.training.erasing import write_living
from memshare.training.examples import (
    held_out_dir,
    is_whole,
    read_examples,
    read_marker,
    shard_path,
    write_marker,
)
from memshare.training.labels import Labeller, Share, label_key
from memshare.training.mining_plan import Plan, Shard
from memshare.training.proposals import PoolProposals, Proposal, Proposer
from memshare.training.relevance import judging
from memshare.training.select import text_key
from memshare.training.split import Fate


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
    skipped, and left out where they were being measured. An LLM that fails stops the round; what
    was scored until then stays in the cache.
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
        write_living(store, config.examples_dir, path, examples)
    if not all(path.exists() for path, _, _ in work):
        return None
    if plan.held_out:  # before the round's own marker, which makes all of it whole
        write_marker(held_out_dir(folder), {"round": plan.round, "shards": len(plan.held_out)})
    marker = _marker(plan, labeller, folder, time.monotonic() - begun)
    write_marker(folder, marker)
    if marker["unmeasured"]:
        told = f"{marker['unmeasured']} of {marker['candidates']} candidates have no score"
        log(f"round {plan.round}: {told}: too long, refused, cut off or not graded")
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
        if baseline is not None or not labeller.has_baseline:  # else nothing tells what is better
            worth = await asyncio.gather(*(measure(query, memory) for _, memory in candidates))
    rows = [
        _candidate(memory, proposal, value, config)
        for (proposal, memory), value in zip(candidates, worth, strict=True)
    ]
    if measure is None:  # its own memory is the positive
        rows.insert(0, _candidate(query, Proposal(query.id, None, None), None, config))
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


def _candidate(
    memory: Memory, proposal: Proposal, worth: float | None, config: Config
) -> Candidate:
    text, key = memory_text(memory.prompt, memory.answer), answer_key(memory.answer)
    return Candidate(
        memory.id, text, proposal.bm25_rank, worth, key, proposal.dense_rank,
        prompt_key=text_key(memory.prompt), principal=memory.agent,
        label_key=label_key(memory, config.mining),
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
