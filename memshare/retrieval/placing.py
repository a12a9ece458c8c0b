"""Where the next generation goes: onto the GPU beside the one that serves, or to the CPU first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memshare.config import Config
from memshare.progress import log
from memshare.retrieval.encoder_folder import pick_device
from memshare.retrieval.gpu import (
    GpuPlace,
    Placement,
    free_gpu_bytes,
    generation_bytes,
    gpu_place,
    placement,
)
from memshare.retrieval.serving import Serving


@dataclass(frozen=True, slots=True)
class Choice:
    """``device`` of the encoder and ``place`` of the indexes (None: the CPU), for now.

    ``takes``: bytes of GPU memory once it is there.
    """

    placement: Placement
    device: str
    place: GpuPlace | None
    takes: int


class Placer:
    """Chooses for a loader, and knows what the generation that serves takes. One thread's."""

    def __init__(self, config: Config) -> None:
        """Nothing of the configuration is looked at before the first choice."""
        self._device = config.encoder.device
        self._retriever = config.retriever
        self._held = 0

    def first(self) -> Choice:
        """Where there is nothing to choose. Raises `EncoderError` and `GpuFault`."""
        return Choice("beside", self._device, self._place(), 0)

    def choose(self, number: int, files: Mapping[str, int]) -> Choice:
        """For generation ``number`` with such ``files`` (sizes by path), just before it is loaded.

        Raises `EncoderError` and `GpuFault`.
        """
        place = self._place()
        precision = self._retriever.index.precision
        takes = generation_bytes(
            files,
            encoder=pick_device(self._device).type == "cuda",
            index=place is not None,
            halved=precision == "gpu-float16",
        )
        if takes == 0:
            return self.first()
        budget = self._retriever.gpu_memory_gib
        limit = None if budget is None else int(budget * 2**30)
        free = free_gpu_bytes(self._gpu)
        chosen = placement(takes, self._held, limit, free)
        if chosen == "beside":
            return Choice(chosen, self._device, place, takes)
        then = "moves to the GPU after the swap" if chosen == "aside" else "stays on the CPU"
        log(
            f"generation {number} takes about {takes} bytes of GPU memory; {self._held} are in use "
            f"by the one that serves, {free} free, the budget is {limit}: it is loaded on the CPU "
            f"and {then}"
        )
        return Choice(chosen, "cpu", None, takes)

    def serves(self, choice: Choice) -> None:
        """``choice`` was swapped in, and what served before is gone."""
        self._held = choice.takes if choice.placement == "beside" else 0

    def move_up(self, serving: Serving, choice: Choice) -> None:
        """Bring a generation loaded aside onto the GPU; in the thread that searches.

        Where that fails it stays on the CPU, and the log says why.
        """
        free_gpu_bytes(self._gpu)  # what torch still holds of the old one is given back
        try:
            serving.move_up(self._device, self._place())
            self._held = choice.takes
        except RuntimeError as error:  # out of memory, by torch or by FAISS
            serving.move_up("cpu", None)
            log(f"generation {serving.number} stays on the CPU: {error}")

    def _place(self) -> GpuPlace | None:
        return gpu_place(self._retriever.gpu, self._retriever.index.precision, self._gpu)

    @property
    def _gpu(self) -> int:
        return pick_device(self._device).index or 0
