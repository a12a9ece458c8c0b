"""Token ids of many texts as one array, and the way of a batch onto its device.

Python's lists of ids would cost more than a GPU's work on them: arrays are cut, padded and sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memshare.arrays import Ints


@dataclass(frozen=True, eq=False, slots=True)
class Ragged:
    """Texts' token ids: ``ids`` (tokens,), one text after another, and ``lengths`` (texts,)."""

    ids: npt.NDArray[np.integer]
    lengths: Ints

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Ragged:
        """Of one sequence of ids a text."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return cls(np.fromiter(chain.from_iterable(rows), np.int64, lengths.sum()), lengths)

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.lengths)

    def take(self, which: Ints) -> Ragged:
        """Some of the texts, in that order."""
        ends = self.lengths.cumsum()
        at, _ = spans((ends - self.lengths)[which], ends[which])
        return Ragged(self.ids[at], self.lengths[which])

    def padded(self, filler: int) -> tuple[Ints, Ints]:
        """Ids (texts, longest), with ``filler`` on the right, and which of them are ids, as 1."""
        real = np.arange(self.lengths.max()) < self.lengths[:, None]
        ids = np.full(real.shape, filler, dtype=np.int64)
        ids[real] = self.ids
        return ids, real.astype(np.int64)


def spans(starts: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """All places of the spans (s,), one span's after the other's, and which one each is of."""
    counts = ends - starts
    which = np.repeat(np.arange(len(counts)), counts)
    return np.arange(len(which)) + np.repeat(starts - np.cumsum(counts) + counts, counts), which


def on_device(array: npt.NDArray[np.integer], device: torch.device) -> Tensor:
    """``array`` as a tensor; a GPU's copy is made beside what it is doing, and nobody waits."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
