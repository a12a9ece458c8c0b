"""What a gateway costs in front of vLLM: throughput through it against asking vLLM directly.

A real vLLM server (``make vllm``, ``serve/llm.py``) serves the pocket LM in float32 without a
prefix cache, so that a prompt costs the same each time; ``serve/gateway.py`` stands before it with
the encoder of ``configs/pocket.yaml`` and a pool of pocket-world memories. 32 clients in this
process each send their next question once the last one is answered. Every answer is made as long as
the agent's may be (``ignore_eos``, as in vLLM's own benchmarks), so that both ways do the same
work. Short blocks of new questions alternate between the two ways, on the same cores; each block is
asked both ways one after the other, and the first pair warms up and is left out. Prompts and
answers must have as many tokens both ways.

``proxy_vs_vllm`` (goal: at least 0.95): answers a second through the gateway over those of vLLM
itself, with memory off: the median of the pairs' ratios. ``retrieval_vs_vllm`` (goal: 0.75 on the
same two cores, 0.95 with a GPU): the same with three shots; the direct run sends the prompts
already expanded, and nothing is written. Beside them, the time by stage of a turn (retrieve,
prompt) at p50 and p99, from the gateway's own histograms.

``--url``: a server that runs already, started by ``serve/llm.py`` with
``server.enable_prefix_caching`` off, so that it need not be waited for.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from common import ROOT, parser, write_claims
from pipeline import Work, build_pocket_lm
from prometheus_client.parser import text_string_to_metric_families
from served import serve, vllm_llm

from memshare.config import load_config
from memshare.evaluation.data import Pair
from memshare.llm.lanes import Lanes
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

Body = dict[str, Any]


class Asker:
    """Sends bodies to one server, `CLIENTS` at a time."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/chat/completions"
        self.per_second: list[float] = []

    async def block(self, bodies: Sequence[Body]) -> list[tuple[int, int]]:
        """Ask all of ``bodies``; returns each one's tokens, of the prompt and of the answer."""
        left = iter(enumerate(bodies))
        tokens = [(0, 0)] * len(bodies)

        async with httpx.AsyncClient(timeout=_TIMEOUT_SECONDS, transport=Lanes()) as client:

            async def ask_on() -> None:
                for place, body in left:
                    reply = (await client.post(self._url, json=body)).raise_for_status().json()
                    usage = reply["usage"]
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


class Histograms:
    """A gateway's stage times between two looks at its metrics."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._before = self._read()

    def quantiles(self, stage: str) -> dict[str, float]:
        """Seconds at p50 and p99, linear within a bucket as Prometheus has it."""
        after = self._read()[stage]
        counts = [(edge, after[edge] - self._before[stage].get(edge, 0.0)) for edge in after]
        counts.sort()
        return {"p50": _quantile(counts, 0.5), "p99": _quantile(counts, 0.99)}

    def _read(self) -> dict[str, dict[float, float]]:
        found: dict[str, dict[float, float]] = {stage: {} for stage in STAGES}
        for family in text_string_to_metric_families(httpx.get(f"{self._url}/metrics").text):
            for sample in family.samples:
                if sample.name == "memshare_stage_seconds_bucket":
                    stage = found.get(sample.labels["stage"])
                    if stage is not None:
                        stage[float(sample.labels["le"])] = sample.value
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
    async with httpx.AsyncClient(timeout=_TIMEOUT_SECONDS, transport=Lanes()) as client:

        async def pair(question: str) -> tuple[Body, Body]:
            search = {"pool": POOL, "query": question, "k": SHOTS}
            reply = await client.post(f"{url}/v1/memories/search", json=search)
            found = reply.raise_for_status().json()["memories"]
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
    with gateway_of(work) as url:
        pairs = proxy_pairs(questions[:count], plain)
        found = {"proxy": alternate(Asker(vllm), Asker(url), in_blocks(pairs, sizes.requests))}
        pairs = asyncio.run(retrieval_pairs(url, questions[count:], plain))
        histograms = Histograms(url)
        found["retrieval"] = alternate(Asker(vllm), Asker(url), in_blocks(pairs, sizes.requests))
        found["retrieval"]["seconds"] = {name: histograms.quantiles(name) for name in STAGES}
    return found


def main() -> None:
    """Start everything, measure, report."""
    arguments = parser(__doc__)
    arguments.add_argument("--url", help="of a vLLM server that runs already")
    args = arguments.parse_args()
    sizes = QUICK if args.quick else FULL
    # Programs that share cores. (vLLM chooses its own threads.)
    os.environ |= {
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    pocket = load_config(ROOT / "configs" / "pocket.yaml")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = build_pocket_lm(folder)["recipe"]
        llm = vllm_llm()
        llm["server"]["enable_prefix_caching"] = False
        llm["url"] = args.url or llm["url"]
        settings = {
            "run": {"seed": args.seed}, "pools": {POOL: {}}, "agent_llm": llm, "scorer_llm": llm,
            "encoder": {"model": pocket.encoder.model, "max_length": pocket.encoder.max_length},
            "agent": {"shots": SHOTS, "max_tokens": pocket.agent.max_tokens},
        }  # fmt: skip
        work = Work(folder / "run", settings)
        tasks = World(args.seed).tasks()[: sizes.memories]
        work.fill({POOL: [Pair(task.prompt, task.answer) for task in tasks]})
        with nullcontext() if args.url else serve(work):
            check_uncached(llm["url"])
            found = measure(work, sizes, llm["url"])
    claims = {f"{name}_vs_vllm": item.pop("ratio") for name, item in found.items()}
    write_claims(
        args, claims, model=model, encoder=pocket.encoder.model, data="pocket worlds",
        clients=CLIENTS, shots=SHOTS, memories=sizes.memories, figures=found,
    )  # fmt: skip


if __name__ == "__main__":
    main()
