"""What a search may be restricted to, beside its pool."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from memshare.pool.errors import InvalidMemory
from memshare.pool.validate import canonical_time

Scalar = str | int | float | bool

_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")


def microseconds(time: str) -> int:
    """An ISO 8601 time (UTC where it names no zone) as microseconds since 1970.

    Raises `InvalidMemory` where it is none.
    """
    delta = datetime.fromisoformat(canonical_time(time)) - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def term(key: str, value: Scalar) -> str:
    """One ``key`` of metadata having one ``value``, so that equal ones are equal texts.

    1 and 1.0 are the same number; 1, ``"1"`` and true are three values.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps([key, value])


def terms_of(metadata: Mapping[str, Any]) -> frozenset[str]:
    """Every `term` that a memory's metadata has: its scalars, and each scalar in its lists."""
    found = set()
    for key, value in metadata.items():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, str | int | float):
                found.add(term(key, item))
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Filter:
    """Only memories by ``agent``, made at or after ``created_after`` and before ``created_before``.

    Times are ISO 8601; None restricts nothing. ``exclude``: ids that are left out. ``terms``: what
    their metadata has, all of it (see `terms_of`). ``max_per_agent``: at most so many by one agent;
    memories that name none are nobody's. Raises ValueError for a text that is no time.
    """

    agent: str | None = None
    created_after: str | None = None
    created_before: str | None = None
    exclude: frozenset[str] = frozenset()
    terms: frozenset[str] = frozenset()
    max_per_agent: int | None = None

    def __post_init__(self) -> None:
        """Check the times."""
        for name in ("created_after", "created_before"):
            value = getattr(self, name)
            if value is not None:
                try:
                    microseconds(value)
                except InvalidMemory:
                    raise ValueError(f"{name}: {value!r} is no ISO 8601 time") from None
