"""What autograd keeps of an encoder's forward pass: its activations, counted tensor by tensor.

Of a BERT layer, whose hidden width is H and whose feed-forward's is I, a token's activations are

* the inputs of the query, key and value projections: one tensor (H) that the three share in
  float32; under autocast each makes its own bf16 copy;
* queries, keys and values (3 H), what attention gives (H; texts that are packed on a CPU are put
  together again, so H once more), and a float a head (its softmax's sum);
* the inputs of both layer norms (2 H, float32 always), and two floats each of statistics;
* the inputs of the feed-forward (H), of its activation function (I) and of what follows it (I).

Where texts are padded each layer keeps attention's mask, a number a token of the longest text.
Dropout keeps what it drew: a byte a number on a GPU, the number itself on a CPU. With dropout of
attention weights a CPU keeps attention's matrices three times over, in float32. Adapters (`lora`)
with dropout keep what each of them drew and its own copy of its input. Other families keep about as
much where they have these layers; one that keeps attention's matrices keeps more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memshare.retrieval.packing import attention_dropout

_FLOAT = 4  # bytes


@dataclass(frozen=True, slots=True)
class Shape:
    """An encoder's layers: their number, widths and heads, and the weights of their matrices."""

    layers: int
    hidden: int
    inner: int
    heads: int
    matrices: int

    @classmethod
    def of(cls, tower: Any) -> Shape:
        """Of a transformers model; what its configuration does not say is a BERT-base's."""
        config = tower.config
        hidden = int(config.hidden_size)
        linear = (item for item in tower.modules() if isinstance(item, nn.Linear))
        return cls(
            layers=getattr(config, "num_hidden_layers", 12),
            hidden=hidden,
            inner=getattr(config, "intermediate_size", 4 * hidden),
            heads=getattr(config, "num_attention_heads", 12),
            matrices=sum(item.weight.numel() for item in linear),
        )


@dataclass(frozen=True, slots=True)
class Activations:
    """How much is kept of micro-batches, all in bytes.

    ``half``: under bf16 autocast; ``packed``: without padding; ``drops``: dropout of hidden states,
    ``drops_attention``: of attention weights; ``kind``: of device. ``dropped_inputs``: the
    widths of all inputs of adapters with dropout, added up.
    """

    shape: Shape
    half: bool
    packed: bool
    drops: bool
    drops_attention: bool
    kind: str
    dropped_inputs: int = 0

    def kept(self, tokens: int, width: int) -> int:
        """For the backward pass of ``tokens`` (padding included), ``width`` the longest text's.

        With bf16 that includes the weights, of which each micro-batch makes a copy.
        """
        shape, item = self.shape, 2 if self.half else _FLOAT
        everywhere = tokens * 2 * shape.hidden * _FLOAT  # embeddings' norm, and the last layer
        casts = shape.matrices * item if self.half else 0
        drawn = tokens * self.dropped_inputs * (_FLOAT if self.kind == "cpu" else 1)
        return shape.layers * tokens * self._token(width, item) + everywhere + casts + drawn

    def working(self, tokens: int) -> int:
        """While a layer of ``tokens`` computes: its states, feed-forward, and their gradients."""
        item = 2 if self.half else _FLOAT
        return tokens * (4 * self.shape.hidden * _FLOAT + 2 * self.shape.inner * item)

    def _token(self, width: int, item: int) -> int:
        shape = self.shape
        hidden = item * (3 if self.half or self.dropped_inputs else 1)  # inputs of the projections
        attention = 3 * item
        matrices = 0 if self.packed else item * width
        if self.drops_attention and self.kind == "cpu":
            attention, matrices = 3 * _FLOAT, 3 * _FLOAT * shape.heads * width
        hidden += attention + item + 2 * _FLOAT + item
        if self.packed and self.kind == "cpu":
            hidden += item
        if self.drops:
            hidden += 2 * (item if self.kind == "cpu" else 1)
        statistics = _FLOAT * (shape.heads + 4)
        return hidden * shape.hidden + 2 * item * shape.inner + matrices + statistics


def of(tower: Any, device: torch.device, *, half: bool, packed: bool, dropout: bool) -> Activations:
    """Of a transformers model; with ``dropout`` as its configuration has it."""
    config = tower.config
    return Activations(
        Shape.of(tower),
        half=half,
        packed=packed,
        drops=dropout and getattr(config, "hidden_dropout_prob", 0.1) > 0,
        drops_attention=dropout and attention_dropout(config) > 0,
        kind=device.type,
        dropped_inputs=_dropped_inputs(tower) if dropout else 0,
    )


def _dropped_inputs(tower: nn.Module) -> int:
    """The widths of all inputs of adapters with dropout, added up."""
    adapted: list[Any] = [item for item in tower.modules() if hasattr(item, "lora_dropout")]
    return sum(
        item.in_features
        for item in adapted
        if any(isinstance(part, nn.Dropout) for part in item.lora_dropout.values())  # 0: Identity
    )
