"""What the processes of a training run tell each other: vectors, gradients, and little else.

Plain collectives, no autograd through them and no DDP wrapper: the loss is a function of all
vectors of the step, so each process takes the gradient of its own queries' loss with respect to
*all* vectors, these gradients are summed over the processes, and each process back-propagates the
sum through the texts that it encoded itself. Parameter gradients are then summed, not averaged:
with the loss divided by the global batch, that is the one-process gradient.
"""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from memshare.arrays import Ints
from memshare.config import ConfigError
from memshare.training.allocator import keep_freed_memory
from memshare.training.precision import check_driver

if TYPE_CHECKING:
    from memshare.training.sharding import Divided

T = TypeVar("T")
_BUCKET_ELEMENTS = 16 * 2**20  # 64 MiB of float32 at a time


class DifferentData(RuntimeError):
    """The processes of one run see different data or settings."""


def launch(wanted: str = "auto") -> Accelerator:
    """Join the processes that ``accelerate launch`` started; on the CPU where there is no GPU.

    What is set for a process that trains or encodes, and then ends, is set here. ``wanted``:
    `encoder.device`; which one it is accelerate says, but a GPU that was asked for must be there.

    Raises `ConfigError` for that, and for what accelerate offers and this trainer does not do.
    """
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"encoder.device: {wanted!r}, but torch sees no CUDA device; use cpu")
    wants_fsdp()  # for what it refuses; `spread` asks whether
    _refuse_unused()
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() not in {"1", "true"}:
        check_driver()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.distributed_type.value not in {"NO", "MULTI_GPU", "MULTI_CPU", "FSDP"}:
        raise ConfigError(f"accelerate: {accelerator.distributed_type.value} is not supported")
    if accelerator.mixed_precision not in {"no", "bf16"}:
        raise ConfigError("accelerate: mixed_precision must be no or bf16")
    return accelerator


def leave(accelerator: Accelerator, world: World) -> None:
    """End what `launch` began, before Python ends.

    A thread of gloo's that still lets go of a tensor then aborts the process, after all its work is
    done. The group goes with its last reference, and a module that FSDP2 divided has some. Of NCCL,
    ending it is a collective of the node: a process that alone has failed would wait for others
    that wait for it, so it just ends, and the launcher the others.
    """
    gc.collect()
    if world.ended or "nccl" not in (world.backend or ""):  # FSDP has "cuda:nccl,cpu:gloo", too
        accelerator.end_training()


def wants_fsdp() -> bool:
    """Whether accelerate's configuration says FSDP; on CPUs, accelerate itself forgets it.

    Raises `ConfigError` for its version 1.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in {"1", "true"}:
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("accelerate: fsdp_config.fsdp_version must be 2")
    return True


def _refuse_unused() -> None:
    """Raise `ConfigError` for what accelerate's launcher was told and nothing here would heed."""
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in {"", "1"}:
        raise ConfigError(
            "accelerate: gradient accumulation is not used; set training.batch_size to the whole "
            "batch of a process: whatever exceeds training.graph_tokens is encoded twice"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() not in {"", "NO"}:
        raise ConfigError("accelerate: dynamo_backend is not used; set training.compile instead")


class World:
    """The process group: ``rank`` of ``size``. One process without a group is a world of 1."""

    def __init__(self, device: torch.device) -> None:
        """``device`` is where this process's tensors are; the group must be initialised first."""
        grouped = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if grouped else 1
        self.rank = dist.get_rank() if grouped else 0
        self.backend = dist.get_backend() if grouped else None
        self.ended = False
        self.device = device
        self.divided: Divided | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0

    def facts(self) -> dict[str, Any]:
        """What computes, for a report: this process's device, and the machines of all processes.

        To be called by all of them; the others than process 0 know of no machines.
        """
        gpu = self.device.type == "cuda"
        hosts = sorted(set(self.to_main(platform.node())))
        return {
            "device": torch.cuda.get_device_name(self.device) if gpu else self.device.type,
            "hosts": hosts,
            "nodes": len(hosts),
        }

    def gather_rows(self, local: Tensor, owners: Sequence[Ints]) -> Tensor:
        """Every process's rows in their places.

        ``local`` (n_rank, d) are this process's rows, ``owners[r]`` the places of process r's; they
        may have different numbers of rows. Returns (n, d), with no gradient history.
        """
        total = sum(len(places) for places in owners)
        out = local.new_empty(total, local.shape[1])
        if self.size == 1:
            out[torch.from_numpy(owners[0]).to(self.device)] = local
            return out
        most = max(len(places) for places in owners)
        padded = local.new_zeros(most, local.shape[1])
        padded[: len(local)] = local
        everything = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(everything, padded)
        for rows, places in zip(everything, owners, strict=True):
            out[torch.from_numpy(places).to(self.device)] = rows[: len(places)]
        return out

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum ``.grad`` over all processes, in buckets.

        A parameter that no process used keeps None, so that the optimizer leaves it alone. Where
        they are `divided`, each process has its share of the sums afterwards.
        """
        if self.size == 1:
            return
        if self.divided is not None:
            self.divided.sum_gradients()
            return
        params = list(parameters)
        used = torch.tensor([p.grad is not None for p in params], device=self.device).int()
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        bucket: list[Tensor] = []
        size = 0
        for param, flag in zip(params, used.tolist(), strict=True):
            if not flag:
                continue
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            bucket.append(param.grad)
            size += param.grad.numel()
            if size >= _BUCKET_ELEMENTS:
                self._sum_bucket(bucket)
                bucket, size = [], 0
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Make every process's tensors those of process 0, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def check_same(self, values: Mapping[str, object]) -> None:
        """Raise `DifferentData` on every process unless all give the same ``values`` by name."""
        if self.size == 1:
            return
        found: list[dict[str, str]] = [{}] * self.size
        dist.all_gather_object(found, {name: repr(value) for name, value in values.items()})
        odd = [rank for rank, other in enumerate(found) if other != found[0]]
        if odd:
            names = [
                n for n, told in found[0].items() if any(other.get(n) != told for other in found)
            ]
            raise DifferentData(
                f"processes {odd} see other {', '.join(names)} than process 0: give every process "
                "the same files and settings (a shared file system, or equal copies)"
            )

    def from_main(self, value: T) -> T:
        """What process 0 gives, on every process; a plain Python object."""
        held = [value]
        if self.size > 1:
            dist.broadcast_object_list(held, src=0)
        return held[0]

    def to_main(self, value: T) -> list[T]:
        """What every process gives, in order, on process 0; an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size if self.main else []
        dist.gather_object(value, values if self.main else None, dst=0)
        return [item for item in values if item is not None]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def end(self) -> None:
        """Wait for all processes: all of them have done what they were started for."""
        self.barrier()
        self.ended = True
