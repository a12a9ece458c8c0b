"""The steps of a round, each a program of its own, and what became of them.

Whatever a step finds done already it does not do again: a loop that was killed calls the step that
its journal names, and that is all.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from memshare.config import Config
from memshare.files import RunLocked, run_lock
from memshare.pool.errors import EXIT_DATABASE_AWAY, PoolUnavailable
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.training.child import (
    ChildFailed,
    Stopped,
    accelerate_command,
    run_child,
    stop_orphan,
)
from memshare.training.erasing import erase_deleted
from memshare.training.examples import read_marker, round_dir
from memshare.training.journal import Round
from memshare.training.outcome import DATABASE_AWAY, read_result
from memshare.training.rounds import forget_stale_checkpoints, training_dir


class Done(NamedTuple):
    """What a step reported, and the round's outcome if it ends here."""

    result: dict[str, Any]
    outcome: str | None = None


class Steps:
    """The programs of one run folder."""

    def __init__(
        self,
        config: Config,
        store: PoolStore,
        programs: Path,
        settings: Sequence[str],
        stop: threading.Event,
    ) -> None:
        """``programs``: their folder; ``settings``: arguments that give them this configuration."""
        self._config, self._store, self._programs = config, store, programs
        self._settings, self._stop = list(settings), stop
        self._record = config.run.dir / "continual.child.json"
        self._rehearsed = False

    def stop_orphan(self) -> bool:
        """Stop the program that a killed loop left running; whether there was one."""
        return stop_orphan(self._record)

    def rehearse(self, encoder: str) -> None:
        """Raises `ChildFailed` where no training could begin with ``encoder``; once a loop's start.

        What could change afterwards, the encoder, comes from a training with these settings.
        """
        if self._rehearsed:
            return
        command = [sys.executable, "-m", "memshare.training.rehearsal", *self._settings]
        log_file = self._config.run.dir / "logs" / "rehearsal.log"
        run_child([*command, "--encoder", encoder], log_file, self._record, self._stop)
        self._rehearsed = True

    def mine(self, now: Round) -> Done:
        """Step 5: examples from the new memories, and from a sample of the earlier ones.

        In a later iteration the encoder that the one before has trained proposes. Where it finds
        nothing, the round goes on with that encoder; where the first finds nothing, it ends.
        """
        arguments = ["--round", str(now.number), "--iteration", str(now.iteration)]
        for pool, span in now.spans.items():
            arguments += ["--since-seq", f"{pool}={span.since}"]
            arguments += ["--until-seq", f"{pool}={span.until}"]
        self._await_turn("mining")
        if now.iteration > 1:
            arguments += ["--proposer", str(self._trained(now, now.iteration - 1) / "encoder")]
        self._run(now, [sys.executable, f"{self._programs}/mine.py", *self._settings, *arguments])
        marker = read_marker(self._examples(now))
        return Done(marker, None if marker["examples"] or now.iteration > 1 else "empty")

    def train(self, now: Round) -> Done:
        """Step 6: the encoder learns from them, in every iteration from the round's first one."""
        output, examples = self._training(now, now.iteration), self._examples(now)
        result = read_result(output)
        if result is None or result["status"] not in ("trained", "empty"):
            erase_deleted(self._store, self._config.examples_dir, self._config.served_pools)
            if forget_stale_checkpoints(output, examples):
                log(f"{output}: the examples changed meanwhile; training starts afresh")
            # Nobody is there to be asked about settings, processes or a precision that changed.
            arguments = [
                *self._settings, "--examples", str(examples), "--encoder", now.encoder,
                "--output", str(output), "--round", str(now.number), "--resume", "same",
            ]  # fmt: skip
            arguments += [] if now.warm is None else ["--warm", now.warm]
            start = accelerate_command(self._config.continual)
            try:
                self._run(now, [*start, f"{self._programs}/contrastive.py", *arguments])
            except ChildFailed:  # accelerate makes every exit code but 0 a 1: the result says why
                if (read_result(output) or {}).get("status") != "empty":
                    raise
            result = read_result(output)
        if result is None:
            raise ChildFailed(f"{output}: training ended without a result; see the run's logs/")
        ended = result["status"] == "empty" and now.iteration == 1
        return Done(result, "empty" if ended else None)

    def index(self, now: Round) -> Done:
        """Step 6, second half: build, judge, publish."""
        output = self._trained(now, now.iteration)
        report = output / "index.json"
        arguments = ["--round", str(now.number), "--encoder", str(output / "encoder")]
        arguments += ["--result", str(report)]
        if _outcome(report) in (None, DATABASE_AWAY):
            report.unlink(missing_ok=True)
            self._await_turn("index")
            start = accelerate_command(self._config.continual, always=False)
            command = [*start, f"{self._programs}/index.py", *self._settings, *arguments]
            self._run(now, command, report)
        result: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return Done(result, str(result["outcome"]))

    def refresh(self, now: Round) -> None:
        """A new index for the encoder that serves, where a round had nothing to train on.

        The round has ended by then: what fails here is logged, and left to a later one.
        """
        self._await_turn("index")
        command = [sys.executable, f"{self._programs}/index.py", *self._settings, "--refresh"]
        try:
            self._run(replace(now, step="index"), command)
        except ChildFailed as error:
            log(f"the index of the current generation stays as it is: {error}")

    def _await_turn(self, role: str) -> None:
        """Wait until nobody else has ``role`` on the run folder: who mines by hand, say.

        Raises `Stopped` once the loop is asked to stop.
        """
        told = False
        while True:
            try:
                with run_lock(self._config.run.dir, role):
                    return
            except RunLocked as error:
                if not told:
                    log(f"{error}; the loop waits for it")
                told = True
            if self._stop.wait(self._config.continual.poll_seconds):
                raise Stopped

    def _examples(self, now: Round) -> Path:
        return round_dir(self._config.examples_dir, now.number, now.iteration)

    def _training(self, now: Round, iteration: int) -> Path:
        return training_dir(self._config.run.dir, now.number, iteration)

    def _trained(self, now: Round, iteration: int) -> Path:
        """The training of ``iteration``, or the latest before it that had examples."""
        output = self._training(now, iteration)
        if iteration > 1 and (read_result(output) or {}).get("status") == "empty":
            return self._trained(now, iteration - 1)
        return output

    def _run(self, now: Round, command: Sequence[str], report: Path | None = None) -> None:
        """Run one program with its log. Raises `PoolUnavailable` where it found no database.

        Its exit code says so, or, under accelerate, its ``report``.
        """
        log_file = self._config.run.dir / "logs" / f"round-{now.number:06d}-{now.name}.log"
        try:
            run_child(command, log_file, self._record, self._stop)
        except ChildFailed as error:
            noted = report is not None and _outcome(report) == DATABASE_AWAY
            if noted or error.code == EXIT_DATABASE_AWAY:
                raise PoolUnavailable(
                    f"{now.name} of round {now.number}; see {log_file}"
                ) from error
            raise


def _outcome(report: Path) -> str | None:
    """What train/index.py wrote; None where it wrote nothing."""
    try:
        return str(json.loads(report.read_text(encoding="utf-8"))["outcome"])
    except FileNotFoundError:
        return None
