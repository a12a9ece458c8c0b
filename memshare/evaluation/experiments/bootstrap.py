"""Interactive learning: is a pool that the agents filled themselves as good as real questions?"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from memshare.bootstrap import bootstrap
from memshare.evaluation.cache import content_hash
from memshare.evaluation.data import Domain, Pair
from memshare.evaluation.experiment import Experiment, View
from memshare.evaluation.grow import grow, pool_settings
from memshare.evaluation.lab import Lab, ScorerKind
from memshare.evaluation.material import as_memories
from memshare.evaluation.measures import CHRF, F1
from memshare.evaluation.rows import Key, Row, count_row, mean_row, question_keys
from memshare.files import write_json
from memshare.llm.factory import model_identity
from memshare.llm.likelihood import Likelihood
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.records import Memory, NewMemory
from memshare.retrieval.encoder_folder import resolve_encoder
from memshare.retrieval.searcher import Searcher
from memshare.sharing import SharedMemory

SEEDS, WRITTEN, REAL = "seed only", "bootstrapped", "real questions"
DISTANCE = "distance to the nearest real question"
CHARS = "characters of a question"
UNAIDED = "nats per token of the answer, no memory shown"


async def rows(lab: Lab) -> AsyncIterator[Row]:
    """Three shots, retrieved and (``arm, random``) at random, from a few seed memories
    (``evaluation.seeds``); with what the agents asked and answered themselves added; and with
    equally many answers of theirs to real problems, taken by the same scorer.

    A written question has no known answer, so a ``reference`` scorer gives way to ``likelihood``
    here. ``distance``: 1 - cosine to the nearest of the domain's problems, by the encoder as it
    came; for a real problem, to the nearest other one. How trivial what was stored is: the mean
    log-likelihood of the answer when no memory is shown (the nearer to 0, the less there is to
    learn), and the question's length.
    """
    kind: ScorerKind = lab.config.scorer.kind
    if kind == "reference":
        kind = "likelihood"
    for label in lab.agents:
        for name, whole in lab.sampled().items():
            domain = lab.started(whole)
            seeds = as_memories(name, domain.pool)
            made = await written(lab, label, kind, name, seeds)
            stored = [Pair(*row) for row in made["stored"]]
            grown = await grow(lab, [lab.agents[label]], domain, lab.scorer(kind))
            real = grown.memories[len(seeds) : len(seeds) + len(stored)]
            pools = {
                SEEDS: seeds,
                WRITTEN: as_memories(name, [*domain.pool, *stored]),
                REAL: [*seeds, *real],
            }
            key = Key(WRITTEN, "", name, "", label, "decontaminated")
            for reason, count in {**made["counts"], "real questions beside": len(real)}.items():
                named = key._replace(metric=f"count: {reason}")
                yield count_row(named, count, made["questions"], lab.seed)
            for row in described(lab, key, whole, stored):
                yield row
            for arm, pairs in ((WRITTEN, stored), (REAL, [Pair(m.prompt, m.answer) for m in real])):
                if pairs:
                    yield await unaided(lab, key._replace(arm=arm, metric=UNAIDED), pairs)
            for arm, memories in pools.items():
                arms = lab.beside_random(arm, memories)
                for row in await lab.answers(arms, domain, memories, agents=[label]):
                    yield row


async def written(
    lab: Lab, label: str, kind: ScorerKind, pool: str, seeds: Sequence[Memory]
) -> dict[str, Any]:
    """What `memshare bootstrap` makes of ``seeds``: counts by reason, and the stored pairs."""
    agent, config = lab.agents[label], lab.config
    texts = [(memory.prompt, memory.answer) for memory in seeds]
    sections = [getattr(config, name).model_dump(mode="json")
                for name in ("bootstrap", "agent", "encoder")]  # fmt: skip
    rubric, threshold = pool_settings(lab, pool)
    # Without a limit for one principal, as `memshare bootstrap` has it.
    settings = config.pools.get(pool, next(iter(config.pools.values())))
    settings = settings.model_copy(update={"max_principal_share": None})
    grading = config.scorer.model_dump(mode="json", exclude={"kind", "references"})
    models = [agent.llm.model, lab.scorer_llm.model,
              model_identity(resolve_encoder(config.encoder.model))]  # fmt: skip
    name = content_hash(models, kind, grading, rubric, settings.model_dump(mode="json"), sections,
                        pool, texts, config.run.seed)[:16]  # fmt: skip
    home = lab.work / "bootstrap" / name
    report = home / "report.json"
    if report.exists():
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return found
    shutil.rmtree(home, ignore_errors=True)  # of a run that was killed; its LLM calls are kept
    changed = {
        "run": config.run.model_copy(update={"dir": home}),
        "database_url": None,
        "pools": {pool: settings},
        "retriever": config.retriever.model_copy(update={"pools": ()}),
    }
    config = config.model_copy(update=changed)
    home.mkdir(parents=True)
    store = PoolStore.open(config.url, config.gateway.max_text_chars)
    store.create_pool(pool, settings.rubric, threshold)
    store.append([NewMemory(pool, *pair) for pair in texts])
    shared = SharedMemory(store, Searcher(store, config), agent, lab.scorer(kind), config)
    try:
        await shared.start()
        log(f"bootstrapping {pool}")
        told = await bootstrap(shared, pool)
        new = [memory for memory in store.iter(pool) if memory.id in set(told.stored)]
    finally:
        await shared.aclose()
    found = {**asdict(told), "stored": [(memory.prompt, memory.answer) for memory in new]}
    write_json(report, found)
    return found


def described(lab: Lab, key: Key, domain: Domain, stored: Sequence[Pair]) -> list[Row]:
    """How long, and how far from real ones, the written questions are, beside the real ones."""
    real = sorted({problem.prompt for problem in (*domain.pool, *domain.problems)})
    vectors = lab.encoder.encode_queries(real)
    among = vectors @ vectors.T
    np.fill_diagonal(among, -1.0)
    rows = measured(lab, key._replace(arm=REAL), real, 1.0 - among.max(axis=1))
    if stored:
        prompts = [pair.prompt for pair in stored]
        far = 1.0 - (lab.encoder.encode_queries(prompts) @ vectors.T).max(axis=1)
        rows += measured(lab, key, prompts, far)
    return rows


async def unaided(lab: Lab, key: Key, pairs: Sequence[Pair]) -> Row:
    """How likely the answers are when the question stands alone."""
    likelihood = Likelihood(lab.scorer_llm, instruction=lab.config.agent.instruction)
    values = await asyncio.gather(*(likelihood.baseline(*pair) for pair in pairs))
    names = question_keys(pair.prompt for pair in pairs)
    return mean_row(key, dict(zip(names, values, strict=True)), lab.seed)


def measured(lab: Lab, key: Key, prompts: Sequence[str], far: np.ndarray) -> list[Row]:
    """Distances (n,) and lengths of questions as rows."""
    names = question_keys(prompts)
    figures: Mapping[str, Sequence[float]] = {
        DISTANCE: far.tolist(), CHARS: [float(len(prompt)) for prompt in prompts],
    }  # fmt: skip
    return [
        mean_row(key._replace(metric=metric), dict(zip(names, values, strict=True)), lab.seed)
        for metric, values in figures.items()
    ]


EXPERIMENT = Experiment(
    "bootstrap",
    "Do questions that the agents write for themselves fill a pool as well as real ones, and how "
    "trivial are they?",
    rows,
    contrasts=(
        (WRITTEN, SEEDS), (WRITTEN, REAL), (REAL, SEEDS),
        *((arm, f"{arm}, random") for arm in (SEEDS, WRITTEN, REAL)),
    ),
    shown=(F1, CHRF, DISTANCE, CHARS, UNAIDED),
    views=(
        View("Three shots from seeds, written and real questions", "bars", "dataset",
             arms=(SEEDS, WRITTEN, REAL)),
    ),
)  # fmt: skip
