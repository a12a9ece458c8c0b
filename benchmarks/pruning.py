"""Pruning: what held-out retrieval loses when a pool keeps a cap of three quarters of what arrives.

The pool is Banking77's training file (Casanueva et al. 2020: real questions of bank customers; the
answer is the intent, one of 77), encoded by the encoder as it comes. It is filled to the cap; then
the others arrive in rounds, each a question first, for which three memories are found (that is
their use), and whenever the cap is exceeded the pool is pruned to 5 % below it, as the continual
loop does (`memshare.evaluation.stream`). At the end the test file's questions are ranked against
what is left, and against everything that arrived; a memory is relevant if its intent is the
question's. ``random`` is the peer. ``score``, ``feedback`` and ``usefulness`` have nothing to go by
here: these memories are neither graded, voted on, nor measured by an LM.

Claims: ``drop_<metric>_<policy>``, the share of MRR@10, P@1 or nDCG@10 that is lost (below 0: it
gained); ``best_drop`` and ``best_drop_ndcg``, the share of MRR@10 and of nDCG@10 that the best
policy by each loses (goal: at most 0.01).

`leave_one_out.OWN` was chosen on training questions outside the pool, not by the test questions.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from banking77 import judged, relevant
from common import parser, write_claims

from memshare.arrays import Floats
from memshare.config import EncoderConfig
from memshare.evaluation.data import Pair, load_banking77
from memshare.evaluation.experiments.pruning import at_random
from memshare.evaluation.material import as_memories
from memshare.evaluation.stream import Stream, survivors
from memshare.metrics.ir import mean_metrics
from memshare.progress import log
from memshare.pruning.policies import POLICIES
from memshare.records import Memory, normalise
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.index import FlatIndex

SHARE = 0.75
SHOTS = 3
ROUNDS = 10  # in which what is beyond the cap arrives
NAMES = ("leave-one-out", "near-duplicates", "use", "age")
METRICS = {"mrr": "MRR@10", "p1": "P@1", "ndcg": "nDCG@10"}
MODEL = "all-MiniLM-L6-v2"


def measure(
    left: Sequence[Memory],
    vectors: Floats,
    questions: Sequence[Pair],
    queries: Floats,
) -> dict[str, float]:
    """Mean metrics of ``questions`` over the memories that are ``left``, whose rows are theirs."""
    _, rows = FlatIndex.build(vectors).search(queries, 10)
    ranks = [[left[row].id for row in found] for found in rows]
    return mean_metrics(judged(ranks, relevant(left, questions)))


def run(seed: int, quick: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """The claims, and all figures."""
    train, test = load_banking77()
    draw = random.Random(seed)
    train, test = draw.sample(train, len(train)), draw.sample(test, len(test))
    if quick:
        train, test = train[:700], test[:200]
    memories = as_memories("bank", train)
    known = {normalise(memory.prompt) for memory in memories}
    questions = [question for question in test if normalise(question.prompt) not in known]
    cap = int(SHARE * len(memories))
    batch = -(-(len(memories) - cap) // ROUNDS)
    encoder = Encoder.load(EncoderConfig(model=MODEL, max_length=64))
    stream = Stream(
        memories,
        encoder.encode_queries([memory.prompt for memory in memories]),
        encoder.encode_memories([(memory.prompt, memory.answer) for memory in memories]),
        None,
    )
    queries = encoder.encode_queries([question.prompt for question in questions])
    figures = {"none": measure(memories, stream.vectors, questions, queries)}
    sizes = {"memories": len(memories), "cap": cap, "held_out": len(questions)}
    for name in ("random", *NAMES):
        policy = at_random(seed) if name == "random" else POLICIES[name]
        left = asyncio.run(
            survivors(stream, cap, cap, policy, 80.0, shots=SHOTS, batch=batch)  # no grades: any
        )
        rows = [memory.seq - 1 for memory in left]
        figures[name] = measure(left, stream.vectors[rows], questions, queries)
        sizes["left"] = len(left)
        log(f"{name}: {len(left)} left, {figures[name]}")
    drops = {
        f"drop_{short}_{name.replace('-', '_')}": 1
        - figures[name][metric] / figures["none"][metric]
        for name in ("random", *NAMES)
        for short, metric in METRICS.items()
    }
    best: dict[str, str] = {}
    for claim, short in (("best_drop", "mrr"), ("best_drop_ndcg", "ndcg")):
        of = {name: drops[f"drop_{short}_{name.replace('-', '_')}"] for name in NAMES}
        best[claim] = min(of, key=of.__getitem__)
        drops[claim] = of[best[claim]]
    return drops, {"figures": figures, "best": best, **sizes}


def main() -> None:
    """Measure and report."""
    args = parser(__doc__).parse_args()
    claims, extra = run(args.seed, args.quick)
    write_claims(args, claims, model=MODEL, data="banking77", **extra)


if __name__ == "__main__":
    main()
