"""Training speed, side by side with sentence-transformers' trainer, on a CPU.

Both train all-MiniLM-L6-v2 on the same triplets (query, positive, hard negative; lengths log-normal
around 55 tokens, up to 256) with the same loss, in float32 (`trainers`); loss and gradients are
first shown to be equal. Of the peer, its plain loss and its cached one with mini-batches of several
sizes are tried on one step each, and the fastest is the one that counts; of ours, several sizes of
micro-batches likewise. ``speedup_of_one_step`` in the report is that step against each of the
peer's settings by name: its plain loss, its cached loss by its default mini-batches of 32, and the
same with the fastest found. ``bf16_of_one_step`` is one step of both sides' claimed settings under
bf16 autocast; no claim is made of it.

Each side has a process of its own, which are given work in turns, never at once; a figure is the
ratio of the medians, since machines are shared and noisy. Claims: ``speedup_b16`` and
``speedup_b64``, our real (non-padding) tokens a second over theirs at that batch size;
``gradcache_overhead``, the time of our step with every micro-batch encoded twice over that with all
graphs kept, the larger of the two batch sizes'; ``max_gradient_difference``, absolute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
from common import parser, write_claims
from trainers import (
    LR,
    MAX_TOKENS,
    Run,
    Setup,
    Triplet,
    gradient_difference,
    ours_once,
    theirs_once,
    triplets,
)

from memshare.config import TrainingConfig
from memshare.progress import log

SETUP = Setup("all-MiniLM-L6-v2")
STEPS = {16: 3, 64: 2}  # of one timed run
BF16 = replace(SETUP, bf16=True)
DEFAULT_MINI_BATCH = 32  # of the peer's cached loss
MINI_BATCHES = (None, DEFAULT_MINI_BATCH, 2, 4)  # the peer's, in texts; None: its plain loss
BATCH_TOKENS = (1024, 2048, 4096)  # ours: of a micro-batch
BLOCKS = 3  # timed runs of each side
Process = Callable[..., Run]


def settings(batch: int, batch_tokens: int, graph_tokens: int = 10**9) -> TrainingConfig:
    """Ours: all graphs kept unless told otherwise."""
    return TrainingConfig(
        batch_size=batch, dropout=False, lr=LR, batch_tokens=batch_tokens, graph_tokens=graph_tokens
    )


def process() -> tuple[ProcessPoolExecutor, Process]:
    """A process of its own, and how to have a function run there and wait for its result."""
    pool = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
    return pool, lambda function, *args: pool.submit(function, *args).result()


def fastest(run: Callable[[Any], Run], choices: Sequence[Any]) -> tuple[Any, dict[str, float]]:
    """The choice that trains one step fastest, and the seconds of each; the first warms up."""
    run(choices[-1])
    found = {choice: run(choice).seconds for choice in choices}
    return min(found, key=lambda choice: found[choice]), {str(k): v for k, v in found.items()}


def compare(
    ours: Process, theirs: Process, rows: Sequence[Triplet], batch: int, blocks: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Claims of one batch size, and what they were made of."""
    one = rows[:batch]
    mini, peers = fastest(lambda size: theirs(theirs_once, SETUP, one, batch, size), MINI_BATCHES)
    budget, budgets = fastest(
        lambda size: ours(ours_once, SETUP, one, settings(batch, size)), BATCH_TOKENS
    )
    log(f"batch {batch}: one step by mini-batch {peers}, ours by tokens of a micro-batch {budgets}")
    half = {
        "ours": ours(ours_once, BF16, one, settings(batch, budget)).seconds,
        "peer": theirs(theirs_once, BF16, one, batch, mini).seconds,
    }
    seconds: dict[str, list[float]] = {"ours": [], "ours, encoded twice": [], "peer": []}
    for _ in range(blocks):
        kept = ours(ours_once, SETUP, rows, settings(batch, budget))
        twice = ours(ours_once, SETUP, rows, settings(batch, budget, graph_tokens=0))
        peer = theirs(theirs_once, SETUP, rows, batch, mini)
        for name, run in zip(seconds, (kept, twice, peer), strict=True):
            seconds[name].append(run.seconds)
        log(f"batch {batch}: " + ", ".join(f"{name} {t[-1]:.1f} s" for name, t in seconds.items()))
    mid = {name: median(values) for name, values in seconds.items()}
    claims = {
        f"speedup_b{batch}": mid["peer"] / mid["ours"],
        "gradcache_overhead": mid["ours, encoded twice"] / mid["ours"],
    }
    return claims, {
        "steps": len(rows) // batch,
        "tokens": kept.tokens,
        "tokens_per_second": {name: kept.tokens / value for name, value in mid.items()},
        "our_model_gflops_per_second": kept.flops / mid["ours"] / 1e9,
        "seconds": seconds,
        "our_batch_tokens": budget,
        "our_seconds_of_one_step": budgets,
        "peer_mini_batch": mini,
        "peer_seconds_of_one_step": peers,
        "speedup_of_one_step": named(peers, budgets[str(budget)]),
        "bf16_of_one_step": {"seconds": half, "speedup": half["peer"] / half["ours"]},
    }


def named(peers: Mapping[str, float], ours: float) -> dict[str, float]:
    """Our speed-up in one step over the peer's settings that a user would know by name."""
    cached = {size: seconds for size, seconds in peers.items() if size != "None"}
    return {
        "MultipleNegativesRankingLoss": peers["None"] / ours,
        "CachedMultipleNegativesRankingLoss": cached[str(DEFAULT_MINI_BATCH)] / ours,
        "CachedMultipleNegativesRankingLoss, fastest mini_batch_size": min(cached.values()) / ours,
    }


def main() -> None:
    """Measure and report."""
    args = parser(__doc__).parse_args()
    middle = 20.0 if args.quick else 55.0
    encoder = SETUP.encoder()
    few = triplets(encoder, 16, args.seed, middle)
    gradient, loss = gradient_difference(SETUP, few, settings(16, 512))
    log(f"same batch: gradients differ by {gradient:.1e}, losses by {loss:.1e}")
    claims = {"max_gradient_difference": gradient, "gradcache_overhead": 0.0}
    details: dict[str, Any] = {"loss_difference": loss}
    (our_pool, ours), (their_pool, theirs) = process(), process()
    with our_pool, their_pool:
        for batch, steps in ({16: 1} if args.quick else STEPS).items():
            rows = triplets(encoder, batch * steps, args.seed + batch, middle)
            found, detail = compare(ours, theirs, rows, batch, 1 if args.quick else BLOCKS)
            overhead = max(claims["gradcache_overhead"], found["gradcache_overhead"])
            claims |= found | {"gradcache_overhead": overhead}
            details[f"batch_{batch}"] = detail
    write_claims(
        args,
        claims,
        data=f"random words, {middle:g} tokens in the middle, at most {MAX_TOKENS}",
        model={"encoder": SETUP.model},
        settings={
            "precision": "float32", "dropout": False, "lr": LR, "threads": torch.get_num_threads(),
            "ours": "training.compile off, and the fastest batch_tokens of our_seconds_of_one_step",
            "peer": "SentenceTransformerTrainer's defaults (fused AdamW, SDPA), and the fastest of "
            "its losses (None: plain, else cached by mini-batches of so many texts) in "
            "peer_seconds_of_one_step",
        },
        **details,
    )  # fmt: skip


if __name__ == "__main__":
    main()
