"""Training speed, side by side with sentence-transformers' trainer, on a CPU.

Both train all-MiniLM-L6-v2 on the same triplets (query, positive, hard negative; lengths log-normal
around 55 tokens, up to 256) with the same loss, in float32 (`trainers`); loss and gradients are
first shown to be equal. Its plain loss and its cached one with mini-batches of several sizes are
tried on one step each, and the fastest is the one that counts.

Each side has a process of its own, which are given work in turns, never at once; a figure is the
ratio of the medians, since machines are shared and noisy. Claims: ``speedup_b16`` and
``speedup_b64``, our real (non-padding) tokens a second over theirs at that batch size;
``gradcache_overhead``, the time of our step with every micro-batch encoded twice over that with all
graphs kept, the larger of the two batch sizes'; ``max_gradient_difference``, absolute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
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
STEPS = {16: 4, 64: 2}  # of one timed run
MINI_BATCHES = {16: (None, 4, 16), 64: (None, 4, 8, 32)}  # of the peer; None: its plain loss
BLOCKS = 3  # timed runs of each side
BATCH_TOKENS = 2048  # ours: of a micro-batch
Process = Callable[..., Run]


def settings(batch: int, **changes: Any) -> TrainingConfig:
    """Ours: all graphs kept unless told otherwise."""
    base = {"batch_size": batch, "dropout": False, "lr": LR, "batch_tokens": BATCH_TOKENS,
            "graph_tokens": 10**9}  # fmt: skip
    return TrainingConfig(**{**base, **changes})


def process() -> tuple[ProcessPoolExecutor, Process]:
    """A process of its own, and how to have a function run there and wait for its result."""
    pool = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
    return pool, lambda function, *args: pool.submit(function, *args).result()


def fastest_peer(
    theirs: Process, rows: Sequence[Triplet], sizes: Sequence[int | None]
) -> tuple[int | None, dict[str, float]]:
    """The mini-batch size that trains one step fastest, and the seconds of each."""
    theirs(theirs_once, SETUP, rows, len(rows), sizes[0])  # warms up
    found = {size: theirs(theirs_once, SETUP, rows, len(rows), size).seconds for size in sizes}
    names = {"plain" if size is None else f"cached by {size}": t for size, t in found.items()}
    return min(found, key=lambda size: found[size]), names


def compare(
    ours: Process, theirs: Process, rows: Sequence[Triplet], batch: int, blocks: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Claims of one batch size, and what they were made of."""
    chosen, tried = fastest_peer(theirs, rows[:batch], MINI_BATCHES[batch])
    log(f"batch {batch}: sentence-transformers, seconds of one step: {tried}")
    ours(ours_once, SETUP, rows[:batch], settings(batch))  # warms up
    seconds: dict[str, list[float]] = {"ours": [], "ours, encoded twice": [], "peer": []}
    for _ in range(blocks):
        run = ours(ours_once, SETUP, rows, settings(batch))
        found = {
            "ours": run.seconds,
            "ours, encoded twice": ours(
                ours_once, SETUP, rows, settings(batch, graph_tokens=0)
            ).seconds,
            "peer": theirs(theirs_once, SETUP, rows, batch, chosen).seconds,
        }
        log(f"batch {batch}: " + ", ".join(f"{name} {t:.1f} s" for name, t in found.items()))
        for name, value in found.items():
            seconds[name].append(value)
    mid = {name: median(values) for name, values in seconds.items()}
    claims = {
        f"speedup_b{batch}": mid["peer"] / mid["ours"],
        "gradcache_overhead": mid["ours, encoded twice"] / mid["ours"],
    }
    return claims, {
        "steps": len(rows) // batch,
        "tokens": run.tokens,
        "tokens_per_second": {name: run.tokens / value for name, value in mid.items()},
        "our_model_gflops_per_second": run.flops / mid["ours"] / 1e9,
        "seconds": seconds,
        "peer_mini_batch": chosen,
        "peer_seconds_of_one_step": tried,
    }


def main() -> None:
    """Measure and report."""
    args = parser(__doc__).parse_args()
    middle = 20.0 if args.quick else 55.0
    encoder = SETUP.encoder()
    few = triplets(encoder, 16, args.seed, middle)
    gradient, loss = gradient_difference(SETUP, few, settings(16))
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
            "ours": {"batch_tokens": BATCH_TOKENS, "compile": False},
            "peer": "SentenceTransformerTrainer's defaults (fused AdamW, SDPA), and the fastest of "
            "its losses and mini-batch sizes in peer_seconds_of_one_step",
        },
        **details,
    )  # fmt: skip


if __name__ == "__main__":
    main()
