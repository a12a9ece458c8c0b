"""What a gateway replies, as plain frozen data.

Without slots: the MCP SDK makes schemas of these and reads defaults off the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Memory:
    """A memory. ``standing`` in -1..1 sums up the feedback of ``votes`` principals.

    ``similarity``, of a search result: the cosine of its vector and the query's.
    """

    id: str
    pool: str
    prompt: str
    answer: str
    score: float | None
    agent: str | None
    model: str | None
    created_at: str
    metadata: Mapping[str, Any]
    standing: float
    votes: int
    similarity: float | None = None


@dataclass(frozen=True)
class AddResult:
    """What became of one memory; ``reason`` says why it was rejected.

    ``pending``: a scorer decides. A duplicate names the memory that was there first.
    """

    id: str | None
    status: Literal["stored", "duplicate", "held", "rejected", "pending"]
    reason: str | None = None


@dataclass(frozen=True)
class Found:
    """Memories best first, all of them found by one generation."""

    generation: int
    memories: tuple[Memory, ...]


@dataclass(frozen=True)
class Page:
    """One page of a pool in the order of storing; ``next_cursor`` None at the end."""

    memories: tuple[Memory, ...]
    next_cursor: str | None


@dataclass(frozen=True)
class Standing:
    """A memory's standing once an opinion was given."""

    id: str
    standing: float
    votes: int


@dataclass(frozen=True)
class ChatReply:
    """An answer with the memories that were shown for it, best first.

    ``write``: ``pending`` will be graded and perhaps stored; ``off`` won't, by ``reason``. ``raw``
    is the whole reply in OpenAI's form.
    """

    text: str
    finish_reason: str
    generation: int | None
    memories: tuple[str, ...]
    write: str
    reason: str | None
    raw: Mapping[str, Any]


@dataclass(frozen=True)
class ChatChunk:
    """A piece of a streamed answer. The first one has ``note``: generation, memories, write."""

    text: str
    finish_reason: str | None
    note: Mapping[str, Any] | None
    raw: Mapping[str, Any]


@dataclass(frozen=True)
class Generation:
    """One generation on disk."""

    number: int
    created_at: str
    parent: int | None
    positions: Mapping[str, int]
    current: bool
    serving: bool


@dataclass(frozen=True)
class Generations:
    """A retriever's generations, oldest first."""

    retriever: str
    serving: int
    current: int | None
    pinned: bool
    generations: tuple[Generation, ...]
