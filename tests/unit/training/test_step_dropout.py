"""Dropout in a step: which towers have it, and whose random numbers are whose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memshare.config import TrainingConfig
from memshare.retrieval.encoder import SIDES, Encoder
from memshare.training.batching import Batches
from memshare.training.gather import World
from memshare.training.select import select
from memshare.training.step import ContrastiveStep
from memshare.training.towers import FrozenMemories, prepare
from tests.tiny import tiny_encoder
from tests.training_data import examples


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return Encoder.from_folder(tiny_encoder(tmp_path / "tiny"), device="cpu")


@pytest.fixture
def world() -> World:
    return World(torch.device("cpu"))


def engine(
    encoder: Encoder, world: World, seed: int = 0, **changes: object
) -> tuple[ContrastiveStep, Batches]:
    config = TrainingConfig(**changes)  # type: ignore[arg-type]
    prepare(encoder, config, seed=0)
    data = Batches(select(examples(8), config).items, encoder, global_batch=8, seed=0)
    frozen = FrozenMemories.of(encoder, data, world, config)
    return ContrastiveStep(encoder, data.table, config, world, seed=seed, frozen=frozen), data


def test_each_micro_batch_draws_from_a_seed_of_its_own(
    encoder: Encoder, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made of the run's seed, the step, the process and the micro-batch's place."""
    drawn: list[int] = []
    real = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: (drawn.append(seed), real(seed))[1])
    micro = []
    for seed in (0, 1):
        made, data = engine(encoder, world, seed, batch_tokens=64, graph_tokens=10**6)
        for step in (0, 1):
            drawn.clear()
            made.backward(data.batch(0), step)
            micro += drawn
    drawn.clear()
    world.rank = 1  # of a second process: `_encode` alone needs no other
    made._encode(data.batch(0).texts[:1], "query", 1, 0)
    assert len(micro) > 4 * 3 and len({*micro, *drawn}) == len(micro) + 1


@pytest.mark.parametrize("towers", ["shared", "separate", "query-only"])
@pytest.mark.parametrize("dropout", [True, False])
def test_the_towers_that_learn_have_dropout(
    encoder: Encoder, world: World, towers: str, dropout: bool
) -> None:
    engine(encoder, world, towers=towers, dropout=dropout)
    learns = {"query": dropout, "memory": dropout and towers != "query-only"}
    assert {side: encoder.tower(side).training for side in SIDES} == learns
