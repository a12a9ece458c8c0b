"""Bootstrap on real vLLM: does a pool that the agents filled themselves answer better?

The pool starts with seed memories of the pocket world. A real vLLM server (``make vllm``,
``serve/llm.py``) serves the pocket LM as agent and scorer; ``memshare bootstrap`` lets it write
questions, answer them from what it retrieves, and grade them by likelihood; the pool's threshold is
0, since such a small LM's grades mean nothing: only unusable pairs are rejected. Held-out questions
of the world are then answered with three retrieved memories, once from the seed memories alone and
once from the bootstrapped pool, by the same LM on the same server.

Claims: ``seed_f1`` and ``bootstrapped_f1`` (BERTScore by all-MiniLM-L6-v2),
``bootstrapped_minus_seed_f1`` with the ``_low`` and ``_high`` ends of its 95 % paired bootstrap
interval, ``accepted`` and ``rejected`` questions; ``rejected_by_reason`` stands beside them, and
``real_tasks``: how many written questions are tasks of the world, word for word. A 2M-parameter LM
is a poor author: this shows the path and its filters, not what a large LM would write.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import parser, write_claims
from pipeline import Work, build_pocket_lm, run_program
from served import serve, vllm_llm

from memshare.config import Config
from memshare.evaluation.arms import Arm, answer_arm
from memshare.evaluation.cache import cached
from memshare.evaluation.data import Pair
from memshare.llm.agent import Agent
from memshare.llm.factory import make_llm
from memshare.metrics.bertscore import BertScorer
from memshare.metrics.stats import paired_bootstrap
from memshare.pocket.world import Task, World
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.records import normalise
from memshare.retrieval.encoder_folder import resolve_encoder

POOL = "world"
SIZES = (150, 300, 100)  # seed memories, problems (only to draw test questions after), tests
QUESTIONS = 200
ENCODER = "all-MiniLM-L6-v2"


def settings(seed: int, questions: int) -> dict[str, Any]:
    """One server for agent and scorer."""
    llm = vllm_llm()
    return {
        "run": {"seed": seed},
        "pools": {POOL: {"threshold": 0}},
        "encoder": {"model": ENCODER, "max_length": 128},
        "agent_llm": llm,
        "scorer_llm": llm,
        "agent": {"shots": 3, "max_tokens": 72},
        "scorer": {"kind": "likelihood"},
        "bootstrap": {"questions": questions, "temperature": 0.8},
    }


async def answers(config: Config, bert: BertScorer, work: Work, tests: Sequence[Task]) -> Arm:
    """The tests answered with three memories of the pool as it is now."""
    with PoolStore.open(config.url) as store:
        by_id = {memory.id: memory for memory in store.iter(POOL)}
    questions = [task.prompt for task in tests]
    found = await asyncio.to_thread(search, work, questions)
    shots = [[by_id[id_] for id_ in row] for row in found]
    llm = cached(make_llm(config.agent_llm))
    try:
        agent = Agent(llm, config.agent)
        pairs = [Pair(task.prompt, task.answer) for task in tests]
        return await answer_arm(agent, bert, pairs, shots)
    finally:
        await llm.aclose()


def search(work: Work, questions: Sequence[str]) -> list[list[str]]:
    """Three ids for each question, by the encoder as it comes."""
    with work.searcher() as found:
        return found(POOL, questions, 3)


def main() -> None:
    """Measure and report."""
    args = parser(__doc__).parse_args()
    seed: int = args.seed
    world = World(seed)
    splits = world.splits(*((60, 300, 12) if args.quick else SIZES))
    real = {normalise(task.prompt) for task in world.tasks()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lm = build_pocket_lm(folder)
        work = Work(folder / "run", settings(seed, 16 if args.quick else QUESTIONS))
        work.fill({POOL: [Pair(task.prompt, task.answer) for task in splits.seed]})
        bert = BertScorer(resolve_encoder(ENCODER))
        with serve(work):
            before = asyncio.run(answers(work.config, bert, work, splits.test))
            log("bootstrapping")
            report = folder / "bootstrap.json"
            program = str(Path(sys.executable).with_name("memshare"))
            words = [program, "bootstrap", "--config", str(work.file)]
            run_program([*words, "--json", str(report)], folder / "bootstrap.log")
            told = json.loads(report.read_text(encoding="utf-8"))
            after = asyncio.run(answers(work.config, bert, work, splits.test))
        with PoolStore.open(work.config.url) as store:
            written = [store.get(id_) for id_ in told["stored"]]
    gain = paired_bootstrap(after.f1, before.f1, seed=seed)
    counts = dict(told["counts"])
    accepted = counts.pop("stored", 0)
    write_claims(
        args,
        {
            "seed_f1": before.summary(seed)["f1"],
            "bootstrapped_f1": after.summary(seed)["f1"],
            "bootstrapped_minus_seed_f1": gain.mean,
            "bootstrapped_minus_seed_f1_low": gain.low,
            "bootstrapped_minus_seed_f1_high": gain.high,
            "accepted": accepted,
            "rejected": sum(counts.values()),
        },
        data="pocket world",
        model={"agent": lm["recipe"], "scorer": lm["recipe"], "encoder": ENCODER,
               "bertscore": ENCODER, "backend": "vllm"},
        seeds=len(splits.seed),
        tests=len(splits.test),
        rejected_by_reason=counts,
        real_tasks=sum(normalise(memory.prompt) in real for memory in written if memory),
        examples=[{"prompt": memory.prompt, "answer": memory.answer, "score": memory.score}
                  for memory in written[:10] if memory],
        seed_only=before.summary(seed),
        bootstrapped=after.summary(seed),
    )  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
