"""The loader thread: it watches CURRENT and brings the next generation into service.

Loading, verifying, warming and catching up happen here, with the next generation's own encoder and
FAISS resources, while the worker goes on answering. The last changes are taken in while the feeder
pauses, so that nothing that was searchable before the swap is missing after it.

A generation with the memory tower that serves already (``training.towers: query-only``) brings a
query tower alone: the rows stay, and none of the new index is read, so that the swap costs nothing
in their number.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from memshare.config import Config
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.retrieval.errors import EncoderError
from memshare.retrieval.feeder import MAX_BACKOFF, Feeder, report
from memshare.retrieval.generation import (
    Generation,
    Stamp,
    current,
    current_stamp,
    load,
    load_current,
)
from memshare.retrieval.gpu import GpuFault
from memshare.retrieval.index import IndexFault
from memshare.retrieval.manifest import (
    DamagedGeneration,
    GenerationError,
    NoGeneration,
    folder_name,
    read_manifest,
)
from memshare.retrieval.placing import Choice, Placer
from memshare.retrieval.serving import MAX_DELTA, PAGE, Serving, frozen_serving, run_here
from memshare.retrieval.worker import SearcherClosed, Worker

_CLOSE = 16  # changes that may be left for when the feeder pauses, and every write waits
_STEP = 16  # memories encoded before a rest
_REST = 3.0  # times as long as the step before it
_ROUNDS = 10  # of catching up before that, should writes come faster than they are encoded
_SETUP_ERRORS = (EncoderError, IndexFault, GpuFault)  # at the first load: a wrong configuration


@dataclass(frozen=True, slots=True)
class SwapRecord:
    """One swap: seconds to load, verify, catch up (rests included) and warm; and to swap.

    No search ran in ``swap_seconds``.
    """

    generation: int
    load_seconds: float
    swap_seconds: float


class Loader:
    """Swaps in what CURRENT names, forwards or back.

    ``fatal``: why nothing can ever be served (a wrong configuration). ``error``: why CURRENT does
    not serve, None while it does.
    """

    def __init__(
        self,
        store: PoolStore,
        config: Config,
        worker: Worker,
        feeder: Feeder,
        announce: Callable[[], None],
    ) -> None:
        """``announce`` is called after every swap and when ``fatal`` is set."""
        self.error: str | None = None
        self.fatal: Exception | None = None
        self.swaps: tuple[SwapRecord, ...] = ()
        self._store = store
        self._config = config
        self._worker = worker
        self._feeder = feeder
        self._announce = announce
        self._home = config.retriever_dir
        self._placer = Placer(config)
        self._seen: Stamp = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="searcher-loader", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, giving up a load under way; worker and feeder must still run."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _loop(self) -> None:
        poll, wait = self._config.retriever.poll_seconds, 0.0
        while not self._stop.wait(wait):
            try:
                self._step()
                wait = poll
            except SearcherClosed:
                return
            except Exception as error:  # retried, but for a configuration that can't work
                self.error = report("loading", error, self.error)
                if self._worker.serving is None and isinstance(error, _SETUP_ERRORS):
                    self.fatal = error
                    self._worker.fail_all(error)
                    self._announce()
                    return
                wait = min(max(poll, 2 * wait), MAX_BACKOFF)

    def _step(self) -> None:
        """Load what CURRENT names, if it is not what serves, and swap it in.

        What serves, too, if the pools have another history than it was read from.
        """
        stamp = current_stamp(self._home)
        # Numbers only: a reference to the old `Serving` would keep its memory through the swap.
        number = None if self._worker.serving is None else self._worker.serving.number
        astray = self._feeder.astray
        if number is not None and stamp == self._seen and not astray:
            return
        began = time.perf_counter()
        if number is None or astray:
            following, choice = self._first()
        else:
            try:
                if current(self._home) in (number, None):
                    self._seen, self.error = stamp, None
                    return
                if self._swap_query_tower(began):
                    self._seen = stamp
                    return
                following, choice = self._load()
            except (DamagedGeneration, NoGeneration) as error:
                # Refused until CURRENT is written again: reading it again would not mend it.
                self._seen = stamp
                self.error = report(f"generation {number} serves on", error, self.error)
                return
        try:
            if self._swap_in(following, choice, began):
                self._seen = stamp
                return
        except BaseException:
            following.close()
            raise
        following.close()

    def _swap_query_tower(self, began: float) -> bool:
        """Swap in CURRENT's query tower over the rows that serve; False if they are not its own.

        Nor if the rows newer than the index have become many: the next index has them in it.
        """
        serving = self._worker.serving
        assert serving is not None  # only this thread swaps
        number = current(self._home)
        if serving.generation is None or number is None:
            return False
        theirs = read_manifest(self._home / folder_name(number))
        mine = serving.generation.manifest
        if theirs.memory_fingerprint != mine.memory_fingerprint or theirs.index != mine.index:
            return False
        if serving.delta_rows > MAX_DELTA:
            return False
        device = str(serving.encoder.device)
        generation = load(self._home, number, device, rows=False)
        try:
            generation.encoder.compute_as(self._config.encoder)
            generation.encoder.encode_queries(["warm-up"])
            following = Serving(number, generation.encoder, serving.shards, generation)
            del serving  # it would outlive the swap
            with self._feeder.paused():
                self._swap(following, began)
        except BaseException:
            generation.close()
            raise
        return True

    def _first(self) -> tuple[Serving, Choice]:
        """What to begin with: CURRENT, else an intact older one, else the configured encoder."""
        choice = self._placer.first()
        if current_stamp(self._home) is None:
            return frozen_serving(self._config), choice
        try:
            return self._load()
        except GenerationError as error:
            self.error = report("CURRENT can't serve", error, self.error)
        try:
            older = load_current(self._home, choice.device, choice.place)
        except DamagedGeneration as error:
            log(f"the configured encoder serves: {error}")
            older = None
        return (frozen_serving(self._config) if older is None else self._serving_of(older)), choice

    def _load(self) -> tuple[Serving, Choice]:
        """CURRENT, and where it was put."""
        number = current(self._home)
        if number is None:
            raise NoGeneration(f"{self._home.name}: nothing was published yet")
        manifest = read_manifest(self._home / folder_name(number))
        files = {name: blob.size for name, blob in manifest.files.items()}
        choice = self._placer.choose(number, files)
        generation = load(self._home, None, choice.device, choice.place)
        return self._serving_of(generation), choice

    def _serving_of(self, generation: Generation) -> Serving:
        generation.encoder.compute_as(self._config.encoder)
        try:
            before = {} if self._feeder.astray else self._worker.snapshot()
            return Serving.of(generation, self._store, self._config.served_pools, before)
        except BaseException:
            generation.close()
            raise

    def _swap_in(self, following: Serving, choice: Choice, began: float) -> bool:
        """Catch ``following`` up and serve it; False if there is no need to any more."""
        before = math.inf
        for _ in range(_ROUNDS):
            gaps = following.behind(self._store)
            behind = sum(gaps.values())
            if behind <= _CLOSE:
                break
            # Rests as long as it gains on the writers; it would never be done otherwise.
            rests = self._worker.serving is not None and behind < before / 2
            run, step = (self._then_rest, _STEP) if rests else (run_here, PAGE)
            following.catch_up(self._store, gaps, self._stop.is_set, run, step)
            before = behind
        following.settle(choice.place)
        with self._feeder.paused():
            gaps = self._gaps(following)
            following.catch_up(self._store, gaps, self._stop.is_set)
            if self._stop.is_set() or self._undone():
                return False
            self._swap(following, began)
        self._placer.serves(choice)
        if choice.placement == "aside":
            self._worker.run(lambda: self._placer.move_up(following, choice))
        return True

    def _undone(self) -> bool:
        """Whether CURRENT was moved back to what serves meanwhile: then nothing else may."""
        serving = self._worker.serving
        if serving is None or self._feeder.astray:
            return False
        return current(self._home) == serving.number

    def _then_rest(self, step: Callable[[], None]) -> None:
        """Run ``step``, then leave the processor to searches for `_REST` times as long.

        Catching up is nearly all of a swap's work, and no one waits for it. Running at a lower
        priority instead would keep searches waiting whenever this thread is put off while it holds
        the interpreter's lock.
        """
        began = time.perf_counter()
        step()
        self._stop.wait(_REST * (time.perf_counter() - began))

    def _swap(self, following: Serving, began: float) -> None:
        """Serve ``following`` from the next batch on; the feeder is paused."""
        number = None if self._worker.serving is None else self._worker.serving.number
        load_seconds = time.perf_counter() - began
        swap_seconds = self._worker.swap(following)
        self._feeder.astray = False
        self.swaps = (*self.swaps, SwapRecord(following.number, load_seconds, swap_seconds))
        if number is not None:
            self.error = None
            log(f"{self._home.name}: generation {number} -> {following.number}")
        self._announce()
        self._feeder.wake()

    def _gaps(self, following: Serving) -> dict[str, int]:
        """What ``following`` lacks of what serves (before the first: of the pools)."""
        old = self._worker.serving
        if old is None:
            return following.behind(self._store)
        return {
            pool: shard.position - following.shards[pool].position
            for pool, shard in old.shards.items()
        }
