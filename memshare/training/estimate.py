"""What a training run will need, told before it starts (``--dry-run``)."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass

import psutil
import torch

from memshare.arrays import Ints
from memshare.config import TrainingConfig
from memshare.retrieval import packing
from memshare.retrieval.encoder import SIDES, Encoder
from memshare.training import activations
from memshare.training.activations import Activations
from memshare.training.batching import Batches, cut, cut_packed, deal
from memshare.training.gather import wants_fsdp
from memshare.training.precision import Autocast, described, in_bf16
from memshare.training.step import TILE_ROWS

_FLOAT = 4  # bytes
# Copies of the similarities: what autograd keeps of them at each width (for InfoNCE two and two
# masks, for the KL divergence as many), and those that are worked on.
_KEPT_COPIES = 2.5
_WORKING_COPIES, _MORE_TO_DISTIL = 4, 2


@dataclass(frozen=True, slots=True)
class Estimate:
    """Counts, and bytes on each process; the activations' part is a rule (`activations`).

    ``frozen_bytes``: the vectors of all docs, where the memories' tower does not learn.
    ``twice``: tokens of a step that a process encodes twice, having dropped their activations, and
    ``twice_bytes`` what it would take to keep these.
    ``encoder`` and ``precision``: in words. ``free_bytes``: what a process can have of its device's
    memory, its weights included.
    """

    encoder: str
    parameters: int
    trainable: int
    examples: int
    steps: int
    tokens_per_step: int
    weights_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    twice: int
    twice_bytes: int
    logits_bytes: int
    frozen_bytes: int
    precision: str
    free_bytes: int

    @property
    def needed_bytes(self) -> int:
        """All of it."""
        sizes = (self.weights_bytes, self.optimizer_bytes, self.activation_bytes)
        return sum(sizes) + self.logits_bytes + self.frozen_bytes

    def __str__(self) -> str:
        mib = 2**20
        parts = {
            "weights": self.weights_bytes,
            "gradients and optimizer": self.optimizer_bytes,
            "activations": self.activation_bytes,
            "similarities": self.logits_bytes,
        } | ({"frozen memories' vectors": self.frozen_bytes} if self.frozen_bytes else {})
        each = ", ".join(f"{name} {size // mib:,}" for name, size in parts.items())
        return "\n".join(
            (
                self.encoder,
                f"model: {self.parameters:,} parameters, {self.trainable:,} trainable",
                f"data: {self.examples:,} examples, {self.steps:,} steps of about "
                f"{self.tokens_per_step:,} tokens over all processes",
                f"memory per process: about {self.needed_bytes // mib:,} MiB ({each})",
                *self._cached(),
                f"precision: {self.precision}",
                *self._warnings(),
            )
        )

    def _cached(self) -> list[str]:
        if not self.twice:
            return []
        return [
            f"gradient caching: about {self.twice:,} tokens of a step are encoded twice by a "
            f"process; to keep their activations would take {self.twice_bytes // 2**20:,} MiB more "
            "(training.graph_tokens)"
        ]

    def _warnings(self) -> list[str]:
        if self.needed_bytes <= self.free_bytes:
            return []
        return [
            f"warning: that is more than the {self.free_bytes // 2**20:,} MiB that a process can "
            "have here; lower training.graph_tokens, then training.batch_tokens"
        ]


def estimate(
    encoder: Encoder, batches: Batches, steps: int, config: TrainingConfig, processes: int,
    autocast: Autocast = nullcontext,
) -> Estimate:  # fmt: skip
    """Estimate a run's needs; the first batch stands for all."""
    device = torch.device(encoder.device)
    half = in_bf16(autocast, device.type)
    parameters = [(p.numel(), p.requires_grad) for p in encoder.model.parameters()]
    everything = sum(count for count, _ in parameters)
    trainable = sum(count for count, trained in parameters if trained)
    batch = batches.batch(0)
    # Gradients and two moments; or whole gradients, and a share of four (`sharding`).
    divided = processes > 1 and wants_fsdp()
    copies = 1 + 4 / processes if divided else 3
    shares = _frozen_beside(encoder) / processes if divided else 0
    frozen = config.towers == "query-only"
    learns = batch.texts[batch.docs :] if frozen else batch.texts
    lengths = batches.table.lengths[learns]
    tower = encoder.tower("query")
    packed = packing.possible([tower], device, half=half, dropout=config.dropout)
    kept = activations.of(tower, device, half=half, packed=packed, dropout=config.dropout)
    share = lengths[deal(lengths, processes)[0]]
    held, twice = _most(share, kept, config)
    all_held, _ = _most(share, kept, config.model_copy(update={"graph_tokens": sys.maxsize}))
    rows = min(TILE_ROWS, -(-len(batch.rows) // processes))
    weights = everything * _FLOAT
    return Estimate(
        encoder=str(encoder),
        parameters=everything,
        trainable=trainable,
        examples=len(batches.items),
        steps=steps,
        tokens_per_step=int(lengths.sum()),
        weights_bytes=weights,
        optimizer_bytes=round((trainable * copies + shares) * _FLOAT),
        activation_bytes=held,
        twice=twice,
        twice_bytes=all_held - held,
        logits_bytes=similarities(rows, batch.docs, config),
        frozen_bytes=len(batches.doc_rows) * encoder.dim * _FLOAT if frozen else 0,
        precision=described(half, device.type),
        free_bytes=_free(device) + weights,
    )


def _frozen_beside(encoder: Encoder) -> int:
    """The weights that do not learn of towers that do, as with LoRA: they are divided, too."""
    towers = [encoder.tower(side) for side in (SIDES if encoder.two_towers else SIDES[:1])]
    parts = [[(p.numel(), p.requires_grad) for p in tower.parameters()] for tower in towers]
    learning = (part for part in parts if any(trained for _, trained in part))
    return sum(count for part in learning for count, trained in part if not trained)


def similarities(rows: int, docs: int, config: TrainingConfig) -> int:
    """What the loss of ``rows`` queries against ``docs`` docs takes (`objective_rows`), in bytes.

    Its gradient is taken of all widths at once, so what each of them keeps is there together.
    """
    widths, distils = 1 + len(config.matryoshka), config.distill_weight > 0
    kept = widths * _KEPT_COPIES * (2 if distils else 1)
    working = _WORKING_COPIES + (_MORE_TO_DISTIL if distils else 0)
    return round(rows * docs * _FLOAT * (kept + working))


def _most(lengths: Ints, kept: Activations, config: TrainingConfig) -> tuple[int, int]:
    """The most that is held of a step's activations, in bytes, and the tokens encoded twice.

    ``lengths`` longest first. The micro-batches of `ContrastiveStep`: as many as fit in
    ``graph_tokens`` are kept together, the others come one by one, once those are gone; one is
    worked on all the time.
    """
    together = alone = working = padded = twice = 0
    for part in (cut_packed if kept.packed else cut)(lengths, config.batch_tokens):
        texts, width = lengths[part], int(lengths[part].max())
        tokens = int(texts.sum()) if kept.packed else len(texts) * width
        padded += tokens
        held = kept.kept(tokens, width)
        if padded <= config.graph_tokens:
            together += held
        else:
            alone = max(alone, held)
            twice += tokens
        working = max(working, kept.working(tokens))
    return max(together, alone) + working, twice


def _free(device: torch.device) -> int:
    """What a process can have of its device's memory beyond what it has already, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of an `accelerate launch`
    return int(psutil.virtual_memory().available) // beside
