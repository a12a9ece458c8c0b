"""Launched by test_contrastive_processes.py in several processes: gradients of single steps.

gradient_worker.py ENCODER OUTPUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from memshare.config import LoRAConfig, TrainingConfig
from memshare.retrieval.encoder import Encoder
from memshare.training.batching import Batches
from memshare.training.checkpoint import trainable
from memshare.training.gather import DifferentData, World, launch, leave
from memshare.training.optimizer import make_optimizer, update, whole
from memshare.training.select import select
from memshare.training.sharding import spread
from memshare.training.step import ContrastiveStep
from memshare.training.towers import FrozenMemories, prepare
from tests.training_data import candidate, example, examples, unlearnable

LORA = LoRAConfig(enabled=True, r=4, alpha=8, dropout=0.0)
# In these the gradient is the same however many processes there are.
MODES: dict[str, dict[str, Any]] = {
    "kept": {},
    "cached": {"graph_tokens": 0},
    "separate": {"graph_tokens": 300, "towers": "separate"},
    "query-only": {"graph_tokens": 300, "towers": "query-only"},
    "lora": {"graph_tokens": 300, "lora": LORA},
    "lora-query-only": {"graph_tokens": 300, "towers": "query-only", "lora": LORA},
    # At a temperature of 0.05 its gradients are near 37, of which float32's last bit is 4e-6.
    "distilled": {
        "graph_tokens": 300, "distill_weight": 0.5, "matryoshka": (16, 8), "temperature": 0.2,
    },
    "t5": {"graph_tokens": 300},
    "qwen3": {"graph_tokens": 300, "temperature": 0.2},
}  # fmt: skip
OTHERS = ("t5", "qwen3")  # encoders beside the given one: one that is padded, a decoder, packed
BATCHES = {"thirteen": 13, "two": 2}  # neither divides by 4; with 4 processes some have no query
# One of these and more: the same bits whether graphs are kept or texts are encoded twice.
REPLAYED: dict[str, tuple[str, dict[str, Any]]] = {
    "dropout": ("kept", {"dropout": True}),
    "dropout-separate": ("separate", {"dropout": True}),
    "dropout-lora": ("lora", {"dropout": True, "lora": LORA.model_copy(update={"dropout": 0.3})}),
    "bf16": ("kept", {}),
    "bf16-dropout-lora": ("lora", {"dropout": True}),
}
GRAPHS = {"graphs": 100_000, "twice": 0}


def half() -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16)


def step(
    encoder_folder: Path,
    world: World,
    count: int,
    settings: dict[str, Any],
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step over ``count`` queries."""
    encoder = Encoder.from_folder(encoder_folder, device="cpu")
    # A positive that two queries on different processes share, encoded by one of them.
    shared = candidate("shared", "a memory in common", -0.5, "in common")
    pair = [
        example(n, candidates=(shared, candidate(f"not {n}", f"no {n}", -9.0, rank=1)))
        for n in ("x", "y")
    ]
    made = [*examples(count - 2), *pair]
    config = TrainingConfig(**{"dropout": False, "batch_tokens": 200, **settings})
    prepare(encoder, config, seed=0)
    for name, weight in encoder.model.named_parameters():
        if "lora_B" in name:  # zero at first, and so would be the gradients of all others
            torch.nn.init.normal_(weight, std=0.05)
    world.divided = None
    spread(encoder, world)
    if world.divided is not None:
        world.divided.follow(make_optimizer(encoder.model, config))
    data = Batches(select(made, config).items, encoder, global_batch=count, seed=0)
    frozen = FrozenMemories.of(encoder, data, world, config, autocast)
    engine = ContrastiveStep(
        encoder, data.table, config, world, seed=0, autocast=autocast, frozen=frozen
    )
    result = engine.backward(data.batch(0), 0, stop=world.rank == world.size - 1)
    assert result.stop, "one process was asked to stop, and this one does not know"
    named = encoder.model.named_parameters()
    return result.loss, {n: whole(p.grad) for n, p in named if p.grad is not None}


def nothing(encoder_folder: Path, world: World) -> None:
    """A batch without negatives changes no weight on any process, and all hear who should stop."""
    encoder = Encoder.from_folder(encoder_folder, device="cpu")
    config = TrainingConfig(weight_decay=0.1, dropout=False)
    world.divided = None
    spread(encoder, world)
    optimizer = make_optimizer(encoder.model, config)
    if world.divided is not None:
        world.divided.follow(optimizer)
    mixed = [*examples(8), *(replace(one, pool="bare") for one in unlearnable(8))]
    data = Batches(select(mixed, config).items, encoder, global_batch=8, seed=0)
    engine = ContrastiveStep(encoder, data.table, config, world, seed=0)
    for step in sorted(range(4), key=lambda step: not data.batch(step).teaches):
        batch, before = data.batch(step), trainable(encoder.model)
        before = {name: value.clone() for name, value in before.items()}
        result = engine.backward(batch, step, stop=world.rank == world.size - 1)
        assert result.stop, "one process was asked to stop, and this one does not know"
        norm = update(optimizer, 1e-3, 1.0)
        same = all(v.equal(before[n]) for n, v in trainable(encoder.model).items())
        assert same == (norm == 0) == (not batch.teaches), (step, norm)


def main(encoder_folder: Path, output: Path) -> None:
    accelerator = launch()
    world = World(accelerator.device)
    for name, count in BATCHES.items():
        for mode, settings in MODES.items():
            folder = encoder_folder.with_name(mode) if mode in OTHERS else encoder_folder
            loss, gradients = step(folder, world, count, settings)
            save_file(gradients, output / f"{name}-{mode}-{world.rank}.safetensors")
            (output / f"{name}-{mode}-{world.rank}.json").write_text(json.dumps(loss))
    for mode, (plain, more) in REPLAYED.items():
        autocast = half if mode.startswith("bf16") else nullcontext
        for name, tokens in GRAPHS.items():
            settings = {**MODES[plain], **more, "graph_tokens": tokens}
            _, gradients = step(encoder_folder, world, BATCHES["thirteen"], settings, autocast)
            save_file(gradients, output / f"{name}-{mode}-{world.rank}.safetensors")
    nothing(encoder_folder, world)
    world.check_same({"data": "equal"})
    try:
        world.check_same({"data": "equal", "examples": world.rank})
    except DifferentData as error:
        (output / f"different-{world.rank}.txt").write_text(str(error))
    leave(accelerator, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
