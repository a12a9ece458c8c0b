"""The nine datasets published with the paper: do retrieved memories help an agent to answer?

Three domains (literary, logic, plan) of three datasets each, and the single pool that mixes them;
the same tests are asked of the domain's pool and of the single one. The pool holds the published
seed memories and the problems **with their reference answers**: this is the arm in which the pool's
content is given, so that retrieval alone is measured. (Answers of the agents' own are the business
of ``memshare eval``.) Each pool goes the real path: pocket LM, one round of ``train/continual.py``
(mining by likelihood, ``accelerate launch train/contrastive.py``, index), hot-swapping searcher.

Splits: ``decontaminated`` (memshare/evaluation/decontaminate.py; tests unique by question) and
``published``. A question is never answered with its own copy; in the published split, arm
``three_shot_copies`` drops that rule, which shows what the leak is worth.

Arms: zero to three shots found through the published generation; ``three_frozen``, found by the
encoder as it came (generation 0); ``three_random``, drawn from the same pool. Agent: the pocket LM,
greedy, on real vLLM (in process with ``--quick``, since a server takes a minute to start).
Measures: BERTScore on all-MiniLM-L6-v2; for lvshi, whose characters that model mostly does not
know, character n-gram F (chrF), and it is in no average.

Claims, on the decontaminated split, over the questions of the eight English datasets, domain pools:
``three_shot_f1_gain``, three shots minus none; ``retrieved_minus_random_f1_low``, the lower end of
the 95 % paired bootstrap interval of three retrieved minus three random shots.

Nothing was tuned on these tests: the training settings are banking77's, except positives, batch and
epochs, for pools a quarter as large, and the margin by which a positive must beat no example,
which is the gate's (``gate.gain``).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common import parser, write_claims
from pipeline import Work, build_pocket_lm
from served import serve, vllm_llm

from memshare.evaluation.arms import SHOT_NAMES, Arm, answer_arm
from memshare.evaluation.cache import cached
from memshare.evaluation.data import SINGLE, Domain, Pair, by_characters, load_nine
from memshare.evaluation.decontaminate import decontaminate, leak_report
from memshare.evaluation.rankers import random_ranker
from memshare.llm.agent import Agent
from memshare.llm.factory import make_llm
from memshare.metrics.bertscore import BertScorer
from memshare.metrics.chrf import chrf
from memshare.metrics.stats import bootstrap_mean, paired_bootstrap
from memshare.progress import log
from memshare.records import Memory
from memshare.retrieval.encoder_folder import resolve_encoder

SETTINGS: dict[str, Any] = {
    "encoder": {"model": "all-MiniLM-L6-v2", "max_length": 128},
    "agent": {"shots": 3, "max_tokens": 128, "temperature": 0.0},
    "mining": {"labels": "likelihood", "candidates": 8, "dense_candidates": 8},
    "training": {
        "positives": 4, "positives_per_step": 1, "hard_negatives": 1, "batch_size": 16,
        "epochs": 2.5, "lr": 5e-5, "margin": 0.05, "temperature": 0.05, "batch_tokens": 512,
        "dropout": False,
    },
    "gate": {"margin": 1.0, "max_queries": 50},
    "wandb": {"mode": "disabled"},
}  # fmt: skip
Shots = Sequence[tuple[Memory, ...]]  # of every question, best first
Row = dict[str, Any]


@dataclass
class Run:
    """One pool of one split: its retriever, the shots of every arm, and what came of them."""

    split: str
    domain: Domain
    memories: int
    without_answer: int
    shots: dict[str, Shots]
    programs: dict[str, Any]
    rows: list[Row] = field(default_factory=list)  # of every dataset and arm
    english: dict[str, Arm] = field(default_factory=dict)  # each arm over the English questions

    def summary(self, seed: int) -> dict[str, Any]:
        """For the report."""
        return {
            "split": self.split,
            "pool": self.domain.name,
            "memories": self.memories,
            "without_answer": self.without_answer,
            "english": {name: arm.summary(seed) for name, arm in self.english.items()},
            **comparisons({name: arm.f1 for name, arm in self.english.items()}, seed),
            "programs": self.programs,
        }


def learn_pool(work: Work, split: str, domain: Domain, seed: int) -> Run:
    """Fill one pool, train on it, and find the shots of every arm for all of its tests."""
    whole = domain.pairs
    memories = work.fill({domain.name: whole})[domain.name]
    questions = [test.prompt for tests in domain.tests.values() for test in tests]
    by_id = {memory.id: memory for memory in memories}

    def found(ranks: Sequence[Sequence[str]]) -> Shots:
        return [tuple(by_id[id_] for id_ in row) for row in ranks]

    arms: dict[str, Shots] = {}
    with work.searcher() as search:
        arms["three_frozen"] = found(search(domain.name, questions, 3))
    arms["three_random"] = found(random_ranker(memories, seed)(questions, 3))
    report = work.learn()
    with work.searcher() as search:
        best = found(search(domain.name, questions, 3))
        report["generation"] = search.generation
        if split == "published":
            arms["three_shot_copies"] = found(search(domain.name, questions, 3, copies=True))
    arms |= {name: [row[:n] for row in best] for n, name in enumerate(SHOT_NAMES)}
    without = len(domain.pool) + len(domain.problems) - len(whole)
    return Run(split, domain, len(memories), without, arms, report)


async def answer_pools(agent: Agent, scorer: BertScorer, runs: Sequence[Run], seed: int) -> None:
    """Answer every run's tests in every arm, and measure."""
    try:
        for run in runs:
            await answer_pool(agent, scorer, run, seed)
            found = comparisons({name: arm.f1 for name, arm in run.english.items()}, seed)
            log(f"{run.split} {run.domain.name}: {found}")
    finally:
        await agent.llm.aclose()


async def answer_pool(agent: Agent, scorer: BertScorer, run: Run, seed: int) -> None:
    """Fill in a run's table rows and English arms."""
    groups = run.domain.tests
    names = [dataset for dataset, group in groups.items() for _ in group]
    tests = [test for group in groups.values() for test in group]
    at = {dataset: [i for i, n in enumerate(names) if n == dataset] for dataset in groups}
    chinese = {dataset for dataset, group in groups.items() if by_characters(group)}
    for name, shots in run.shots.items():
        arm = await answer_arm(agent, scorer, tests, shots)
        run.english[name] = arm.part([i for i, n in enumerate(names) if n not in chinese])
        for dataset, places in at.items():
            row: Row = {"split": run.split, "pool": run.domain.name, "dataset": dataset,
                        "arm": name}  # fmt: skip
            if dataset in chinese:
                values = [chrf(arm.answers[i] or "", tests[i].answer) for i in places]
                row |= {"chrf": bootstrap_mean(values, seed=seed)._asdict(), "n": len(places),
                        "failed": arm.part(places).failed}  # fmt: skip
            else:
                row |= {"bertscore": arm.part(places).summary(seed)}
            run.rows.append(row)


def comparisons(f1: Mapping[str, Sequence[float]], seed: int) -> dict[str, dict[str, float]]:
    """Paired differences of three retrieved shots to the other arms, with 95 % intervals."""
    ours = f1["three_shot"]
    return {
        f"three_shot_minus_{arm}": paired_bootstrap(ours, f1[arm], seed=seed)._asdict()
        for arm in ("zero_shot", "three_random", "three_frozen")
    }


def quick(domain: Domain) -> Domain:
    """A few of everything."""
    few: dict[str, tuple[Pair, ...]] = {name: group[:4] for name, group in domain.tests.items()}
    return replace(domain, pool=domain.pool[:30], problems=domain.problems[:10], tests=few)


def main() -> None:
    """Measure and report."""
    args = parser(__doc__).parse_args()
    seed: int = args.seed
    domains = load_nine()
    splits = {
        "decontaminated": {name: decontaminate(domain) for name, domain in domains.items()},
        "published": domains,
    }
    training = SETTINGS["training"]
    if args.quick:
        splits = {"decontaminated": {"plan": quick(splits["decontaminated"]["plan"])}}
        training = {**training, "max_steps": 3}
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lm = build_pocket_lm(folder)
        for split, domains in splits.items():
            for pool, domain in domains.items():
                settings = {**SETTINGS, "training": training, "run": {"seed": seed}}
                work = Work(folder / f"{split}-{pool}", {**settings, "pools": {pool: {}}})
                runs.append(learn_pool(work, split, domain, seed))
        # Only now: a server beside the training would take its cores.
        llm = {} if args.quick else vllm_llm()
        work = Work(folder / "agent", {"agent_llm": llm, "agent": SETTINGS["agent"]})
        scorer = BertScorer(resolve_encoder(SETTINGS["encoder"]["model"]))
        agent = Agent(cached(make_llm(work.config.agent_llm)), work.config.agent)
        with nullcontext() if args.quick else serve(work):
            asyncio.run(answer_pools(agent, scorer, runs, seed))
    claimed: dict[str, list[float]] = {}
    for run in runs:
        if run.split == "decontaminated" and run.domain.name != SINGLE:
            for name, arm in run.english.items():
                claimed.setdefault(name, []).extend(arm.f1)
    overall = comparisons(claimed, seed)
    write_claims(
        args,
        {
            "three_shot_f1_gain": overall["three_shot_minus_zero_shot"]["mean"],
            "retrieved_minus_random_f1_low": overall["three_shot_minus_three_random"]["low"],
        },
        data="nine",
        model={"agent": agent.llm.model, "scorer": lm["recipe"],
               "encoder": SETTINGS["encoder"]["model"],
               "bertscore": SETTINGS["encoder"]["model"], "bertscore_layer": scorer.layer},
        settings=SETTINGS,
        overall={"questions": len(claimed["three_shot"]), **overall,
                 "mean_f1": {arm: sum(v) / len(v) for arm, v in claimed.items()}},
        leaks={pool: [asdict(leak) for leak in leak_report(domain)]
               for pool, domain in load_nine().items()},
        runs=[run.summary(seed) for run in runs],
        tables=[row for run in runs for row in run.rows],
    )  # fmt: skip


if __name__ == "__main__":
    main()
