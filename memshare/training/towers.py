"""Which towers an encoder has, which of them learn, and the vectors of those that do not.

``training.towers``: ``shared``, one model for queries and memories; ``separate``, one each, equal
at first; ``query-only``, one each, with the memories' frozen (the asymmetric tuning of DPR-like
retrievers over a fixed index): its vectors are made once a run, and the index that holds them is
as good for the next generation as for this one.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memshare.arrays import Ints
from memshare.config import ConfigError, TrainingConfig
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.encoder_format import Side
from memshare.retrieval.errors import EncoderError
from memshare.training.batching import Batches, cut, deal
from memshare.training.gather import World
from memshare.training.lora import add_adapters
from memshare.training.precision import Autocast

_TRAINED: dict[str, tuple[Side, ...]] = {
    "shared": ("query",),  # which is the memories' too
    "separate": ("query", "memory"),
    "query-only": ("query",),
}


def prepare(encoder: Encoder, config: TrainingConfig, seed: int) -> None:
    """Split, freeze and adapt ``encoder`` as ``config`` says; ``seed`` draws the adapters.

    Raises `EncoderError` for two towers where one is to be trained, and `ConfigError` for a width
    of ``training.matryoshka`` that is no part of its vectors.
    """
    if wide := [width for width in config.matryoshka if width >= encoder.dim]:
        raise ConfigError(
            f"training.matryoshka: {wide} must be less than {encoder.dim}, the width of this "
            "encoder's vectors, which are trained as a whole anyway"
        )
    if config.towers == "shared":
        if encoder.two_towers:
            raise EncoderError(
                "the encoder has two towers: set training.towers to separate or query-only"
            )
    else:
        encoder.split()
    if config.towers == "query-only":
        encoder.tower("memory").requires_grad_(False)
    for side in _TRAINED[config.towers]:
        if config.lora.enabled:
            add_adapters(encoder, side, config.lora, seed)
        if config.compile:
            compile_layers(encoder.tower(side))


def compile_layers(tower: nn.Module, **options: Any) -> None:
    """Have torch.compile make the kernels of a model's repeated layers, in place.

    The layers alone, since they are the same code: they are compiled once, for any shape, and the
    names of the weights stay. ``options`` are torch.compile's.
    """
    stacks = [stack for stack in tower.modules() if isinstance(stack, nn.ModuleList)]
    for layer in (layer for stack in stacks for layer in stack):
        layer.compile(dynamic=True, **options)


class FrozenMemories:
    """The unit vectors of all docs of a run, by a memory tower that is not trained.

    (docs, dim) float32 on the process's device. Made in an order that depends on the data alone, so
    that a resumed run has the same bits.
    """

    def __init__(
        self,
        encoder: Encoder,
        batches: Batches,
        world: World,
        batch_tokens: int,
        autocast: Autocast = nullcontext,
    ) -> None:
        """Every process encodes its share; all of them must make one at the same time."""
        table, rows = batches.table, batches.doc_rows
        owners = deal(table.lengths[rows], world.size)
        mine = rows[owners[world.rank]]
        local = torch.zeros(len(mine), encoder.dim, device=world.device)
        encoder.tower("memory").eval()
        with torch.no_grad():
            for places in cut(table.lengths[mine], batch_tokens):
                inputs = encoder.collate(table.rows(mine[places]))
                with autocast():
                    local[places] = encoder.embed(inputs, "memory")
        self._vectors = world.gather_rows(local, owners)
        self._place = np.full(len(table.lengths), -1, dtype=np.int64)
        self._place[rows] = np.arange(len(rows))

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        batches: Batches,
        world: World,
        config: TrainingConfig,
        autocast: Autocast = nullcontext,
    ) -> FrozenMemories | None:
        """Them, or None where the memories' tower learns."""
        if config.towers != "query-only":
            return None
        return cls(encoder, batches, world, config.batch_tokens, autocast)

    def __call__(self, rows: Ints) -> Tensor:
        """The vectors (n, dim) of docs, given as rows (n,) of the token table."""
        at = torch.from_numpy(self._place[rows]).to(self._vectors.device)
        return self._vectors.index_select(0, at)
