"""Mining speed: BM25 candidates beside rank-bm25, likelihoods beside vLLM's own offline engine.

Texts are memories of pocket worlds, one world (2,160 tasks) after the other: about sixty words each
over a vocabulary of about a thousand, so that every query's words stand in very many memories,
which is the harder case for an inverted index.

**Candidates.** For new memories of the pool the best ``mining.candidates`` others by `BM25` with
both back ends, as mining asks for them: copies of the question left out, ties going to the smaller
id. bm25s answers all queries, rank-bm25 only the first fifty. Claims: ``bm25s_speedup``, the
seconds a query of rank-bm25 over those of bm25s (goal: at least 100), and
``bm25_rank_mismatches``, how many of the fifty rankings differ (goal: 0). Building both indexes is
timed beside it.

**Likelihoods.** A real vLLM server (``make vllm``, ``serve/llm.py``) serves the pocket LM in
float32; mining's own labeller measures each (question, candidate, answer), with its cache.
vLLM's offline engine, set up by the server's own arguments, gets the same token ids at once
(`offline_vllm.py`). Both have warmed up; blocks of new triples alternate, and only one of them
works at a time. Claim: ``likelihood_vs_vllm``, our likelihoods a second over the engine's, medians
of the blocks (goal: at least 0.75 with the pocket LM on a CPU, 0.9 on a GPU). Ours includes all
that the engine is spared here: chat template, tokenising, HTTP, JSON and the cache.

``--quick`` leaves the likelihoods out, since a server alone takes a minute to start.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import psutil
from common import ROOT, parser, write_claims
from pipeline import Work, build_pocket_lm, environment
from served import serve, vllm_llm

from memshare.config import BM25Config, Config, MiningConfig
from memshare.llm.factory import resolve_model
from memshare.llm.plan import plan_servers
from memshare.llm.prompts import few_shot
from memshare.llm.server import server_command
from memshare.llm.tokens import ChatTokenizer
from memshare.pocket.world import World
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.records import Memory, normalise
from memshare.retrieval.bm25 import BM25
from memshare.retrieval.text import memory_text
from memshare.training.labels import Labeller, open_labeller

POOL = "world"
CANDIDATES = MiningConfig().candidates
BLOCKS = 4  # timed ones; one more before them warms up
BLOCK_QUERIES = 32  # of CANDIDATES likelihoods each

Ranking = list[tuple[str, float]]
Triple = tuple[Memory, Memory]  # the query with its answer, and the candidate shown before it


@dataclass(frozen=True, slots=True)
class Searched:
    """One back end's work: the rankings of ``len(rankings)`` queries, and its seconds."""

    rankings: list[Ranking]
    build_seconds: float
    query_seconds: float

    @property
    def seconds_per_query(self) -> float:
        """Seconds a query."""
        return self.query_seconds / len(self.rankings)


def world_memories(count: int, seed: int) -> list[Memory]:
    """``count`` memories from as many worlds as that takes, the first of them world ``seed``."""
    made: list[Memory] = []
    while len(made) < count:
        for task in World(seed).tasks()[: count - len(made)]:
            number = len(made)
            made.append(
                Memory(f"{number:07d}", POOL, task.prompt, task.answer, None, None, None, "", {},
                       number + 1)
            )  # fmt: skip
        seed += 1
    return made


def copies_of(queries: Sequence[Memory], pool: Sequence[Memory]) -> list[set[str]]:
    """For each query the ids that ask the same, its own among them."""
    same: dict[str, set[str]] = defaultdict(set)
    for memory in pool:
        same[normalise(memory.prompt)].add(memory.id)
    return [same[normalise(query.prompt)] for query in queries]


def search(
    backend: Any, pool: Sequence[Memory], queries: Sequence[Memory], exclude: Sequence[set[str]]
) -> Searched:
    """Build an index over ``pool`` and ask it for each query's candidates."""
    texts = [memory_text(memory.prompt, memory.answer) for memory in pool]
    prompts = [query.prompt for query in queries]
    began = time.perf_counter()
    index = BM25(BM25Config(backend=backend)).fit([memory.id for memory in pool], texts)
    built = time.perf_counter()
    index.top(prompts[:1], CANDIDATES, exclude[:1])  # warms up
    asked = time.perf_counter()
    rankings = index.top(prompts, CANDIDATES, exclude)
    return Searched(rankings, built - began, time.perf_counter() - asked)


def mismatches(ours: Sequence[Ranking], reference: Sequence[Ranking]) -> int:
    """How many of the reference's rankings name other ids, or the same in another order."""
    pairs = zip(reference, ours[: len(reference)], strict=True)
    return sum([name for name, _ in a] != [name for name, _ in b] for a, b in pairs)


def make_triples(
    queries: Sequence[Memory], rankings: Sequence[Ranking], pool: Sequence[Memory]
) -> list[Triple]:
    """Each query with each of its candidates; equal texts once, since the cache has them then."""
    by_id = {memory.id: memory for memory in pool}
    found: dict[tuple[str, ...], Triple] = {}
    for query, ranking in zip(queries, rankings, strict=True):
        for name, _ in ranking:
            shown = by_id[name]
            key = (query.prompt, query.answer, shown.prompt, shown.answer)
            found.setdefault(key, (query, shown))
    return list(found.values())


class Offline:
    """vLLM's offline engine in a child process, which logs to a file."""

    def __init__(self, process: subprocess.Popen[str], logfile: Path, config: Config) -> None:
        self._process = process
        self._logfile = logfile
        self._instruction = config.agent.instruction
        self._tokenizer = ChatTokenizer(resolve_model(config.scorer_llm.model))

    def ready(self) -> None:
        """Wait until it has loaded. Raises `RuntimeError` if it ended instead."""
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            tail = self._logfile.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"the offline engine did not start; {self._logfile}:\n{tail}")

    def measure(self, triples: Sequence[Triple]) -> tuple[float, list[float]]:
        """Seconds of generation, and each answer's nats per token."""
        spans = []
        for query, shown in triples:
            context = few_shot(self._instruction, [(shown.prompt, shown.answer)], query.prompt)
            spans.append(self._tokenizer.span(context, query.answer, 10**6))
        asked = {"prompts": [span.ids for span in spans], "starts": [span.start for span in spans]}
        told = self.ask(json.dumps(asked))
        return told["seconds"], told["means"]

    def ask(self, line: str) -> dict[str, Any]:
        """One line there, one back."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@contextmanager
def offline_engine(config: Config, logfile: Path) -> Iterator[Offline]:
    """The engine as ``config``'s scorer server has it, from its start until the block ends."""
    (plan,) = plan_servers(config)
    python, *words = server_command(plan)
    child = [python, str(ROOT / "benchmarks" / "offline_vllm.py"), *words[words.index("--model") :]]
    log("starting vLLM's offline engine")
    with logfile.open("ab") as errors:
        process = subprocess.Popen(
            child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**environment(), **plan.llm.server.env},
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            yield Offline(process, logfile, config)
        finally:
            process.stdin.close()
            process.wait(60.0)


def processor_seconds() -> Counter[str]:
    """Processor time so far: of this process (ours), of the engine's parts, of the HTTP servers."""
    spent: Counter[str] = Counter()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            words, times = " ".join(process.cmdline()), process.cpu_times()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        part = (
            "engine" if "VLLM::" in words else "http server" if "api_server" in words else "other"
        )
        part = "client" if process.pid == os.getpid() else part
        spent[part] += times.user + times.system
    return spent


async def measure_all(labeller: Labeller, triples: Sequence[Triple]) -> tuple[float, list[float]]:
    """Seconds of our path, and each answer's nats per token."""
    assert labeller.measure is not None
    before = labeller.calls()
    began = time.perf_counter()
    found = await asyncio.gather(*(labeller.measure(*triple) for triple in triples))
    seconds = time.perf_counter() - began
    if labeller.calls() - before != len(triples):
        raise RuntimeError("some of the likelihoods came from the cache")
    return seconds, [value for value in found if value is not None]


async def alternate(
    config: Config, offline: Offline, blocks: Sequence[Sequence[Triple]]
) -> dict[str, Any]:
    """Likelihoods a second of both, block by block, the first left out."""
    ours: list[float] = []
    theirs: list[float] = []
    difference = 0.0
    spent: Counter[str] = Counter()
    with PoolStore.open(config.url) as store:
        async with open_labeller(config, store) as labeller:
            for triples in blocks:
                before = processor_seconds()
                seconds, values = await measure_all(labeller, triples)
                if ours:  # the first block warms up
                    spent += processor_seconds() - before
                engine_seconds, reference = offline.measure(triples)
                ours.append(len(triples) / seconds)
                theirs.append(len(triples) / engine_seconds)
                log(f"likelihoods a second: {ours[-1]:.0f}, offline {theirs[-1]:.0f}")
                pairs = zip(values, reference, strict=True)
                difference = max(difference, *(abs(a - b) for a, b in pairs))
    return {
        "ours_per_second": ours[1:],
        "offline_per_second": theirs[1:],
        "processor_ms_a_likelihood": {
            part: 1000 * seconds / (len(blocks[0]) * (len(blocks) - 1))
            for part, seconds in spent.items()
        },
        "likelihoods_a_block": len(blocks[0]),
        "largest_difference_nats": difference,
    }


def likelihoods(triples: Sequence[Triple], seed: int) -> dict[str, Any]:
    """Start server and engine, and measure both on blocks of ``triples``."""
    size = BLOCK_QUERIES * CANDIDATES
    blocks = [triples[i * size : (i + 1) * size] for i in range(BLOCKS + 1)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = build_pocket_lm(folder)["recipe"]
        settings = {"run": {"seed": seed}, "pools": {POOL: {}}, "scorer_llm": vllm_llm()}
        work = Work(folder / "run", settings)
        logfile = work.folder / "offline.log"
        with offline_engine(work.config, logfile) as offline, serve(work):
            offline.ready()
            found = asyncio.run(alternate(work.config, offline, blocks))
    return {"model": model, **found}


def main() -> None:
    """Measure and report."""
    args = parser(__doc__).parse_args()
    size, new, referenced = (5_000, 200, 10) if args.quick else (100_000, 1_000, 50)
    pool = world_memories(size, args.seed)
    queries = Random(args.seed).sample(pool, new)
    exclude = copies_of(queries, pool)
    runs = {"bm25s": search("bm25s", pool, queries, exclude)}
    log(f"bm25s: {1000 * runs['bm25s'].seconds_per_query:.2f} ms a query")
    runs["rank-bm25"] = search("rank-bm25", pool, queries[:referenced], exclude[:referenced])
    log(f"rank-bm25: {1000 * runs['rank-bm25'].seconds_per_query:.2f} ms a query")
    ours, reference = runs["bm25s"], runs["rank-bm25"]
    claims = {
        "bm25s_speedup": reference.seconds_per_query / ours.seconds_per_query,
        "bm25_rank_mismatches": mismatches(ours.rankings, reference.rankings),
    }
    told: dict[str, Any] = {"left_out": ["likelihood_vs_vllm: a server takes a minute to start"]}
    if not args.quick:
        told = likelihoods(make_triples(queries, ours.rankings, pool), args.seed)
        claims["likelihood_vs_vllm"] = median(told["ours_per_second"]) / median(
            told["offline_per_second"]
        )
    write_claims(
        args,
        claims,
        data="pocket worlds",
        pool=size,
        candidates=CANDIDATES,
        bm25={name: {"queries": len(run.rankings), "build_seconds": run.build_seconds,
                     "seconds_per_query": run.seconds_per_query} for name, run in runs.items()},
        bm25s_build_ratio=reference.build_seconds / ours.build_seconds,
        likelihood=told,
    )  # fmt: skip


if __name__ == "__main__":
    main()
