"""The plain, frozen data that every part of memshare passes around.

Nothing here imports torch, FAISS or a database. Words follow the glossary in the README.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ChangeKind = Literal["add", "delete", "hold", "release", "amend"]
AppendStatus = Literal["stored", "duplicate", "held", "rejected"]


# Combining marks are no words' characters, but for two of kana. Symbols are none either: no matter.
_MARKS = re.compile(r"(?:[^\w\s\x00-\u02ff]|[\uff9e\uff9f])++")
_PILE = 256


def unicode_form(form: Literal["NFC", "NFKC"], text: str) -> str:
    """``text`` in a normal form of Unicode, but as it is where `_PILE` marks follow each other.

    Python sorts them in quadratic time and holds every thread up meanwhile: for minutes, where
    somebody sends a megabyte of them. No language piles up more than a few.
    """
    if unicodedata.is_normalized(form, text):  # which sorts nothing; most texts are
        return text
    piled = any(run.end() - run.start() >= _PILE for run in _MARKS.finditer(text))
    return text if piled else unicodedata.normalize(form, text)


def normalise(text: str) -> str:
    """Fold what does not make two texts different memories: Unicode form, case and white space."""
    return " ".join(unicode_form("NFC", text).casefold().split())


def content_key(pool: str, prompt: str, answer: str) -> str:
    """Hex SHA-256 over the normalised content; two memories of one pool with equal keys are one."""
    joined = "\x1f".join((pool, normalise(prompt), normalise(answer)))
    return hashlib.sha256(joined.encode()).hexdigest()


def answer_key(answer: str) -> str:
    """Hex SHA-256 of the normalised answer; equal keys are never each other's negatives."""
    return hashlib.sha256(normalise(answer).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class NewMemory:
    """A memory on its way into a pool; ``created_at`` is ISO 8601 in UTC, None means now.

    ``id`` is None except in an administrator's import, where it makes an export round-trip: it is
    kept unless a memory, living or deleted, has had it before. ``hold``: why the memory is on hold
    from its arrival on, None where it is not. ``copy_of``: the id of the memory shown to its author
    whose answer it repeats.
    """

    pool: str
    prompt: str
    answer: str
    score: float | None = None
    agent: str | None = None
    model: str | None = None
    created_at: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None
    hold: str | None = None
    copy_of: str | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """One stored prompt-answer pair. ``seq`` is its position in the pool (1, 2, ...).

    ``hold_reason``: why a held one is held, None where nobody said.
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
    seq: int
    held: bool = False
    hold_reason: str | None = None

    def wire(self) -> dict[str, Any]:
        """The form on the wire: REST bodies and JSONL exports."""
        return {
            "id": self.id,
            "pool": self.pool,
            "prompt": self.prompt,
            "answer": self.answer,
            "score": self.score,
            "agent": self.agent,
            "model": self.model,
            "created_at": self.created_at,
            "metadata": dict(self.metadata),
        }


@dataclass(frozen=True, slots=True)
class Pair:
    """A finished answer to a bare question, on its way to the scorer.

    ``finish_reason`` as OpenAI's; ``agent`` and ``model`` say who answered; ``copy_of`` as in
    `NewMemory`.
    """

    pool: str
    prompt: str
    answer: str
    finish_reason: str = "stop"
    agent: str | None = None
    model: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    copy_of: str | None = None


@dataclass(frozen=True, slots=True)
class AppendResult:
    """What became of one appended memory; a duplicate names the memory that was there first.

    ``reason``: why it is held, or was rejected. A rejected one has no id (an empty one), or that of
    the memory it is a copy of, and seq 0.
    """

    id: str
    status: AppendStatus
    seq: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of a pool's change log."""

    pool: str
    seq: int
    kind: ChangeKind
    id: str


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """A pool: its rubric (name or file), the score from which a pair is stored, its position."""

    name: str
    rubric: str
    threshold: float
    last_seq: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A memory proposed for one training query by BM25, by the serving retriever, or by both.

    ``bm25_rank`` and ``dense_rank`` count from 0; None: that one did not propose it. ``loglik`` is
    the mean log-likelihood per token, in nats, of the query's own answer when this memory is shown
    before the query; None where nothing measured it. ``answer_key`` is the hash of the candidate's
    normalised answer: equal answers are never negatives of each other. ``prompt_key`` is that of
    its normalised prompt (`select.text_key`): it is no negative of a query that is its prompt.
    ``principal`` is who wrote it. ``label_key`` is the hash of its label, where labels are given
    and it has one: what has a positive's label is no negative. All three are None in examples that
    earlier versions mined.
    """

    id: str
    text: str
    bm25_rank: int | None
    loglik: float | None
    answer_key: str
    dense_rank: int | None = None
    prompt_key: str | None = None
    principal: str | None = None
    label_key: str | None = None


DATA_SET = "given"  # in place of a scorer: the labels came with the texts


@dataclass(frozen=True, slots=True)
class Example:
    """One training query with every scored candidate; positives are chosen when training.

    ``query_id`` is the id of the memory whose prompt is the query; ``principal`` is who wrote it;
    ``round`` the continual round that mined it; ``baseline_loglik`` the likelihood with no example.
    ``labels`` says how ``loglik`` came about (none, given, likelihood, prompted, reward).
    """

    query_id: str
    query: str
    answer: str
    pool: str
    principal: str | None
    round: int
    seq: int
    scorer: str
    labels: str
    baseline_loglik: float | None
    candidates: tuple[Candidate, ...]

    @property
    def exhaustive(self) -> bool:
        """Whether what is not named here is not relevant: it is a data set's, with its labels."""
        return self.scorer == DATA_SET


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result: a memory's id and its cosine similarity to the query."""

    id: str
    similarity: float


@dataclass(frozen=True, slots=True)
class SearchAnswer:
    """Best-first hits, all of them found by one generation."""

    generation: int
    hits: tuple[Hit, ...]


@dataclass(frozen=True, slots=True)
class Grade:
    """A scorer's verdict in 0..100; ``value`` None means unusable, which always rejects."""

    value: float | None
    reason: str = ""
