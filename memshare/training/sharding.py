"""The towers that learn, divided over the processes by FSDP2 (``fully_shard``).

Asked for by an accelerate configuration (``distributed_type: FSDP``, version 2). Between two
updates every process holds whole weights, so that evaluation, checkpoints and uneven numbers of
micro-batches need no collectives; gradients add up locally. Then they are reduce-scattered, summed,
each process updates its share with its share of AdamW's state, and the weights are gathered again.
So a weight costs 8 + 16 / W bytes on each of W processes instead of 16: weights and gradients
whole, and the shares of weights, gradients and two moments. One that an adapter leaves as it is
costs 4 + 4 / W instead of 4, since its tower is divided as a whole.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from memshare.retrieval.encoder import SIDES, Encoder
from memshare.retrieval.ragged import Ragged
from memshare.training.checkpoint import put_weights, trainable
from memshare.training.gather import World, wants_fsdp


def spread(encoder: Encoder, world: World) -> None:
    """Process 0's weights for all, and divided over them where accelerate's configuration says so.

    Comes before the optimizer, which then keeps the state of this process's share alone.
    """
    world.broadcast(p.data for p in encoder.model.parameters())
    if world.size > 1 and wants_fsdp():
        world.divided = Divided(encoder, world)


class Divided:
    """An encoder whose learning towers are shards, or whole while they compute."""

    def __init__(self, encoder: Encoder, world: World) -> None:
        """Divide them; they are shards until `follow`."""
        self._encoder = encoder
        # A sharded module saves shards: what is exported is this copy, with the weights put in.
        self._plain: Any = copy.deepcopy(encoder.model).cpu() if world.main else None
        mesh = init_device_mesh(world.device.type, (world.size,))
        sides = SIDES if encoder.two_towers else SIDES[:1]
        self._towers = {
            side: encoder.tower(side)
            for side in sides
            if any(p.requires_grad for p in encoder.tower(side).parameters())
        }
        for tower in self._towers.values():
            stacks = [item for item in tower.modules() if isinstance(item, nn.ModuleList)]
            for layers in reversed(stacks):  # the inner ones first: a layer of T5's is a stack, too
                for layer in layers:
                    fully_shard(layer, mesh=mesh, reshard_after_forward=False)
            fully_shard(tower, mesh=mesh, reshard_after_forward=False)
            tower.set_requires_gradient_sync(False)
            tower.set_reshard_after_backward(False)
        for part in self._parts():  # a plain sum, which gloo has as well
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Gather the weights now and after each of its steps."""
        self._gather()
        optimizer.register_step_post_hook(lambda *_: self._gather())

    def sum_gradients(self) -> None:
        """Each process's share of the summed gradients, on the shards; the weights are shards now.

        FSDP reduces in a backward pass: one text's, whose gradient is zero.
        """
        row = Ragged.of(self._encoder.tokenize_to_ids(["x"]))
        for side, tower in self._towers.items():
            tower.set_requires_gradient_sync(True)
            tower.set_reshard_after_backward(True)
            vectors = self._encoder.embed(self._encoder.collate(row), side)
            torch.autograd.backward(vectors, torch.zeros_like(vectors))
            tower.set_requires_gradient_sync(False)
            tower.set_reshard_after_backward(False)

    def give_back(self) -> None:
        """On the main process: make the encoder's model a plain one, with the weights of now."""
        weights = trainable(self._encoder.model)
        self._encoder.model = self._plain
        put_weights(self._plain, weights)

    def _parts(self) -> list[FSDPModule]:
        modules = [part for tower in self._towers.values() for part in tower.modules()]
        return [part for part in modules if isinstance(part, FSDPModule)]

    def _gather(self) -> None:
        for part in self._parts():
            part.unshard()
