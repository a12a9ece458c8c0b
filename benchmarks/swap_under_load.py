"""Swaps under load: what does a gateway drop, delay or mix while its retriever is replaced?

A real ``serve/gateway.py`` serves 100,000 memories (texts of pocket worlds) in SQLite; two
generations with small random encoders of their own are there from the start, and are activated in
turn through the API every few seconds. 64 clients, in this process, search with k = 5; every eighth
request is a write, which is looked for as soon as it is acknowledged. First they measure what the
gateway can take (closed loop), then they send half of that at random moments (open loop, Poisson).

``failed_requests`` (goal: 0): refusals, broken connections, and memories that were not found though
their write was acknowledged. ``mixed_answers`` (goal: 0): answers whose ids and similarities are
not what the generation that they name gives for that question, recomputed from the texts by its
encoder (`tests/swapping.py`). ``planted_fault_found`` (goal: 1): share of answers mixed on purpose
that this check finds: renamed ones, halves of both generations', queries of one encoder in the
vectors of the other. ``p99_swap_vs_steady`` (goal: at most 1.2): 99th percentile of the searches
that overlap a swap (from its request to half a second after the first answer by the new generation)
over that of all others, for which the same load first runs without any swap.
``visible_p99_seconds`` (goal: at most 0.1): from when a write was due to its acknowledgement.
``visible_p99_seconds_two_gateways`` (goal: at most 1): two gateways on one PostgreSQL database with
the same memories and generations, a quarter of the capacity, and swaps in both: from when a write
through one was due to the first search through the other that finds it.

``requests`` (searches and writes), ``writes`` and ``swaps`` count the part with one gateway.
Gateways run with one thread for tensors and texts (OMP_NUM_THREADS=1), as programs that share two
cores should. ``--folder`` keeps what is prepared, and uses it if it is there; ``--prepare`` does
nothing else.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from common import ROOT, parser, write_claims
from http_load import Found, K, Load
from prepared import GENERATIONS, POOL, RETRIEVER, Prepared, texts

from memshare.progress import log
from memshare.records import Hit, SearchAnswer

sys.path.append(str(ROOT))
# The tests' own servers and content check, so that there is one of each.
from tests.gateways import launch, stop, wait_ready
from tests.postgres import PostgresServer
from tests.swapping import Expected, mixed

_QUESTIONS_WORLD, _WRITES_WORLD = 1_000, 2_000  # seeds of worlds that are not in the pool
_QUESTION_WORDS = 12
_PAIR_SHARE = 0.25  # of the one gateway's capacity: there are two to feed on the same cores


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything; the run goes on until requests, writes and swaps are all reached."""

    memories: int
    dim: int
    questions: int
    steady: int  # requests before the first swap
    requests: int
    writes: int
    swaps: int
    swap_every: float  # seconds
    capacity_seconds: float
    pair_writes: int


FULL = Sizes(100_000, 64, 400, 2_500, 5_000, 1_000, 10, 5.0, 10.0, 300)
QUICK = Sizes(5_000, 32, 100, 100, 300, 40, 2, 2.0, 2.0, 20)


@contextmanager
def gateways(*configs: Path) -> Iterator[list[str]]:
    """A ready gateway for each configuration; their URLs."""
    processes = []
    with ExitStack() as stack:
        for config in configs:
            output = stack.enter_context((config.parent / "gateway.log").open("w"))
            process = launch("serve/gateway.py", config, "--port", "0", log=output)
            stack.callback(stop, process)
            processes.append(process)
        pairs = zip(processes, configs, strict=True)
        yield [wait_ready(process, config.parent) for process, config in pairs]


async def loaded(load: Load, sizes: Sizes, rate: float | None) -> tuple[float, float]:
    """Measure the capacity (unless ``rate`` is given), then run; returns both, a second."""
    async with load:
        capacity = 0.0
        if rate is None:
            await load.capacity(sizes.capacity_seconds / 4)  # warms up
            capacity = await load.capacity(sizes.capacity_seconds)
            log(f"capacity: {capacity:.0f} requests a second")
            rate = capacity / 2
            load.forget()
            await load.run(rate, lambda: answered(load) >= sizes.steady or bool(load.failures))
            wanted = (sizes.requests, sizes.writes, sizes.swaps)
        else:
            wanted = (0, sizes.pair_writes, 2)

        def done() -> bool:
            reached = (len(load.found), len(load.visible), len(load.swaps))
            return bool(load.failures) or all(
                have >= want for have, want in zip(reached, wanted, strict=True)
            )

        swapper = asyncio.create_task(load.swap(RETRIEVER, GENERATIONS, sizes.swap_every))
        try:
            await load.run(rate, done)
        finally:
            swapper.cancel()
            with suppress(asyncio.CancelledError):
                await swapper
    return capacity, rate


def answered(load: Load) -> int:
    """Requests so far, searches and writes."""
    return len(load.found) + len(load.visible)


def p99(values: Sequence[float]) -> float:
    """The 99th percentile, one of ``values``."""
    return float(np.quantile(values, 0.99, method="higher"))


def by_swap(load: Load) -> tuple[list[float], list[float]]:
    """Seconds of the searches that overlap a swap, and of all others."""
    during: list[float] = []
    steady: list[float] = []
    for item in load.found:
        overlaps = any(item.due < end and item.done > begin for begin, end in load.swaps)
        (during if overlaps else steady).append(item.done - item.due)
    return during, steady


def problems(found: Sequence[Found], expected: Mapping[int, Expected]) -> list[str]:
    """What is wrong with each answer that is not its generation's own."""
    wrong = []
    for item in found:
        ids = {hit.id for hit in item.answer.hits}
        strange = ids - expected[GENERATIONS[0]].columns.keys()
        problem = mixed(item.answer, item.question, expected, K)
        if strange or problem:
            wrong.append(problem or f"unknown memories: {sorted(strange)}")
    return wrong


def planted(
    found: Sequence[Found], expected: Mapping[int, Expected], crossed: Mapping[int, Expected]
) -> list[Found]:
    """Answers that no generation gives, made from those that were given (see above)."""
    faults = []
    for item in found:
        own = item.answer.generation
        (other,) = set(GENERATIONS) - {own}
        theirs = answer_of(expected[other], other, item.question)
        strange = answer_of(crossed[own], own, item.question)
        spliced = (*item.answer.hits[: K // 2], *theirs.hits[K // 2 :])
        for answer in (
            SearchAnswer(other, item.answer.hits),
            SearchAnswer(own, spliced),
            strange,
            SearchAnswer(other, strange.hits),
        ):
            faults.append(Found(item.question, item.due, item.done, answer))
    return faults


def answer_of(model: Expected, generation: int, question: int) -> SearchAnswer:
    """The K best by ``model``."""
    row = model.similarities[question]
    ids = list(model.columns)
    best = np.argsort(-row, kind="stable")[:K].tolist()
    return SearchAnswer(generation, tuple(Hit(ids[i], float(row[i])) for i in best))


def measure(prepared: Prepared, sizes: Sizes, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Claims, and the figures behind them."""
    rng = Random(seed)
    # Of prompts the encoders would see the beginnings alone, which memories share to the letter:
    # both generations would give the same answer, and tell nothing apart.
    others = itertools.islice(texts(_QUESTIONS_WORLD), sizes.questions)
    questions = [" ".join(answer.split()[:_QUESTION_WORDS]) for _, answer in others]
    run = f"{time.time_ns():x}"  # no two runs write the same, since a folder may be used again
    writes = (
        (f"{prompt} ({run}, {number})", answer)
        for number, (prompt, answer) in enumerate(texts(_WRITES_WORLD))
    )
    with gateways(prepared.config("one")) as urls:
        one = Load(urls, POOL, questions, writes, rng)
        capacity, rate = asyncio.run(loaded(one, sizes, None))
    log("two gateways on PostgreSQL")
    server = PostgresServer()
    try:
        database = server.url(server.create())
        prepared.copy_to(database)
        configs = [prepared.config(run, database_url=database) for run in ("a", "b")]
        with gateways(*configs) as urls:
            two = Load(urls, POOL, questions, writes, rng)
            _, pair_rate = asyncio.run(loaded(two, sizes, capacity * _PAIR_SHARE))
    finally:
        server.close()
    log("checking every answer")
    expected = prepared.expected(questions, two.written)
    wrong = problems([*one.found, *two.found], expected)
    sample = one.found[:: max(1, len(one.found) // 100)]
    faults = planted(sample, expected, prepared.crossed(questions))
    failures = [*one.failures, *two.failures]
    during, steady = by_swap(one)
    if not (during and steady and one.visible and two.visible):
        raise RuntimeError(f"cut short by failures: {failures[:10]}")
    claims = {
        "failed_requests": len(failures),
        "mixed_answers": len(wrong),
        "p99_swap_vs_steady": p99(during) / p99(steady),
        "requests": answered(one),
        "writes": len(one.visible),
        "swaps": len(one.swaps),
        "planted_fault_found": len(problems(faults, expected)) / len(faults),
        "visible_p99_seconds": p99([seconds for _, seconds in one.visible]),
        "visible_p99_seconds_two_gateways": p99([seconds for _, seconds in two.visible]),
    }
    figures = {
        "capacity_per_second": capacity,
        "rate_per_second": rate,
        "rate_per_second_two_gateways": pair_rate,
        "answers_checked": len(one.found) + len(two.found),
        "answers_planted": len(faults),
        "failures": failures[:10],
        "mixed": wrong[:10],
        "searches_during_swaps": len(during),
        "searches_steady": len(steady),
        "seconds_during_swaps": spread(during),
        "seconds_steady": spread(steady),
        "swap_seconds": one.swap_seconds,
        "swap_seconds_two_gateways": two.swap_seconds,
        "visible_seconds": spread([seconds for _, seconds in one.visible]),
        "visible_seconds_two_gateways": spread([seconds for _, seconds in two.visible]),
        "writes_two_gateways": len(two.visible),
    }
    return claims, figures


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum."""
    return {"p50": float(np.median(values)), "p99": p99(values), "max": max(values)}


def main() -> None:
    """Prepare, measure, report."""
    arguments = parser(__doc__)
    arguments.add_argument("--folder", type=Path, help="keep what is prepared here, or use it")
    arguments.add_argument("--prepare", action="store_true", help="only prepare --folder")
    args = arguments.parse_args()
    sizes = QUICK if args.quick else FULL
    os.environ |= {
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.folder or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        prepared = Prepared(folder, sizes.memories, sizes.dim)
        if args.prepare:
            return
        claims, figures = measure(prepared, sizes, args.seed)
    write_claims(
        args, claims, model="random BERT, 2 layers", sizes=asdict(sizes), figures=figures,
        data="texts of pocket worlds",
    )  # fmt: skip


if __name__ == "__main__":
    main()
