"""One process of a group of benchmarks/scaling.py: trains and encodes when told to, and reports.

    accelerate launch ... benchmarks/scaling_worker.py FOLDER --queries 16 --memories 300

The group's first process waits for ``FOLDER/turn-K.json`` (K = 0, 1, ...), all of it does what that
says, and the first process answers in ``FOLDER/done-K.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from random_texts import random_text, selected, words_of
from torch import Tensor

from memshare.arrays import Ints
from memshare.config import Config, EncoderConfig, PoolSettings, RunConfig, TrainingConfig
from memshare.files import write_json
from memshare.pool.store import PoolStore
from memshare.records import NewMemory
from memshare.retrieval.build import build_generation
from memshare.retrieval.divided import serve
from memshare.retrieval.encoder import Encoder
from memshare.training.batching import Batches
from memshare.training.gather import World, launch, leave
from memshare.training.optimizer import make_optimizer, update
from memshare.training.select import Selected
from memshare.training.step import ContrastiveStep

MODEL = "all-MiniLM-L6-v2"
MEMORY_TOKENS, QUERY_TOKENS = 55, 15  # in the middle of log-normal lengths
HARD_NEGATIVES = 3


class Watched(World):
    """A world that tells waiting for others (``wait``) from moving data (``move``), in seconds."""

    def __init__(self, device: torch.device) -> None:
        """Not watching yet: a barrier before each collective costs time itself."""
        super().__init__(device)
        self.watching = False
        self.seconds = {"wait": 0.0, "move": 0.0}

    @contextmanager
    def _watch(self) -> Iterator[None]:
        if not self.watching:
            yield
            return
        began = time.perf_counter()
        self.barrier()
        met = time.perf_counter()
        yield
        self.seconds["wait"] += met - began
        self.seconds["move"] += time.perf_counter() - met

    def gather_rows(self, local: Tensor, owners: Sequence[Ints]) -> Tensor:
        """As `World.gather_rows`."""
        with self._watch():
            return super().gather_rows(local, owners)

    def sum(self, tensor: Tensor) -> Tensor:
        """As `World.sum`."""
        with self._watch():
            return super().sum(tensor)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """As `World.sum_gradients`."""
        with self._watch():
            super().sum_gradients(parameters)


def text(draw: random.Random, words: Sequence[str], middle: int) -> str:
    """Random words, as many as a log-normal length says."""
    return random_text(draw, words, middle, 3, 250)


def items(words: Sequence[str], queries: int, seed: int) -> list[Selected]:
    """Training queries with a positive and hard negatives each; no text comes twice."""
    draw = random.Random(seed)

    def memories(count: int) -> list[str]:
        return [text(draw, words, MEMORY_TOKENS) for _ in range(count)]

    return selected(
        (text(draw, words, QUERY_TOKENS), memories(1)[0], memories(HARD_NEGATIVES))
        for _ in range(queries)
    )


class Work:
    """What one group is asked for: training steps, or encoding its pool."""

    def __init__(self, args: argparse.Namespace, world: Watched) -> None:
        """The pool has ``args.memories`` a process, a batch ``args.queries`` a process."""
        self.world = world
        self.config = Config(
            run=RunConfig(dir=args.folder / "run"),
            pools={"main": PoolSettings()},
            encoder=EncoderConfig(model=MODEL, max_length=256, device="cpu"),
        )
        self.settings = TrainingConfig(batch_size=args.queries, hard_negatives=HARD_NEGATIVES)
        self.trained = Encoder.load(self.config.encoder)
        self.frozen = Encoder.load(self.config.encoder)
        words = words_of(self.trained)
        self.optimizer = make_optimizer(self.trained.model, self.settings)
        self.batches = Batches(
            items(words, args.queries * world.size * 8, args.seed), self.trained,
            global_batch=args.queries * world.size, seed=args.seed, settings=self.settings,
        )  # fmt: skip
        self.step = ContrastiveStep(
            self.trained, self.batches.table, self.settings, world, seed=args.seed
        )
        self.steps = count()
        if world.main:
            with PoolStore.open(self.config.url) as store:
                store.create_pool("main")
                # Every group has the same lengths in the same order, as often as it has processes.
                lengths = random.Random(args.seed)
                rows = [text(lengths, words, MEMORY_TOKENS) for _ in range(args.memories)]
                made = [f"{row} {copy}" for copy in range(world.size) for row in rows]
                store.append([NewMemory("main", row, "answer") for row in made])
        world.barrier()

    def train(self, steps: int) -> dict[str, Any]:
        """So many steps: seconds and real tokens of all processes together."""
        self.world.barrier()
        began = time.perf_counter()
        tokens = 0
        for _ in range(steps):
            number = next(self.steps)
            tokens += self.step.backward(self.batches.batch(number), number).tokens
            update(self.optimizer, 1e-6, self.settings.max_grad_norm)
        return {"seconds": time.perf_counter() - began, "units": tokens}

    def watch(self, steps: int) -> dict[str, Any]:
        """As `train`, and what of it each process waited and moved data."""
        self.world.watching, self.world.seconds = True, {"wait": 0.0, "move": 0.0}
        done = self.train(steps)
        self.world.watching = False
        each = self.world.to_main(self.world.seconds)
        return (
            {**done, **{f"{name}_seconds": [one[name] for one in each] for name in each[0]}}
            if each
            else done
        )

    def encode(self, _: int) -> dict[str, Any]:
        """The whole pool once, nothing written: seconds and memories."""
        self.world.barrier()
        began = time.perf_counter()
        with PoolStore.open(self.config.url) as store:
            if not self.world.main:
                serve(store, self.frozen, self.world)
                return {}
            built = build_generation(store, self.config, self.frozen, peers=self.world)
        return {"seconds": time.perf_counter() - began, "units": len(built.ids)}


def main() -> None:
    """Take turns until told to end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--queries", type=int, required=True, help="a process and step")
    parser.add_argument("--memories", type=int, required=True, help="a process")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    accelerator = launch()
    torch.set_num_threads(1)
    world = Watched(accelerator.device)
    work = Work(args, world)
    for number in count():
        turn: dict[str, Any] = world.from_main(
            await_turn(args.folder / f"turn-{number}.json") if world.main else {}
        )
        if turn["what"] == "end":
            break
        done = getattr(work, turn["what"])(turn["count"])
        if world.main:
            write_json(args.folder / f"done-{number}.json", done)
    world.end()
    leave(accelerator, world)


def await_turn(path: Path) -> dict[str, Any]:
    """What the turn's file says, once it is there."""
    while not path.exists():
        time.sleep(0.02)
    turn: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return turn


if __name__ == "__main__":
    main()
