"""Pruning: what held-out retrieval loses when a pool is cut to three quarters of its size.

The pool is Banking77's training file (Casanueva et al. 2020: real questions of bank customers; the
answer is the intent, one of 77), built into a generation by the encoder as it comes. Half of the
test questions are traffic, whose searches count as uses; the other half are held out: a memory is
relevant if its intent is the question's. Each policy that the data can feed ranks the memories
through `memshare.pruning.prune`, as ``memshare prune --dry-run`` does; ``random`` is the peer.
``score`` and ``usefulness`` have nothing to go by here: these memories are neither graded nor
measured by an LM.

Claims: ``drop_<metric>_<policy>``, the share of MRR@10 or P@1 that is lost (below 0: it gained);
``best_drop``, the MRR@10 share that the best policy loses (goal: at most 0.01).
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from banking77 import judged, relevant
from common import parser, write_claims

from memshare.config import Config, EncoderConfig, PoolSettings, RunConfig
from memshare.evaluation.data import Pair, load_banking77
from memshare.evaluation.rankers import dense_ranker
from memshare.metrics.ir import mean_metrics
from memshare.pool.store import PoolStore
from memshare.pool.uses import UseCounts
from memshare.progress import log
from memshare.pruning.prune import prune
from memshare.records import Memory, NewMemory
from memshare.retrieval.build import build_generation
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.publish import publish

POOL = "bank"
SHARE = 0.75
SHOTS = 3
POLICIES = ("near-duplicates", "use", "age")
METRICS = {"mrr": "MRR@10", "p1": "P@1"}


def measure(
    memories: Sequence[Memory],
    vectors: npt.NDArray[np.float32],
    gone: set[str],
    encoder: Encoder,
    questions: Sequence[Pair],
) -> dict[str, float]:
    """Mean metrics of ``questions`` over the memories that are not ``gone``."""
    rows = [row for row, memory in enumerate(memories) if memory.id not in gone]
    left = [memories[row] for row in rows]
    rank = dense_ranker(left, encoder, vectors[rows])
    ranks = rank([question.prompt for question in questions], 10)
    return mean_metrics(judged(ranks, relevant(left, questions)))


def run(folder: Path, seed: int, quick: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """The claims, and all figures."""
    config = Config(
        run=RunConfig(dir=folder),
        pools={POOL: PoolSettings()},
        encoder=EncoderConfig(model="all-MiniLM-L6-v2", max_length=64),
    )
    train, test = load_banking77()
    draw = random.Random(seed)
    train, test = draw.sample(train, len(train)), draw.sample(test, len(test))
    if quick:
        train, test = train[:2000], test[:800]
    traffic, held_out = test[: len(test) // 2], test[len(test) // 2 :]
    encoder = Encoder.load(config.encoder)
    figures: dict[str, dict[str, float]] = {}
    with PoolStore.open(config.url) as store:
        store.create_pool(POOL)
        store.append([NewMemory(POOL, pair.prompt, pair.answer) for pair in train])
        memories = list(store.iter(POOL))
        built = build_generation(store, config, encoder)
        publish(
            config.generations_dir, config.retriever.name, encoder=encoder, parent=None,
            metrics={}, keep=1, **built.parts(),
        )  # fmt: skip
        shown = dense_ranker(memories, encoder, built.vectors)([q.prompt for q in traffic], SHOTS)
        UseCounts(store.database).add(Counter(id for ids in shown for id in ids))
        cap = int(SHARE * len(memories))
        everything = [memory.id for memory in memories]
        gone = {"none": set[str](), "random": set(draw.sample(everything, len(everything) - cap))}
        for policy in POLICIES:
            log(f"{policy}: {len(memories)} memories, cap {cap}")
            gone[policy] = set(prune(store, config, POOL, policy, cap, dry_run=True).ids)
    for name, ids in gone.items():
        figures[name] = measure(memories, built.vectors, ids, encoder, held_out)
        log(f"{name}: MRR@10 {figures[name]['MRR@10']:.4f}, P@1 {figures[name]['P@1']:.4f}")
    claims = {
        f"drop_{short}_{name.replace('-', '_')}": 1
        - figures[name][metric] / figures["none"][metric]
        for name in ("random", *POLICIES)
        for short, metric in METRICS.items()
    }
    best = min(POLICIES, key=lambda name: claims[f"drop_mrr_{name.replace('-', '_')}"])
    claims["best_drop"] = claims[f"drop_mrr_{best.replace('-', '_')}"]
    sizes = {"memories": len(memories), "cap": cap, "held_out": len(held_out)}
    return claims, {"figures": figures, "best": best, **sizes}


def main() -> None:
    """Measure and report."""
    args = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        claims, extra = run(Path(folder), args.seed, args.quick)
    write_claims(args, claims, model="all-MiniLM-L6-v2", data="banking77", **extra)


if __name__ == "__main__":
    main()
