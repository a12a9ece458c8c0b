"""What a training step computes, and the share of a device's peak that it reaches.

Model FLOPs after PaLM (Chowdhery et al. 2022, appendix B), embeddings left out: a token costs
``2 N`` in the forward pass and twice that in the backward pass, N being the weights of the matrix
products, and a sequence of T tokens another ``12 L d T`` a token for attention (L layers of width
d; both passes, all pairs of tokens). A weight that is not trained saves the product that would be
its gradient. Dense layers after the pooling, which see a text and not a token, are left out, too.
Padding and the second forward pass of gradient caching do not count: what counts is what the model
needs, not what the hardware did.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memshare.arrays import Ints
from memshare.retrieval import dense

# Dense bf16 tensor-core FLOP/s by words of `torch.cuda.get_device_name`, from the maker's data
# sheets (figures with sparsity halved); a name's first match counts.
_BF16_PEAKS = (
    ("B200", 2250e12), ("GH200", 989e12), ("H200 NVL", 835e12), ("H200", 989e12),
    ("H100 NVL", 835e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("A100", 312e12),
    ("L40S", 362e12), ("L4", 121e12), ("RTX 4090", 165e12),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelCost:
    """A text encoder's weights in matrix products, how many of them learn, layers and width."""

    weights: int
    trainable: int
    layers: int
    width: int

    @classmethod
    def of(cls, model: Any) -> ModelCost:
        """That of a transformers model, with or without adapters."""
        out = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        out |= {id(p) for layer in dense.of(model) for p in layer.parameters()}
        matrices = [p for p in model.parameters() if p.ndim > 1 and id(p) not in out]
        return cls(
            weights=sum(p.numel() for p in matrices),
            trainable=sum(p.numel() for p in matrices if p.requires_grad),
            layers=int(model.config.num_hidden_layers),
            width=int(model.config.hidden_size),
        )

    def step(self, lengths: Ints) -> float:
        """FLOPs of one forward and backward pass over texts of so many tokens (n,)."""
        tokens, pairs = float(lengths.sum()), float((lengths.astype(float) ** 2).sum())
        products = 4 * self.weights + 2 * self.trainable
        return products * tokens + 12 * self.layers * self.width * pairs

    def forward(self, lengths: Ints) -> float:
        """FLOPs of encoding texts of so many tokens (n,), without gradients."""
        tokens, pairs = float(lengths.sum()), float((lengths.astype(float) ** 2).sum())
        return 2 * self.weights * tokens + 4 * self.layers * self.width * pairs


def bf16_peak(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name; None where it is not known, and on a CPU."""
    if device.type != "cuda":
        return None
    return _peak(torch.cuda.get_device_name(device))


def _peak(name: str) -> float | None:
    known = (peak for part, peak in _BF16_PEAKS if re.search(rf"\b{part}\b", name))
    return next(known, None)
