"""Launched by test_moments.py in several processes that divide AdamW's state by FSDP.

moments_worker.py ENCODER OUTPUT

Each trains two steps, saves a checkpoint, and reads it back into an optimizer that knows nothing,
and writes how much of whole tensors it held at once meanwhile (``held-RANK.json``, in bytes).
"""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from memshare.config import TrainingConfig
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.ragged import Ragged
from memshare.training import checkpoint
from memshare.training.checkpoint import TrainState
from memshare.training.gather import World, launch, leave
from memshare.training.optimizer import make_optimizer, update, whole
from memshare.training.sharding import spread


class Held:
    """The bytes of the tensors that were counted and are still there, and their largest sum."""

    def __init__(self) -> None:
        self.now = self.most = self.largest = 0

    def count(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.most, self.largest = max(self.most, self.now), max(self.largest, size)
        weakref.finalize(tensor, self._gone, size)
        return tensor

    def _gone(self, size: int) -> None:
        self.now -= size


def main(encoder_folder: Path, output: Path) -> None:
    accelerator = launch()
    world = World(accelerator.device)
    encoder = Encoder.from_folder(encoder_folder, device="cpu")
    spread(encoder, world)
    assert world.divided is not None
    # Both while the model's parameters are shards.
    optimizer, other = (make_optimizer(encoder.model, TrainingConfig()) for _ in range(2))
    world.divided.follow(optimizer)
    for text in ("a cup of tea", "rain and iron"):
        inputs = encoder.collate(Ragged.of(encoder.tokenize_to_ids([text])))
        encoder.embed(inputs, "query")[:, 0].sum().backward()  # type: ignore[no-untyped-call]
        world.sum_gradients(encoder.model.parameters())
        update(optimizer, 1e-3, 1.0)

    gathered, read = Held(), Held()
    full_tensor, get = DTensor.full_tensor, checkpoint.Stored.__getitem__

    def counted_full(self: DTensor, **options: Any) -> Tensor:
        return gathered.count(full_tensor(self, **options))

    def counted_get(self: checkpoint.Stored, key: str) -> Tensor:
        return read.count(get(self, key))

    DTensor.full_tensor = counted_full  # type: ignore[method-assign]
    state = TrainState(2, {}, 0, "none")
    folder = checkpoint.save(output, encoder.model, optimizer, state, writes=world.main)
    DTensor.full_tensor = full_tensor  # type: ignore[method-assign]
    world.barrier()

    checkpoint.Stored.__getitem__ = counted_get  # type: ignore[method-assign]
    checkpoint.restore(folder, encoder.model, other)
    for param, entries in optimizer.state.items():
        for name, value in entries.items():
            assert torch.equal(whole(other.state[param][name]), whole(value)), name
    held = {"gathered": vars(gathered), "read": vars(read)}
    (output / f"held-{world.rank}.json").write_text(json.dumps(held))
    own = {
        f"{place}/{name}": value.to_local() if isinstance(value, DTensor) else value
        for place, entries in enumerate(optimizer.state.values())
        for name, value in entries.items()
    }
    save_file({key: value.contiguous() for key, value in own.items()}, output / f"own-{world.rank}")
    leave(accelerator, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
