"""One contrastive step: from a batch to the gradient of its global loss, in bounded memory.

Gradient caching (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup") is the one engine, for any number of processes:

1. encode this process's texts in length-sorted micro-batches of ``batch_tokens`` tokens, without
   padding where the model and the hardware allow it (`packing`);
2. gather all vectors of the step from all processes;
3. loss of this process's queries against all docs, in tiles of rows, and its gradient with respect
   to all vectors, summed over the processes;
4. push that gradient back through each micro-batch.

Micro-batches keep their graph as long as they fit in ``graph_tokens``; the others are encoded again
in 4, with the random state of their first pass, so that dropout is the same. The loss is divided by
the global batch, so W processes with batch B have the loss and gradient of one with W * B.

Random numbers are drawn from a seed made of (run seed, step, process, micro-batch) before each
micro-batch, so a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from memshare.arrays import Ints
from memshare.config import TrainingConfig
from memshare.progress import log
from memshare.retrieval import packing
from memshare.retrieval.encoder import SIDES, Encoder
from memshare.retrieval.encoder_format import Side
from memshare.training.batching import cut, cut_packed, deal
from memshare.training.flops import ModelCost, bf16_peak
from memshare.training.gather import World
from memshare.training.loss import objective_rows
from memshare.training.precision import Autocast, described, in_bf16
from memshare.training.step_batch import StepBatch
from memshare.training.step_result import NonFinite, StepResult
from memshare.training.token_table import TokenTable
from memshare.training.towers import FrozenMemories

TILE_ROWS = 1024  # queries whose similarities to all docs are in memory at a time


class ContrastiveStep:
    """Computes gradients; the optimizer is the caller's. Draws from torch's global generator."""

    def __init__(
        self,
        encoder: Encoder,
        table: TokenTable,
        config: TrainingConfig,
        world: World,
        *,
        seed: int,
        autocast: Autocast = nullcontext,
        frozen: FrozenMemories | None = None,
    ) -> None:
        """``frozen``: the docs' vectors, where the memories' tower does not learn."""
        self._encoder = encoder
        self._table = table
        self._config = config
        self._world = world
        self._seed = seed
        self._autocast = autocast
        self._frozen = frozen
        self._distils = config.distill_weight > 0
        encoder.tower("query").train(config.dropout)
        if frozen is None:
            encoder.tower("memory").train(config.dropout)
        self._tables = _learning_tables(encoder) if world.device.type == "cpu" else []
        half = in_bf16(autocast, world.device.type)
        sides: tuple[Side, ...] = SIDES if frozen is None else ("query",)
        towers = [encoder.tower(side) for side in sides]
        self._packed = packing.enable(towers, world.device, half=half, dropout=config.dropout)
        if world.main:
            how = "packed without padding" if self._packed else "padded to the longest"
            log(str(encoder))
            log(f"texts are {how}; computing in {described(half, world.device.type)}")
        self._cost = ModelCost.of(encoder.tower("query"))
        self._peak = bf16_peak(world.device) if half else None

    def backward(self, batch: StepBatch, step: int, stop: bool = False) -> StepResult:
        """Leave the global loss's gradient in ``.grad``; equal on all processes.

        A batch that has nothing to teach leaves none, not even zeros, so that the optimizer, weight
        decay included, changes nothing. ``step`` counts from 0. Raises `NonFinite` on every
        process, with the gradients unusable.
        """
        if not batch.teaches:
            return self._skip(stop)
        world, table = self._world, self._table
        # Docs come first; those of a frozen tower are known.
        known = 0 if self._frozen is None else batch.docs
        parts = self._parts(batch)
        owners = [np.concatenate([part[rank] for _, part in parts]) for rank in range(world.size)]
        mine = batch.texts[owners[world.rank]]  # rows of the token table, longest first by part
        local = torch.zeros(len(mine), self._encoder.dim, device=world.device)
        micro: list[tuple[Side, slice]] = []
        for side, part in parts:
            start = micro[-1][1].stop if micro else 0
            share = table.lengths[batch.texts[part[world.rank]]]
            cuts = (cut_packed if self._packed else cut)(share, self._config.batch_tokens)
            micro += [(side, slice(start + c.start, start + c.stop)) for c in cuts]
        graphs: dict[int, Tensor] = {}
        padded = 0
        for index, (side, places) in enumerate(micro):
            lengths = table.lengths[mine[places]]
            padded += int(lengths.sum()) if self._packed else len(lengths) * int(lengths.max())
            keep = padded <= self._config.graph_tokens
            with torch.set_grad_enabled(keep):
                vectors = self._encode(mine[places], side, step, index)
            local[places] = vectors.detach()
            if keep:
                graphs[index] = vectors

        everything = world.gather_rows(local, [places - known for places in owners])
        if self._frozen is not None:
            everything = torch.cat([self._frozen(batch.texts[:known]), everything])
        losses, gradient = self._loss(everything, batch)
        figures = torch.tensor([float(padded), float(stop)], dtype=torch.float64)
        total = world.sum(torch.cat([losses.double(), figures.to(world.device)]))
        loss, info_nce, kl, everywhere, stopped = total.tolist()
        if not math.isfinite(loss):
            raise NonFinite("the loss", step, batch)
        places_of_mine = torch.from_numpy(owners[world.rank] - known).to(world.device)
        gradient = world.sum(gradient[known:]).index_select(0, places_of_mine)

        for index, (side, places) in enumerate(micro):
            kept = graphs.pop(index, None)
            vectors = self._encode(mine[places], side, step, index) if kept is None else kept
            torch.autograd.backward(vectors, gradient[places])
            _fill(self._tables)
        world.sum_gradients(p for p in self._encoder.model.parameters() if p.requires_grad)
        encoded = table.lengths[batch.texts[known:]]
        return StepResult(
            loss=loss,
            parts={"info_nce": info_nce, "kl": kl} if self._distils else {},
            tokens=int(encoded.sum()),
            padded=int(everywhere),
            stop=stopped > 0,
            flops=self._cost.step(encoded),
            peak=None if self._peak is None else self._peak * world.size,
        )

    def _skip(self, stop: bool) -> StepResult:
        """What comes of a step without a gradient, for which nothing is encoded."""
        stopped = self._world.sum(torch.tensor(float(stop), device=self._world.device))
        return StepResult(
            loss=0.0,
            parts={"info_nce": 0.0, "kl": 0.0} if self._distils else {},
            tokens=0,
            padded=0,
            stop=bool(stopped > 0),
            flops=0.0,
        )

    def check(self, norm: float, batch: StepBatch, step: int, *, last: bool) -> None:
        """Raise `NonFinite` on every process if ``step`` has ruined the training.

        ``norm``: of its gradient, as `update` gave it. The ``last`` step's weights, which no
        further step will judge, must give finite vectors: each process encodes one micro-batch a
        tower.
        """
        if not math.isfinite(norm):
            raise NonFinite("the gradient", step, batch)
        if not last:
            return
        found = 0
        for side, part in self._parts(batch):
            rows = batch.texts[part[self._world.rank]]
            for first in cut(self._table.lengths[rows], self._config.batch_tokens)[:1]:
                with torch.no_grad():
                    vectors = self._encode(rows[first], side, step + 1, 0)
                found += int((~vectors.isfinite()).sum())
        if self._world.sum(torch.tensor(float(found), device=self._world.device)) > 0:
            raise NonFinite("what the encoder gives after it", step, batch, done=step + 1)

    def _parts(self, batch: StepBatch) -> list[tuple[Side, list[Ints]]]:
        """What is encoded in this step: tower, and each process's places in ``batch.texts``."""
        texts, docs = len(batch.texts), batch.docs
        spans: list[tuple[Side, int, int]] = [("query", 0, texts)]  # one tower takes both
        if self._encoder.two_towers:
            spans = [("memory", 0, docs), ("query", docs, texts)]
        lengths = self._table.lengths[batch.texts]
        return [
            (side, [start + places for places in deal(lengths[start:stop], self._world.size)])
            for side, start, stop in spans
            if side == "query" or self._frozen is None
        ]

    def _encode(self, rows: Ints, side: Side, step: int, index: int) -> Tensor:
        """Unit vectors (b, d) of a micro-batch; the same random numbers whenever it is called."""
        name = f"{self._seed}/{step}/{self._world.rank}/{index}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) >> 1
        torch.manual_seed(seed)
        gather = self._encoder.pack if self._packed else self._encoder.collate
        inputs = gather(self._table.rows(rows))
        # A context of its own each time: autocast caches the cast weights, and casts made without
        # gradients must not serve the pass that needs them.
        with self._autocast(), _row_gradients(self._tables):
            return self._encoder.embed(inputs, side)

    def _loss(self, vectors: Tensor, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """This process's share of the loss and its parts (3,), as `Objective` has them.

        And the loss's gradient (n, d) for all vectors (n, d).
        """
        queries = len(batch.rows)
        start = queries * self._world.rank // self._world.size
        stop = queries * (self._world.rank + 1) // self._world.size
        leaf = vectors.requires_grad_()
        rows = torch.from_numpy(batch.rows).to(vectors.device)
        total = vectors.new_zeros(3)
        for low in range(start, stop, TILE_ROWS):
            high = min(low + TILE_ROWS, stop)
            positive, valid = batch.masks(low, high, vectors.device)
            each = objective_rows(
                leaf.index_select(0, rows[low:high]),
                leaf[: batch.docs],
                positive,
                valid,
                batch.measured(low, high, vectors.device) if self._distils else None,
                temperature=self._config.temperature,
                distill_weight=self._config.distill_weight,
                distill_temperature=self._config.distill_temperature,
                dims=self._config.matryoshka,
            )
            share = each.loss.sum() / queries
            torch.autograd.backward(share)
            parts = [part.detach().sum() / queries for part in each[1:]]
            total += torch.stack([share.detach(), *parts])
        gradient = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        return total, gradient


def _learning_tables(encoder: Encoder) -> list[nn.Embedding]:
    """The embedding tables that have gradients."""
    tables = (item for item in encoder.model.modules() if isinstance(item, nn.Embedding))
    return [table for table in tables if table.weight.requires_grad]


@contextmanager
def _row_gradients(tables: Sequence[nn.Embedding]) -> Iterator[None]:
    """What ``tables`` look up here gives gradients of the rows looked up, as sparse tensors.

    A dense gradient is as large as the vocabulary, and each micro-batch would fill one and add it
    up: on a CPU that is a tenth of a step. To be added up by `_fill`.
    """
    for table in tables:
        table.sparse = True
    try:
        yield
    finally:
        for table in tables:
            table.sparse = False


def _fill(tables: Sequence[nn.Embedding]) -> None:
    """Have gradients that are sparse yet add up in a dense one: sparse sums keep every row."""
    for weight in (table.weight for table in tables):
        if weight.grad is not None and weight.grad.is_sparse:
            weight.grad = weight.grad.to_dense()
