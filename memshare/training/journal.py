"""The journal of continual training: which round is under way, and which step of it is next.

``continual.json`` in the run folder is written atomically after every step, so that a loop killed
at any point goes on from the step that was not finished. Each step finds out by itself what it has
done already: mining skips finished shards, training resumes from its checkpoint, indexing
recognises the generation that it published.

A round of several iterations (``mining.iterations``) mines and trains that often before it indexes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from memshare.files import write_json

Step = Literal["mine", "train", "index", "done"]
STEPS: tuple[Step, ...] = ("mine", "train", "index", "done")


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

    ``encoder``: the folder or name that training starts from; ``warm``: the training whose
    optimizer state it starts from, None for none. ``iteration`` (1, 2, ...) of ``iterations`` is
    under way. ``outcome``: published, rejected or empty, once done. ``results``: what each finished
    step reported, by `name`.
    """

    number: int
    spans: Mapping[str, Span]
    encoder: str
    step: Step = "mine"
    outcome: str | None = None
    results: Mapping[str, Any] = field(default_factory=dict)
    iterations: int = 1
    iteration: int = 1
    warm: str | None = None

    @property
    def name(self) -> str:
        """The step's name; with its iteration if a later one takes its place."""
        later = self.iteration < self.iterations
        return f"{self.step}-{self.iteration}" if later else self.step

    def after(self, result: Any, outcome: str | None) -> Round:
        """The round with its step finished; ``outcome`` ends it."""
        results = {**self.results, self.name: result}
        if outcome:
            return replace(self, step="done", results=results, outcome=outcome)
        if self.step == "train" and self.iteration < self.iterations:
            return replace(self, step="mine", results=results, iteration=self.iteration + 1)
        return replace(self, step=STEPS[STEPS.index(self.step) + 1], results=results)


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

    def begin(self, following: Round) -> Journal:
        """Put a round on record; the one before must be done."""
        if self.open_round is not None:
            raise JournalError(f"round {self.open_round.number} is not done yet")
        return Journal((*self.rounds, following))

    def advance(self, result: Any, *, outcome: str | None = None) -> Journal:
        """The current step is finished; ``outcome`` ends the round, whatever steps are left."""
        if self.open_round is None:
            raise JournalError("no round is under way")
        return Journal((*self.rounds[:-1], self.open_round.after(result, outcome)))

    def published_by(self, generation: int) -> Round | None:
        """The round that published a generation, if it is on record.

        The last one: another retriever, or another folder of generations, counts from 1 again.
        """
        for item in reversed(self.rounds):
            index = item.results.get("index", {})
            if (item.outcome, index.get("generation")) == ("published", generation):
                return item
        return None

    def save(self, path: Path) -> None:
        """Write the journal atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Journal:
        """Read it; a missing file is an empty journal. Raises `JournalError` if it is damaged."""
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["rounds"]
            rounds = tuple(Round(**{**row, "spans": read_spans(row["spans"])}) for row in rows)
            steps = [item.step for item in rounds]
            if any(step not in STEPS for step in steps) or set(steps[:-1]) - {"done"}:
                raise ValueError(f"steps {steps}")
        except FileNotFoundError:
            return cls()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JournalError(
                f"{path}: the journal is damaged, or of another version of memshare ({error!r}); "
                "go on with that version, restore the journal from a backup, or delete it: the "
                "next round begins where the last one that was mined has ended"
            ) from error
        return cls(rounds)


def read_spans(rows: Mapping[str, Mapping[str, int]]) -> dict[str, Span]:
    """Spans by pool, from their JSON."""
    return {name: Span(int(row["since"]), int(row["until"])) for name, row in rows.items()}
