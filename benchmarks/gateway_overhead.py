"""What a gateway costs in front of vLLM: throughput through it against asking vLLM directly.

A real vLLM server (``make vllm``, ``serve/llm.py``) serves an LM without a prefix cache, so that a
prompt costs the same each time; ``serve/gateway.py`` stands before it with the encoder of
``configs/pocket.yaml`` and a pool of pocket-world memories. 32 clients in this process each send
their next question once the last one is answered. Every answer is made as long as the agent's may
be (``ignore_eos``, as in vLLM's own benchmarks), so that both ways do the same work. Short blocks
of new questions alternate between the two ways, on the same cores; each block is asked both ways
one after the other, and the first pair warms up and is left out. Prompts and answers must have as
many tokens both ways.

``proxy_vs_vllm`` (goal: at least 0.95): answers a second through the gateway over those of vLLM
itself, with memory off: the median of the pairs' ratios. ``retrieval_vs_vllm`` (goal: 0.75 on the
same two cores, 0.95 with a GPU): the same with three shots; the direct run sends the prompts
already expanded, and nothing is written. Beside them the gateway's processor time an answer, and
the time by stage of a turn (retrieve, prompt) at p50 and p99, from the gateway's own histograms.

What a gateway costs is the same whatever LLM stands behind it, so the ratios depend on what that
one costs. The two above are with the layers of SmolLM2-135M, the a small chat model (random
weights, bfloat16). ``proxy_vs_vllm_pocket`` and ``retrieval_vs_vllm_pocket`` are with the
pocket LM (float32), which is a hundred times smaller than that: the worst that can be met.
``--quick`` has the pocket LM alone.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import httpx
from common import ROOT, parser, write_claims
from pipeline import Work, build_pocket_lm
from prometheus_client.parser import text_string_to_metric_families
from served import random_lm, serve, vllm_llm

from memshare.config import load_config
from memshare.evaluation.data import Pair
from memshare.llm.prompts import few_shot
from memshare.pocket.world import World
from memshare.progress import log

sys.path.append(str(ROOT))
from tests.gateways import launch, stop, wait_ready  # the tests' way of starting one

POOL = "world"
CLIENTS = 32
SHOTS = 3
STAGES = ("retrieve", "prompt")
SAMPLING = {"temperature": 0.0, "ignore_eos": True}  # the gateway passes both on
_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """Memories in the pool, timed blocks of each way, and requests a block."""

    memories: int
    blocks: int
    requests: int


FULL = Sizes(500, 8, 96)
QUICK = Sizes(100, 2, 48)
HEAVY = Sizes(500, 5, 64)  # for an LLM that takes its time

Body = dict[str, Any]


def clients() -> aiohttp.ClientSession:
    """Connections of many clients."""
    limit = aiohttp.ClientTimeout(_TIMEOUT_SECONDS)
    return aiohttp.ClientSession(timeout=limit, raise_for_status=True)


class Asker:
    """Sends bodies to one server, `CLIENTS` at a time."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/chat/completions"
        self.per_second: list[float] = []

    async def block(self, bodies: Sequence[Body]) -> list[tuple[int, int]]:
        """Ask all of ``bodies``; returns each one's tokens, of the prompt and of the answer."""
        left = iter(enumerate(bodies))
        tokens = [(0, 0)] * len(bodies)

        async with clients() as client:

            async def ask_on() -> None:
                for place, body in left:
                    async with client.post(self._url, json=body) as reply:
                        usage = (await reply.json())["usage"]
                    tokens[place] = usage["prompt_tokens"], usage["completion_tokens"]

            began = time.perf_counter()
            await asyncio.gather(*(ask_on() for _ in range(CLIENTS)))
            self.per_second.append(len(bodies) / (time.perf_counter() - began))
        return tokens


def alternate(
    direct: Asker, gateway: Asker, blocks: Sequence[Sequence[tuple[Body, Body]]]
) -> dict[str, Any]:
    """Ask every block both ways; which way is first changes from block to block."""
    for number, block in enumerate(blocks):
        ways = [(direct, [body for body, _ in block]), (gateway, [body for _, body in block])]
        told = [asyncio.run(asker.block(bodies)) for asker, bodies in ways[:: (-1) ** number]]
        if told[0] != told[1]:
            raise RuntimeError("the two ways did not ask the same")
        log(f"answers a second: {direct.per_second[-1]:.1f}, {gateway.per_second[-1]:.1f} through")
    per_second = {"vllm": direct.per_second[1:], "gateway": gateway.per_second[1:]}
    ratios = [through / alone for alone, through in zip(*per_second.values(), strict=True)]
    return {"ratio": median(ratios), "ratios": ratios, "answers_per_second": per_second}


class Costs:
    """What a gateway's metrics say of the time between two looks at them."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._before = self._read()

    def since(self, answers: int) -> dict[str, Any]:
        """Processor seconds an answer, and seconds of each stage at p50 and p99.

        Quantiles are linear within a bucket, as Prometheus has it.
        """
        after = {name: value - self._before.get(name, 0.0) for name, value in self._read().items()}
        stages = {}
        for stage in STAGES:
            buckets = sorted((edge, n) for (name, edge), n in after.items() if name == stage)
            if buckets and buckets[-1][1]:
                stages[stage] = {"p50": _quantile(buckets, 0.5), "p99": _quantile(buckets, 0.99)}
        return {"gateway_cpu_seconds": after["cpu", 0.0] / answers, "stage_seconds": stages}

    def _read(self) -> dict[tuple[str, float], float]:
        found = {}
        for family in text_string_to_metric_families(httpx.get(f"{self._url}/metrics").text):
            for sample in family.samples:
                if sample.name == "process_cpu_seconds_total":
                    found["cpu", 0.0] = sample.value
                elif sample.name == "memshare_stage_seconds_bucket":
                    found[sample.labels["stage"], float(sample.labels["le"])] = sample.value
        return found


def _quantile(counts: Sequence[tuple[float, float]], share: float) -> float:
    wanted = share * counts[-1][1]
    low, below = 0.0, 0.0
    for edge, count in counts:
        if count >= wanted:
            return low + (edge - low) * (wanted - below) / (count - below)
        low, below = edge, count
    raise AssertionError("the last bucket holds all")


@contextmanager
def gateway_of(work: Work) -> Iterator[str]:
    """A ready gateway over ``work``; its URL."""
    with (work.folder / "gateway.log").open("w") as output:
        process = launch("serve/gateway.py", work.file, "--port", "0", log=output)
        try:
            yield wait_ready(process, work.folder)
        finally:
            stop(process)


def asked(question: str, memory: Mapping[str, Any], model: str) -> Body:
    """What the gateway is sent."""
    messages = few_shot("", (), question)
    return {"model": model, "messages": messages, **SAMPLING, "memory": dict(memory)}


def proxy_pairs(questions: Sequence[str], plain: Body) -> list[tuple[Body, Body]]:
    """The same chat for vLLM and, with memory off, for the gateway."""
    off = {"shots": 0, "write": False}
    return [
        ({**plain, "messages": few_shot("", (), question)}, asked(question, off, plain["model"]))
        for question in questions
    ]


async def retrieval_pairs(
    url: str, questions: Sequence[str], plain: Body
) -> list[tuple[Body, Body]]:
    """The chat expanded by hand with what a search finds, and the one for the gateway to expand."""
    on = {"pool": POOL, "shots": SHOTS, "write": False}
    async with clients() as client:

        async def pair(question: str) -> tuple[Body, Body]:
            search = {"pool": POOL, "query": question, "k": SHOTS}
            async with client.post(f"{url}/v1/memories/search", json=search) as reply:
                found = (await reply.json())["memories"]
            shots = [(memory["prompt"], memory["answer"]) for memory in found]
            expanded = {**plain, "messages": few_shot("", shots, question)}
            return expanded, asked(question, on, plain["model"])

        pairs: list[tuple[Body, Body]] = []
        for start in range(0, len(questions), CLIENTS):
            pairs += await asyncio.gather(*map(pair, questions[start : start + CLIENTS]))
    return pairs


def in_blocks(pairs: Sequence[tuple[Body, Body]], size: int) -> list[Sequence[tuple[Body, Body]]]:
    """Blocks of ``size``."""
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def check_uncached(vllm: str) -> None:
    """Raise `RuntimeError` if the server keeps prefixes: the second way to ask would be faster."""
    page = httpx.get(f"{vllm}/metrics").text
    (line,) = [line for line in page.splitlines() if line.startswith("vllm:cache_config_info")]
    if 'enable_prefix_caching="False"' not in line:
        raise RuntimeError(f"{vllm} caches prefixes")


def measure(work: Work, sizes: Sizes, vllm: str) -> dict[str, Any]:
    """Both claims' figures."""
    count = (sizes.blocks + 1) * sizes.requests
    tasks = itertools.chain.from_iterable(World(seed).tasks() for seed in itertools.count(100))
    questions = [task.prompt for task in itertools.islice(tasks, 2 * count)]
    model = httpx.get(f"{vllm}/v1/models").json()["data"][0]["id"]
    agent = work.config.agent
    plain = {"model": model, "max_tokens": agent.max_tokens, **SAMPLING}
    found = {}
    with gateway_of(work) as url:
        ways = {
            "proxy": proxy_pairs(questions[:count], plain),
            "retrieval": asyncio.run(retrieval_pairs(url, questions[count:], plain)),
        }
        for name, pairs in ways.items():
            costs = Costs(url)
            blocks = in_blocks(pairs, sizes.requests)
            found[name] = alternate(Asker(vllm), Asker(url), blocks) | costs.since(count)
    return found


def measure_llm(folder: Path, llm: dict[str, Any], seed: int, sizes: Sizes) -> dict[str, Any]:
    """Start a server of ``llm``, fill a pool, and measure."""
    pocket = load_config(ROOT / "configs" / "pocket.yaml")
    llm["server"]["enable_prefix_caching"] = False
    settings = {
        "run": {"seed": seed}, "pools": {POOL: {}}, "agent_llm": llm, "scorer_llm": llm,
        "encoder": {"model": pocket.encoder.model, "max_length": pocket.encoder.max_length},
        "agent": {"shots": SHOTS, "max_tokens": pocket.agent.max_tokens},
    }  # fmt: skip
    work = Work(folder, settings)
    tasks = World(seed).tasks()[: sizes.memories]
    work.fill({POOL: [Pair(task.prompt, task.answer) for task in tasks]})
    with serve(work):
        check_uncached(llm["url"])
        return measure(work, sizes, llm["url"])


def main() -> None:
    """Start everything, measure, report."""
    args = parser(__doc__).parse_args()
    # Programs that share cores. (vLLM chooses its own threads.)
    os.environ |= {
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = build_pocket_lm(folder)["recipe"]
        sizes = QUICK if args.quick else FULL
        figures = {"_pocket": measure_llm(folder / "pocket", vllm_llm(), args.seed, sizes)}
        if not args.quick:
            random_lm(folder / "lm")
            llm = vllm_llm(str(folder / "lm"), "bfloat16")
            figures = {"": measure_llm(folder / "random", llm, args.seed, HEAVY)} | figures
    claims = {
        f"{way}_vs_vllm{name}": item["ratio"]
        for name, found in figures.items()
        for way, item in found.items()
    }
    write_claims(
        args, claims, model={"": "SmolLM2-135M's layers, random weights", "_pocket": recipe},
        encoder="all-MiniLM-L6-v2", data="pocket worlds", clients=CLIENTS, shots=SHOTS,
        memories=sizes.memories, figures=figures,
    )  # fmt: skip


if __name__ == "__main__":
    main()
