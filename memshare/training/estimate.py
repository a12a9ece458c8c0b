"""What a training run will need, told before it starts (``--dry-run``)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from memshare.config import TrainingConfig
from memshare.retrieval.encoder import Encoder
from memshare.training.batching import Batches
from memshare.training.gather import wants_fsdp
from memshare.training.precision import Autocast, described, in_bf16
from memshare.training.step import TILE_ROWS

_FLOAT = 4  # bytes
_LOGIT_COPIES = 6  # similarities, masked ones, softplus, and what their gradients keep
_HIDDEN_COPIES = 24  # per layer: q, k, v, attention output, projections, norms, dropouts
_INNER_COPIES = 5  # per layer: the feed-forward's input, activation and output


@dataclass(frozen=True, slots=True)
class Estimate:
    """Counts, and bytes on each process; the activations' part is a rule of thumb.

    ``frozen_bytes``: the vectors of all docs, where the memories' tower does not learn.
    ``precision``: in words.
    """

    parameters: int
    trainable: int
    examples: int
    steps: int
    tokens_per_step: int
    weights_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    logits_bytes: int
    frozen_bytes: int
    precision: str

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
                f"model: {self.parameters:,} parameters, {self.trainable:,} trainable",
                f"data: {self.examples:,} examples, {self.steps:,} steps of about "
                f"{self.tokens_per_step:,} tokens over all processes",
                f"memory per process: about {sum(parts.values()) // mib:,} MiB ({each})",
                f"precision: {self.precision}",
            )
        )


def estimate(
    encoder: Encoder, batches: Batches, steps: int, config: TrainingConfig, processes: int,
    autocast: Autocast = nullcontext,
) -> Estimate:  # fmt: skip
    """Estimate a run's needs; the first batch stands for all."""
    kind = encoder.device.type
    parameters = [(p.numel(), p.requires_grad) for p in encoder.model.parameters()]
    everything = sum(count for count, _ in parameters)
    trainable = sum(count for count, trained in parameters if trained)
    batch = batches.batch(0)
    # Gradients and two moments; or whole gradients, and a share of four (`sharding`).
    copies = 1 + 4 / processes if processes > 1 and wants_fsdp() else 3
    frozen = config.towers == "query-only"
    learns = batch.texts[batch.docs :] if frozen else batch.texts
    tokens = int(batches.table.lengths[learns].sum())
    shape = encoder.tower("query").config
    inner = getattr(shape, "intermediate_size", 4 * encoder.dim)
    layers = getattr(shape, "num_hidden_layers", 12)
    per_token = layers * (_HIDDEN_COPIES * encoder.dim + _INNER_COPIES * inner) * _FLOAT
    held = min(tokens // processes, config.graph_tokens + config.batch_tokens)
    rows = min(TILE_ROWS, -(-len(batch.rows) // processes))
    return Estimate(
        parameters=everything,
        trainable=trainable,
        examples=len(batches.items),
        steps=steps,
        tokens_per_step=tokens,
        weights_bytes=everything * _FLOAT,
        optimizer_bytes=round(trainable * _FLOAT * copies),
        activation_bytes=held * per_token,
        logits_bytes=rows * batch.docs * _FLOAT * _LOGIT_COPIES,
        frozen_bytes=len(batches.doc_rows) * encoder.dim * _FLOAT if frozen else 0,
        precision=described(in_bf16(autocast, kind), kind),
    )
