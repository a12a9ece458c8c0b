"""The loop: whenever enough memories are new, mine -> train -> index -> publish, then wait again.

    python train/continual.py --config FILE

Every step is a program of its own (train/mine.py, train/contrastive.py under accelerate,
train/index.py); their logs are in ``logs/`` of the run folder. Earlier memories are mined again
beside the new ones, so that nothing is forgotten, and each round starts from the encoder that
serves. With ``mining.iterations`` 2 a round mines and trains twice, the second time with candidates
from the encoder that the first has trained. ``continual.json`` says which step is next: killed at
any point and started again, the loop goes on from there. While the pool's database is away, it
waits.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from memshare.config import Config, ConfigError, add_config_arguments, load_config
from memshare.files import DiskFull, RunLocked, full_disk_told, run_lock
from memshare.pool.errors import PoolError, PoolUnavailable
from memshare.pool.patience import when_available
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.pruning.prune import PruneError, check_caps, hold_caps
from memshare.retrieval.errors import EncoderError
from memshare.retrieval.manifest import GenerationError
from memshare.stopping import on_stop
from memshare.training import outcome as outcomes
from memshare.training.child import ChildFailed, Stopped, check_launch
from memshare.training.erasing import erase_deleted
from memshare.training.journal import Journal, JournalError
from memshare.training.labels import check_labels
from memshare.training.leftovers import delete_leftovers
from memshare.training.rounds import (
    count_new,
    covered,
    next_round,
    with_encoder,
    without_unserved,
)
from memshare.training.shard import ExamplesError
from memshare.training.steps import Steps

PROGRAMS = Path(__file__).resolve().parent
EXPECTED = (
    ChildFailed, DiskFull, EncoderError, ExamplesError, GenerationError, JournalError, PoolError,
    PruneError, RunLocked,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run rounds until the configured number is done or a signal comes; returns the exit code."""
    parser = argparse.ArgumentParser(description="Continual training while the system serves.")
    add_config_arguments(parser)
    parser.add_argument("--once", action="store_true", help="stop after one round")
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        check_launch(config.continual)
        check_labels(config)
    except ConfigError as error:
        return outcomes.tell(error)
    stop = threading.Event()
    on_stop(lambda name: stop.set())
    settings = [] if args.config is None else ["--config", str(args.config.resolve())]
    settings += [item for override in args.overrides for item in ("--set", override)]
    try:
        with full_disk_told(), run_lock(config.run.dir, "continual"):
            check_caps(config)
            with when_available(stop, PoolStore.open, config.url) as store:
                when_available(stop, make_pools, config, store)
                loop(config, store, Steps(config, store, PROGRAMS, settings, stop), stop, args.once)
    except Stopped:
        log("stopped; the next start goes on from here")
    except PoolUnavailable:
        log("stopped while the database was away; the next start goes on from here")
    except EXPECTED as error:
        return outcomes.tell(error)
    return 0


def loop(config: Config, store: PoolStore, steps: Steps, stop: threading.Event, once: bool) -> None:
    """Rounds, one after the other."""
    if steps.stop_orphan():
        log("the step that an earlier, killed loop had left running was stopped")
    path = config.run.dir / "continual.json"
    journal = Journal.load(path)
    delete_leftovers(config, journal)  # in case a loop was killed before it did
    waiting = False
    while not stop.is_set():
        # 1. Between two rounds: wait until enough memories are new, then put a round on record.
        if journal.open_round is None:
            if (
                config.continual.rounds is not None
                and len(journal.rounds) >= config.continual.rounds
            ):
                return
            if not when_available(stop, due, config, store, journal):
                if not waiting:  # or whoever looks for learning finds an empty log
                    need = config.continual.min_new
                    log(f"waiting until {need} memories are new (continual.min_new)")
                waiting = True
                stop.wait(config.continual.poll_seconds)
                continue
            waiting = False
            opened = when_available(stop, next_round, config, store, journal)
            steps.rehearse(opened.encoder)  # or hours of mining might be for nothing
            journal = journal.begin(opened)
            journal.save(path)

        # 2. Within one: mine, train, index, as often as it has iterations, each step to its end.
        journal = without_unserved(config, with_encoder(config, journal))
        now = journal.open_round
        assert now is not None
        if now.step == "mine":  # in a round that an earlier loop has put on record
            steps.rehearse(now.encoder)
        log(f"round {now.number}: {now.name}")
        begun = time.monotonic()
        step = {"mine": steps.mine, "train": steps.train, "index": steps.index}[now.step]
        result, outcome = when_available(stop, step, now)
        result["wall_seconds"] = time.monotonic() - begun
        journal = journal.advance(result, outcome=outcome)
        journal.save(path)
        if outcome is not None:
            log(f"round {now.number}: {outcome}")
            if outcome == "empty":
                when_available(stop, steps.refresh, now)
            delete_leftovers(config, journal)
            if once:
                return


def make_pools(config: Config, store: PoolStore) -> None:
    """The configured pools, where they are not there yet."""
    for pool, settings in config.pools.items():
        store.create_pool(pool, settings.rubric, settings.threshold)


def due(config: Config, store: PoolStore, journal: Journal) -> bool:
    """Whether enough memories are new; pools that outgrew their caps are pruned first.

    What was deleted leaves the examples on the way, and the files of the database.
    """
    hold_caps(store, config)
    store.scrub()
    erase_deleted(store, config.examples_dir, config.served_pools)
    need = config.continual.min_new
    return count_new(store, covered(config, journal), config.served_pools, need) >= need


if __name__ == "__main__":
    sys.exit(main())
