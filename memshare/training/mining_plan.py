"""What a round mines: which memories are queries, and which shard each goes into.

Held-out memories are neither queries nor candidates; those that the split gives to neither side are
candidates only. A round mines what is new, and a sample of what is older (``mining.replay``) again,
so that nothing is forgotten. Older examples are not used as they are: a weaker retriever proposed
their candidates. Where training is to be evaluated (``training.eval_every``), some held-out
memories are queries of shards of their own.

A round is planned once; ``plan.json`` says how, and a restarted run reads it back.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memshare.config import Config, MiningConfig, TrainingConfig
from memshare.files import write_json
from memshare.pool.store import PoolStore
from memshare.records import Memory
from memshare.retrieval.gate import choose_queries
from memshare.training.journal import Span
from memshare.training.proposals import disliked
from memshare.training.rounds import new_ids
from memshare.training.shard import ExamplesError
from memshare.training.split import Fate, kept_split, recorded_split

PLAN = "plan.json"
_PAGE = 1_000  # memories whose texts are read at a time


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

    Memories on hold take part, so that releasing one moves no other; so do those whose pool was
    served once, as it may be served again.
    """
    memories = (
        memory for pool in config.served_pools for memory in store.iter(pool, include_held=True)
    )

    def elsewhere(ids: Sequence[str]) -> Iterator[Memory]:
        for start in range(0, len(ids), _PAGE):
            yield from store.get_many(ids[start : start + _PAGE]).values()

    return kept_split(_split_file(config), memories, config.split, elsewhere)


def planned_split(store: PoolStore, config: Config) -> dict[str, Fate]:
    """The fates on record, for a round that is planned already: no memory is read for them.

    What came after the plan may be missing. Where the record is gone, all are split again.
    """
    return recorded_split(_split_file(config))[0] or split_memories(store, config)


def _split_file(config: Config) -> Path:
    return config.run.dir / "split.json"


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
        # What it lacks had its default: the version that wrote it did not know it yet.
        defaults = {
            "mining": MiningConfig(labels=config.mining.labels),
            "training": TrainingConfig(),
        }
        plain = config.model_copy(update=defaults)
        before = _listed({**_settings(plain), **plan.settings}, plan.spans, plan.proposer)
        now = _listed(settings, spans, proposer)
        changed = [
            f"{key} {before.get(key)!r}, not {now.get(key)!r}"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise ExamplesError(
                f"{path}: round {number} was begun with {', '.join(changed)}; finish it with what "
                f"it was begun with, or delete {folder}"
            )
        return plan
    left_out: dict[str, int] = defaultdict(int)
    new: dict[str, list[str]] = {}
    earlier: dict[str, list[str]] = {}
    for pool, span in spans.items():
        ids, out = new_ids(store, pool, span), disliked(store, config, pool)
        alive = store.get_many(ids)
        queries = new[pool] = []
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
        earlier[pool] = _earlier(store, pool, span, fates, out.union(queries))
    again = _replayed(earlier, sum(map(len, new.values())), config, number)
    shards = [
        shard for pool in spans for shard in _shards(pool, [*new[pool], *again[pool]], config)
    ]
    replayed = sum(map(len, again.values()))
    held_out = _held_out(store, config, spans, fates)
    plan = Plan(
        number, dict(spans), settings, proposer, dict(left_out), replayed, tuple(shards), held_out
    )
    for part in folder.glob(f".{PLAN}.*.tmp"):  # of who was killed while planning: one plans
        part.unlink()
    write_json(path, asdict(plan))
    return plan


def _listed(
    settings: Mapping[str, Any], spans: Mapping[str, Span], proposer: int | str | None
) -> dict[str, Any]:
    """What a round is, one value a name."""
    ends = {f"span of {pool}": f"{span.since} to {span.until}" for pool, span in spans.items()}
    return {**settings, **ends, "proposer": proposer}


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
    out = {pool: disliked(store, config, pool) for pool in spans}
    memories = [
        memory
        for pool, span in spans.items()
        for memory in store.iter(pool, until_seq=span.until)
        if fates.get(memory.id) == "held_out" and memory.id not in out[pool]
    ]
    ordered = choose_queries(memories, len(memories), config.run.seed)
    chosen = ordered[-config.mining.held_out_queries :]
    return tuple(
        shard
        for pool in spans
        for shard in _shards(pool, [item.id for item in chosen if item.pool == pool], config)
    )


def _replayed(
    earlier: Mapping[str, Sequence[str]], new: int, config: Config, number: int
) -> dict[str, list[str]]:
    """The ``earlier`` memories of each pool that a round with ``new`` queries mines again.

    Drawn from all pools alike: one encoder serves them all, and would forget those that are quiet.
    """
    total = sum(map(len, earlier.values()))
    draw = random.Random(f"{config.run.seed}/{number}/{'/'.join(earlier)}")
    places = draw.sample(range(total), min(total, round(config.mining.replay * new)))
    again, start = {}, 0
    for pool, ids in earlier.items():
        again[pool] = [ids[at - start] for at in places if start <= at < start + len(ids)]
        start += len(ids)
    return again


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
    """What must not change within a round: what would be labelled otherwise, by others."""
    mining = config.mining.model_dump(mode="json", exclude={"iterations"})
    if config.training.eval_every is None:
        mining["held_out_queries"] = 0
    labels = config.mining.labels
    llm = None if labels in ("none", "given") else config.scorer_llm.model
    settings = {**mining, "bm25": config.bm25.model_dump(mode="json"), "scorer": llm}
    if labels == "likelihood":
        settings["instruction"] = config.agent.instruction
    if labels == "reward":
        settings["agent"] = config.agent_llm.model
        settings["answers"] = config.agent.model_dump(mode="json", exclude={"shots"})
        settings["grades"] = config.scorer.model_dump(mode="json")
    return settings
