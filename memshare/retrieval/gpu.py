"""The GPU's part in searching: FAISS resources of a generation, and whether two generations fit.

A swap needs room for two generations, beside whatever else lives on the GPU (vLLM, above all, which
takes its share at its start and never gives any back). Where two don't fit, the next one serves
from the CPU until the old one is gone, and then moves up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch  # before FAISS: both bring OpenMP and CUDA, and torch's must load first

# isort: split
import faiss

Gpu = Literal["auto", "on", "off"]
Placement = Literal["beside", "aside", "cpu"]

_TEMP_BYTES = 256 * 2**20  # FAISS's scratch space; by itself it would take 1.5 GiB
_CONTEXT_BYTES = 256 * 2**20  # activations of an encoder's batch, library handles


class GpuFault(ValueError):
    """The configuration asks for a GPU that isn't there."""


class GpuPlace:
    """Where one generation's GPU copies live: one scratch space for all its pools' indexes.

    FAISS's resources are not to be shared between threads, so each generation has its own.
    """

    def __init__(self, float16: bool = False, device: int = 0) -> None:
        """Use `gpu_place`. ``float16``: flat indexes are copied in half precision."""
        self.float16 = float16
        self._device = device
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(_TEMP_BYTES)

    def copy(self, index: Any) -> Any:
        """A copy on the GPU of a FAISS index that has a form there (not HNSW)."""
        options = faiss.GpuClonerOptions()
        options.useFloat16 = self.float16
        return faiss.index_cpu_to_gpu(self._resources, self._device, index, options)


def gpu_place(mode: Gpu, precision: str = "float32") -> GpuPlace | None:
    """A place for one generation; None for ``off``, and for ``auto`` where FAISS sees no GPU.

    ``precision`` is `IndexConfig`'s. Raises `GpuFault` for ``on`` without a GPU.
    """
    available = mode != "off" and faiss.get_num_gpus() > 0
    if mode == "on" and not available:
        raise GpuFault(
            "retriever.gpu is on, but FAISS sees no GPU: install the extra `gpu` "
            "(faiss-gpu-cu12) on a machine with CUDA, or set it to auto"
        )
    return GpuPlace(precision != "float32") if available else None


def generation_bytes(
    files: Mapping[str, int], *, encoder: bool, index: bool, halved: bool = False
) -> int:
    """GPU memory that a generation takes, estimated from its ``files``, sizes by relative path.

    ``encoder``, ``index``: whether these go to the GPU; ``halved``: float32 rows are copied there
    in half precision.
    """
    weights = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    rows = files.get("index.faiss", 0) // (2 if halved else 1)
    return (weights + _CONTEXT_BYTES if encoder else 0) + (rows + _TEMP_BYTES if index else 0)


def placement(following: int, serving: int, budget: int | None, free: int | None) -> Placement:
    """How the next generation comes onto the GPU; all in bytes.

    ``following`` is what it takes, ``serving`` what the present one holds, ``budget`` what both may
    take together (None: no limit), ``free`` what the GPU has left now (None: unknown).
    ``beside``: both fit. ``aside``: it fits once the present one is gone, so it is loaded on the
    CPU, swapped in, and moved up. ``cpu``: it never fits.
    """
    limits = (budget, None if free is None else free + serving)
    room = [limit for limit in limits if limit is not None]
    if following == 0 or all(following + serving <= limit for limit in room):
        return "beside"
    return "aside" if all(following <= limit for limit in room) else "cpu"


def free_gpu_bytes() -> int | None:
    """What the current GPU has left, None without one; what torch holds unused is given back."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])
