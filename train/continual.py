"""The loop: whenever enough memories are new, mine -> train -> index -> publish, then wait again.

    python train/continual.py --config FILE

Every step is a program of its own (train/mine.py, train/contrastive.py under accelerate,
train/index.py); their logs are in ``logs/`` of the run folder. Earlier memories are mined again
beside the new ones, so that nothing is forgotten, and each round starts from the encoder that
serves. ``continual.json`` says which step is next: killed at any point and started again, the loop
goes on from there.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memshare.config import Config, ConfigError, add_config_arguments, load_config
from memshare.files import RunLocked, run_lock
from memshare.pool.errors import PoolError
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.pruning.policies import PruneError
from memshare.pruning.prune import check_caps, hold_caps
from memshare.retrieval.generation import current
from memshare.retrieval.manifest import folder_name
from memshare.training.child import (
    ChildFailed,
    Stopped,
    accelerate_command,
    run_child,
    stop_orphan,
)
from memshare.training.examples import ExamplesError, read_marker, round_dir
from memshare.training.outcome import read_result
from memshare.training.rounds import (
    Journal,
    JournalError,
    Round,
    count_new,
    erase_deleted,
    forget_stale_checkpoints,
    last_begun,
    last_mined,
    open_spans,
    training_dir,
)

HERE = Path(__file__).resolve().parent
EXPECTED = (ChildFailed, ExamplesError, JournalError, PoolError, PruneError, RunLocked)


def main(argv: Sequence[str] | None = None) -> int:
    """Run rounds until the configured number is done or a signal comes; returns the exit code."""
    parser = argparse.ArgumentParser(description="Continual training while the system serves.")
    add_config_arguments(parser)
    parser.add_argument("--once", action="store_true", help="stop after one round")
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
    except ConfigError as error:
        log(f"error: {error}")
        return 2
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    settings = [] if args.config is None else ["--config", str(args.config.resolve())]
    settings += [item for override in args.overrides for item in ("--set", override)]
    try:
        with run_lock(config.run.dir, "continual"), PoolStore.open(config.url) as store:
            Loop(config, store, settings, stop).run(once=args.once)
    except Stopped:
        log("stopped; the next start goes on from here")
    except EXPECTED as error:
        log(f"error: {error}")
        return 1
    return 0


class Loop:
    """One run folder's rounds."""

    def __init__(
        self, config: Config, store: PoolStore, settings: Sequence[str], stop: threading.Event
    ) -> None:
        """``settings``: command-line arguments that give the children the same configuration."""
        self.config, self.store, self.settings, self.stop = config, store, list(settings), stop
        self.path = config.run.dir / "continual.json"
        self.child = config.run.dir / "continual.child.json"
        self.pools, self.examples = config.served_pools, config.examples_dir

    def run(self, *, once: bool) -> None:
        """Rounds, one after the other."""
        for pool, settings in self.config.pools.items():
            self.store.create_pool(pool, settings.rubric, settings.threshold)
        check_caps(self.config)
        journal = Journal.load(self.path)
        if stop_orphan(self.child):
            log("the step that an earlier, killed loop had left running was stopped")
        when = self.config.continual
        while not self.stop.is_set():
            if journal.open_round is None:
                if when.rounds is not None and len(journal.rounds) >= when.rounds:
                    return
                hold_caps(self.store, self.config)
                erase_deleted(self.store, self.examples, self.pools)
                if not count_new(self.store, self.covered(journal), self.pools, when.min_new):
                    self.stop.wait(when.poll_seconds)
                    continue
                journal = self.begin(journal)
            now = journal.open_round
            assert now is not None
            log(f"round {now.number}: {now.step}")
            begun = time.monotonic()
            result, outcome = getattr(self, now.step)(now)
            result["wall_seconds"] = time.monotonic() - begun
            journal = journal.advance(result, outcome=outcome)
            journal.save(self.path)
            if outcome is not None:
                log(f"round {now.number}: {outcome}")
                if once:
                    return

    def covered(self, journal: Journal) -> dict[str, int]:
        """Up to where each pool is mined already, by this loop or by hand."""
        mined, begun = last_mined(self.examples)[1], journal.positions
        return {pool: max(begun.get(pool, 0), mined.get(pool, 0)) for pool in self.pools}

    def begin(self, journal: Journal) -> Journal:
        """Put a new round on record."""
        number = max([item.number for item in journal.rounds] + [last_begun(self.examples)]) + 1
        spans = open_spans(self.store, self.covered(journal), self.pools)
        serving = current(self.config.generations_dir, self.config.retriever.name)
        encoder = self.config.encoder.model
        if serving is not None:
            home = self.config.generations_dir / self.config.retriever.name
            encoder = str(home / folder_name(serving) / "encoder")
        journal = journal.begin(number, spans, encoder)
        journal.save(self.path)
        return journal

    def mine(self, now: Round) -> tuple[dict[str, Any], str | None]:
        """Step 5: examples from the new memories, and from a sample of the earlier ones."""
        arguments = ["--round", str(now.number)]
        for pool, span in now.spans.items():
            arguments += ["--since-seq", f"{pool}={span.since}"]
            arguments += ["--until-seq", f"{pool}={span.until}"]
        self.launch(now, [sys.executable, f"{HERE}/mine.py", *self.settings, *arguments])
        marker = read_marker(round_dir(self.examples, now.number))
        return marker, None if marker["examples"] else "empty"

    def train(self, now: Round) -> tuple[dict[str, Any], str | None]:
        """Step 6: the encoder learns from them."""
        output = training_dir(self.config.run.dir, now.number)
        result = read_result(output)
        if result is None or result["status"] not in ("trained", "empty"):
            erase_deleted(self.store, self.examples, self.pools)
            examples = round_dir(self.examples, now.number)
            forget_stale_checkpoints(output, examples)
            arguments = [
                *self.settings, "--examples", str(examples), "--encoder", now.encoder,
                "--output", str(output), "--round", str(now.number),
            ]  # fmt: skip
            try:
                start = accelerate_command(self.config.continual)
                self.launch(now, [*start, f"{HERE}/contrastive.py", *arguments])
            except ChildFailed:  # accelerate makes every exit code but 0 a 1: the result says why
                if (read_result(output) or {}).get("status") != "empty":
                    raise
            result = read_result(output)
        if result is None:
            raise ChildFailed(f"{output}: training ended without a result; see the run's logs/")
        return result, "empty" if result["status"] == "empty" else None

    def index(self, now: Round) -> tuple[dict[str, Any], str | None]:
        """Step 6, second half: build, judge, publish."""
        output = training_dir(self.config.run.dir, now.number)
        report = output / "index.json"
        arguments = [f"--round={now.number}", f"--encoder={output}/encoder", f"--result={report}"]
        if not report.exists():
            start = accelerate_command(self.config.continual, always=False)
            self.launch(now, [*start, f"{HERE}/index.py", *self.settings, *arguments])
        result: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return result, str(result["outcome"])

    def launch(self, now: Round, command: Sequence[str]) -> None:
        """Run one child with its log."""
        log_file = self.config.run.dir / "logs" / f"round-{now.number:06d}-{now.step}.log"
        run_child(command, log_file, self.child, self.stop, Path.cwd())


if __name__ == "__main__":
    sys.exit(main())
