"""The journal of continual training: which round is under way, and which step of it is next.

``continual.json`` in the run folder is written atomically after every step, so that a loop killed
at any point goes on from the step that was not finished. Each step finds out by itself what it has
done already: mining skips finished shards, training resumes from its checkpoint, indexing
recognises the generation that it published.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from memshare.files import write_json
from memshare.pool.store import PoolStore
from memshare.training.examples import ExamplesError, erase, read_marker, round_dir, round_dirs

Step = Literal["mine", "train", "index", "done"]
STEPS: tuple[Step, ...] = ("mine", "train", "index", "done")
_PAGE = 10_000


class JournalError(RuntimeError):
    """The journal of continual training can't be read."""


@dataclass(frozen=True, slots=True)
class Span:
    """Changes of one pool's log with ``since < seq <= until``."""

    since: int
    until: int


@dataclass(frozen=True, slots=True)
class Round:
    """One round of continual training; ``step`` is the one to do next.

    ``encoder``: the folder or name that training starts from. ``outcome``: published, rejected or
    empty, once done. ``results``: what each finished step reported.
    """

    number: int
    spans: Mapping[str, Span]
    encoder: str
    step: Step = "mine"
    outcome: str | None = None
    results: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Journal:
    """Every round so far, oldest first; at most the last one is unfinished."""

    rounds: tuple[Round, ...] = ()

    @property
    def open_round(self) -> Round | None:
        """The round under way, None between two rounds."""
        return self.rounds[-1] if self.rounds and self.rounds[-1].step != "done" else None

    @property
    def positions(self) -> dict[str, int]:
        """Where each pool's next span begins."""
        return {name: span.until for item in self.rounds for name, span in item.spans.items()}

    def begin(self, number: int, spans: Mapping[str, Span], encoder: str) -> Journal:
        """Round ``number`` over ``spans``; the one before must be done."""
        if self.open_round is not None:
            raise JournalError(f"round {self.open_round.number} is not done yet")
        return Journal((*self.rounds, Round(number, dict(spans), encoder)))

    def advance(self, result: Any, *, outcome: str | None = None) -> Journal:
        """The current step is finished; ``outcome`` ends the round, whatever steps are left."""
        now = self.open_round
        if now is None:
            raise JournalError("no round is under way")
        step: Step = "done" if outcome else STEPS[STEPS.index(now.step) + 1]
        results = {**now.results, now.step: result}
        after = replace(now, step=step, results=results, outcome=outcome)
        return Journal((*self.rounds[:-1], after))

    def save(self, path: Path) -> None:
        """Write the journal atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Journal:
        """Read it; a missing file is an empty journal. Raises `JournalError` if it is damaged."""
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["rounds"]
            rounds = tuple(Round(**{**row, "spans": _spans(row["spans"])}) for row in rows)
            steps = [item.step for item in rounds]
            if any(step not in STEPS for step in steps) or set(steps[:-1]) - {"done"}:
                raise ValueError(f"steps {steps}")
        except FileNotFoundError:
            return cls()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JournalError(
                f"{path}: the journal is damaged ({error!r}); restore it from a backup, or delete "
                "it to mine the pools from their beginning"
            ) from error
        return cls(rounds)


def _spans(rows: Mapping[str, Mapping[str, int]]) -> dict[str, Span]:
    return {name: Span(int(row["since"]), int(row["until"])) for name, row in rows.items()}


def last_mined(examples_dir: Path) -> tuple[int, dict[str, int]]:
    """Number of the last finished round of mining (0: none), and each pool's position after it."""
    positions: dict[str, int] = {}
    number = 0
    for folder in round_dirs(examples_dir):
        marker = read_marker(folder)
        try:
            number = int(marker["round"])
            positions |= {name: span.until for name, span in _spans(marker["spans"]).items()}
        except (KeyError, TypeError, ValueError) as error:
            raise ExamplesError(f"{folder}: its marker names no round or spans") from error
    return number, positions


def last_begun(examples_dir: Path) -> int:
    """Number of the last round that mining has begun, finished or not (0: none)."""
    return max((int(path.parent.name) for path in examples_dir.glob("[0-9]*/plan.json")), default=0)


def new_ids(store: PoolStore, pool: str, span: Span) -> list[str]:
    """Ids of the memories that were added or released within ``span``, first come first.

    Some may have been deleted or put on hold since.
    """
    found: dict[str, None] = {}
    since = span.since
    while since < span.until:
        page = store.changes(pool, since, _PAGE)
        for change in page:
            if change.seq <= span.until and change.kind in ("add", "release"):
                found.setdefault(change.id)
        if len(page) < _PAGE:
            break
        since = page[-1].seq
    return list(found)


def count_new(
    store: PoolStore, positions: Mapping[str, int], pools: Sequence[str], need: int = 1
) -> int:
    """How many memories came since ``positions``, over all ``pools``; 0 if fewer than ``need``.

    The logs are read only once they are long enough, so that waiting costs next to nothing.
    """
    spans = open_spans(store, positions, pools)
    if sum(span.until - span.since for span in spans.values()) < need:
        return 0
    found = sum(len(new_ids(store, pool, span)) for pool, span in spans.items())
    return found if found >= need else 0


def open_spans(
    store: PoolStore, positions: Mapping[str, int], pools: Sequence[str]
) -> dict[str, Span]:
    """From ``positions`` to each pool's present end."""
    return {pool: Span(positions.get(pool, 0), store.last_seq(pool)) for pool in pools}


def erase_deleted(store: PoolStore, examples_dir: Path, pools: Sequence[str]) -> int:
    """Erase what was deleted or put on hold since the last call from all examples on disk.

    A memory that is released later is mined again. Returns the number of shards rewritten.
    """
    path = examples_dir / "erased.json"
    try:
        done: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        done = {}  # erasing from the beginning again does no harm
    upto = {pool: store.last_seq(pool) for pool in pools}
    gone: set[str] = set()
    for pool in pools:
        since = done.get(pool, 0)
        while page := store.changes(pool, since, _PAGE):
            gone |= {change.id for change in page if change.kind in ("delete", "hold")}
            since = page[-1].seq
    rewritten = erase(examples_dir, gone)
    if upto != {pool: done.get(pool, 0) for pool in pools}:
        write_json(path, {**done, **upto})
    return rewritten


def training_dir(run_dir: Path, number: int) -> Path:
    """Where round ``number`` keeps its checkpoints, encoder and results."""
    return round_dir(run_dir / "training", number)


def forget_stale_checkpoints(output: Path, examples: Path) -> bool:
    """Delete the checkpoints in ``output`` if its examples changed since the last call.

    Deleting a memory changes them; what was learned from it must not be continued. Returns whether
    they were stale.
    """
    shards = sorted(examples.rglob("shard-*.parquet"))  # held-out ones choose the best step
    stamps = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in shards]
    inputs = {"examples": hashlib.sha256("\n".join(stamps).encode()).hexdigest()}
    path = output / "inputs.json"
    stale = path.exists() and json.loads(path.read_text(encoding="utf-8")) != inputs
    if stale:
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    write_json(path, inputs)
    return stale
