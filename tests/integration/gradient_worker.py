"""Launched by test_contrastive.py in several processes: each saves its gradients of one step.

gradient_worker.py ENCODER OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from memshare.config import TrainingConfig
from memshare.retrieval.encoder import Encoder
from memshare.training.batching import Batches
from memshare.training.gather import DifferentData, World, launch
from memshare.training.optimizer import make_optimizer, whole
from memshare.training.select import select
from memshare.training.sharding import spread
from memshare.training.step import ContrastiveStep
from memshare.training.towers import FrozenMemories, prepare
from tests.training_data import candidate, example, examples

MODES: dict[str, dict[str, Any]] = {
    "kept": {},
    "cached": {"graph_tokens": 0},
    "separate": {"graph_tokens": 300, "towers": "separate"},
    "query-only": {"graph_tokens": 300, "towers": "query-only"},
}
BATCHES = {"thirteen": 13, "two": 2}  # neither divides by 4; with 4 processes some have no query


def main(encoder_folder: Path, output: Path) -> None:
    accelerator = launch()
    world = World(accelerator.device)
    for name, count in BATCHES.items():
        for mode, settings in MODES.items():
            encoder = Encoder.from_folder(encoder_folder, device="cpu")
            # A positive that two queries on different processes share, encoded by one of them.
            shared = candidate("shared", "a memory in common", -0.5, "in common")
            pair = [
                example(n, candidates=(shared, candidate(f"not {n}", f"no {n}", -9.0, rank=1)))
                for n in ("x", "y")
            ]
            made = [*examples(count - 2), *pair]
            config = TrainingConfig(dropout=False, batch_tokens=200, **settings)
            prepare(encoder, config, seed=0)
            world.divided = None
            spread(encoder, world)
            if world.divided is not None:
                world.divided.follow(make_optimizer(encoder.model, config))
            data = Batches(select(made, config).items, encoder, global_batch=count, seed=0)
            frozen = FrozenMemories.of(encoder, data, world, config)
            engine = ContrastiveStep(encoder, data.table, config, world, seed=0, frozen=frozen)
            result = engine.backward(data.batch(0), 0, stop=world.rank == world.size - 1)
            assert result.stop, "one process was asked to stop, and this one does not know"
            named = encoder.model.named_parameters()
            gradients = {n: whole(p.grad) for n, p in named if p.grad is not None}
            save_file(gradients, output / f"{name}-{mode}-{world.rank}.safetensors")
            (output / f"{name}-{mode}-{world.rank}.json").write_text(json.dumps(result.loss))
    world.check_same("equal", "data")
    try:
        world.check_same(str(world.rank), "examples")
    except DifferentData as error:
        (output / f"different-{world.rank}.txt").write_text(str(error))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
