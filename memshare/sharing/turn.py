"""What one turn of the loop passes from step to step, and how it can end."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from memshare.llm.agent import AgentAnswer
from memshare.pool.feedback import Standing
from memshare.records import Memory, normalise

STORED = "stored"
BELOW_THRESHOLD = "below threshold"
UNREADABLE_GRADE = "unreadable grade"
CUT_OFF = "cut off by length"
UNFINISHED = "not finished"
DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near-duplicate"
EMPTY = "empty"
INVALID = "invalid"
REFUSED = "refused by the scorer"
FAILED = "scoring failed"
HELD = "held"
LIMIT = "beyond a limit of the pool"


@dataclass(frozen=True, slots=True)
class Retrieved:
    """Memories best first with the cosines that found them; ``generation`` None: none was asked.

    ``standings``: of those memories that have any, where they were asked for.
    """

    generation: int | None
    memories: tuple[Memory, ...]
    similarities: tuple[float, ...]
    standings: Mapping[str, Standing] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of a pair, and why. ``detail`` may quote the scorer; ``reason`` is one of few."""

    status: Literal["stored", "duplicate", "held", "rejected"]
    reason: str
    score: float | None = None
    memory_id: str | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One whole turn: what was shown, what was answered, what was decided."""

    retrieved: Retrieved
    answer: AgentAnswer
    decision: Decision


def prompt_hash(prompt: str) -> str:
    """What a decision keeps of a prompt: hex SHA-256 of its normalised text."""
    return hashlib.sha256(normalise(prompt).encode()).hexdigest()
