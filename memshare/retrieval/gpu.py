"""The GPU's part in searching: FAISS resources of a generation, and whether two generations fit.

A swap needs room for two generations, beside whatever else lives on the GPU (vLLM, above all, which
takes its share at its start and never gives any back). Where two don't fit, the next one serves
from the CPU until the old one is gone, and then moves up.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import torch  # before FAISS: both bring OpenMP and CUDA, and torch's must load first

# isort: split
import faiss

from memshare.progress import log

Gpu = Literal["auto", "on", "off"]
Placement = Literal["beside", "aside", "cpu"]

_TEMP_BYTES = 256 * 2**20  # FAISS's scratch space; by itself it would take 1.5 GiB
_CONTEXT_BYTES = 256 * 2**20  # activations of an encoder's batch, library handles
_PROBE = """
import sys, numpy, torch, faiss
rows = numpy.eye(8, dtype="float32")
place = faiss.StandardGpuResources()
place.setTempMemory(2**20)  # by itself 1.5 GiB, which a busy card may not have
index = faiss.index_cpu_to_gpu(place, int(sys.argv[1]), faiss.IndexFlatIP(8))
index.add(rows)
index.search(rows, 1)
"""


class GpuFault(ValueError):
    """The configuration asks for a GPU that isn't there, or that FAISS can't use."""


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


def gpu_place(mode: Gpu, precision: str = "float32", device: int = 0) -> GpuPlace | None:
    """A place for one generation; None for ``off``, and for ``auto`` where FAISS has no GPU.

    ``precision`` is `IndexConfig`'s, ``device`` the GPU's number. Raises `GpuFault` for ``on``
    without a GPU that FAISS can use.
    """
    if mode == "off":
        return None
    fault = _fault(device)
    if fault is None:
        return GpuPlace(precision != "float32", device)
    if mode == "on":
        raise GpuFault(
            f"retriever.gpu is on, but {fault}: install the extra `gpu` (faiss-gpu) on a machine "
            "with CUDA, or set it to auto"
        )
    return None


@cache
def _fault(device: int) -> str | None:
    """Why FAISS can't use a GPU, None where it can; logged where there is one.

    A process of its own tries: where FAISS was built without the card's code, it does not raise,
    it ends the process.
    """
    if device >= faiss.get_num_gpus():
        return "FAISS sees no GPU" if device == 0 else f"FAISS sees no GPU {device}"
    command = [sys.executable, "-c", _PROBE, str(device)]
    tried = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if tried.returncode == 0:
        return None
    last = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
    fault = f"FAISS can't use GPU {device} ({last})"
    log(f"{fault}; indexes stay on the CPU, unless retriever.gpu demands it")
    return fault


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


def free_gpu_bytes(number: int = 0) -> int | None:
    """What a GPU has left, None without one; what torch holds unused is given back."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(number)[0])
