"""What a training run reports while it runs: ``log.jsonl`` beside it, and Weights & Biases.

W&B lives in a thread of its own behind a bounded queue, so a slow, unreachable or broken service
neither slows nor fails the training: it is told once, and ``log.jsonl`` goes on. An online run that
can't be opened is offline, to be sent later by ``wandb sync``. At its end a run waits for W&B: a
few seconds where the service does not answer, half a minute at most where it does.
"""

from __future__ import annotations

import json
import queue
import secrets
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memshare.config import WandbConfig
from memshare.files import write_atomic
from memshare.progress import log
from memshare.training import wandb_run

_QUEUED = 10_000  # figures waiting for W&B; more than that are for log.jsonl only
_LAST_SECONDS = 4.0  # for W&B to send the last figures, or to tell that its service is there
_GONE_SECONDS = 1.0


def new_run_id() -> str:
    """A W&B run id of our own making, so that a checkpoint can hold it before W&B answers."""
    return secrets.token_hex(4)


@dataclass(frozen=True)
class Rows:
    """A table for W&B."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]


class Tracker:
    """One run's figures. Use as a context manager; processes but the main one report nothing."""

    def __init__(
        self,
        output: Path,
        config: WandbConfig,
        *,
        run_id: str,
        settings: Mapping[str, Any],
        done: int = 0,
        main: bool = True,
    ) -> None:
        """``done`` steps are in the log already; later lines of a run that was cut off are dropped.

        ``settings`` become the W&B run's config. Raises `ConfigError` as `wandb_mode` does.
        """
        self.run_id = run_id
        self.mode = wandb_run.wandb_mode(config) if main else "disabled"
        self.path = output / "log.jsonl"
        self.wandb_dir: str | None = None
        self.wandb_url: str | None = None
        self._output = output
        self._config = config
        self._settings = dict(settings)
        self._queue: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(_QUEUED)
        self._thread: threading.Thread | None = None
        self._worth_waiting = threading.Event()
        self._given_up = False
        self._exit_code = 0
        self._main = main
        if main:
            output.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, "".join(_lines_until(self.path, done)))

    def __enter__(self) -> Tracker:
        """Start W&B, unless it is disabled."""
        if self.mode != "disabled":
            # A daemon: a W&B that hangs does not keep the program from ending.
            self._thread = threading.Thread(target=self._send, name="wandb", daemon=True)
            self._thread.start()
        return self

    def show(self, step: int, of: int, figures: Mapping[str, float]) -> None:
        """`log`, and a plain line where no progress bar is."""
        self.log(step, figures)
        if self._main and not sys.stderr.isatty():
            told = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            log(f"step {step}/{of}: {told}")

    @property
    def wandb(self) -> dict[str, str | None]:
        """Where the W&B run is: id, mode, local folder, and its page if it is online."""
        return {
            "id": self.run_id, "mode": self.mode, "dir": self.wandb_dir, "url": self.wandb_url,
        }  # fmt: skip

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give W&B a bounded time to finish, and little of it where its service does not answer.

        An exception makes the run a failed one there.
        """
        if self._thread is None:
            return
        self._exit_code = 0 if kind is None else 1
        with suppress(queue.Full):  # then it is stuck, and won't read that this was all
            self._queue.put_nowait(None)
        self._thread.join(_LAST_SECONDS)
        if self._thread.is_alive() and self._worth_waiting.is_set():
            self._thread.join(wandb_run.FINISH_SECONDS)
        if self._thread.is_alive():
            self._given_up = True
            wandb_run.give_up()
            self._thread.join(_GONE_SECONDS)
            where = self.wandb_dir and f"; `wandb sync {self.wandb_dir}` sends what is missing"
            log(f"W&B did not finish in time{where or f', figures are in {self.path}'}")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Record the figures of ``step`` (1, 2, ...); never waits for W&B."""
        if not self._main:
            return
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **figures}) + "\n")
        self._put(step, figures)

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Show W&B a table; ``log.jsonl`` has figures only."""
        if self._main and rows.rows:
            self._put(step, {name: rows})

    def _put(self, step: int, entry: Mapping[str, Any]) -> None:
        if self._thread is not None and not self._queue.full():
            self._queue.put_nowait((step, dict(entry)))

    def _send(self) -> None:
        """The W&B thread: its failures are reported, and end nothing but itself."""
        try:
            self._record()
        except Exception as error:  # policy: whatever W&B raises, the training goes on
            if not self._given_up:
                log(f"W&B gave up ({type(error).__name__}: {error}); figures are in {self.path}")
        finally:
            wandb_run.let_go()

    def _record(self) -> None:
        self.mode = wandb_run.reached(self.mode)
        self._worth_waiting.set()
        run, self.mode = wandb_run.open_run(
            self._config, self.mode, self.run_id, self._settings, self._output
        )
        self.wandb_dir = str(Path(run.dir).parent)
        self.wandb_url = run.url if self.mode == "online" else None
        charted: set[str] = set()
        while (entry := self._queue.get()) is not None:
            step, figures = entry
            wandb_run.chart(run, figures.keys() - charted)
            charted |= figures.keys()
            shown = {name: _shown(value) for name, value in figures.items()}
            run.log({wandb_run.STEP: step, **shown}, step=step)
        if self.mode == "online":
            self._worth_waiting.clear()
            if wandb_run.service_answers():
                self._worth_waiting.set()
        run.finish(self._exit_code)


def _shown(value: float | Rows) -> Any:
    if not isinstance(value, Rows):
        return value
    import wandb

    return wandb.Table(columns=list(value.columns), data=[list(row) for row in value.rows])


def _lines_until(path: Path, done: int) -> list[str]:
    """The lines of ``path`` for steps up to ``done``; a line cut off by a crash is dropped."""
    if done == 0 or not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError):
            continue
        if step <= done:
            kept.append(line)
    return kept
