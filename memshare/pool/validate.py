"""What text and provenance a pool takes. Checked before anything is written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

from memshare.pool.errors import InvalidMemory
from memshare.pool.ids import ID
from memshare.records import NewMemory

MAX_TEXT_CHARS = 32_768
_MAX_DEPTH = 64  # of metadata; a reader deep in calls of its own has less room for it than a writer
_MAX_NAME_CHARS = 256
_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def check_text(field: str, text: object, max_chars: int = MAX_TEXT_CHARS) -> str:
    """Return ``text`` unchanged, or raise `InvalidMemory` naming ``field``."""
    if not isinstance(text, str):
        raise InvalidMemory(field, f"text expected, got {type(text).__name__}")
    if not text or text.isspace():
        raise InvalidMemory(field, "is empty")
    if len(text) > max_chars:
        raise InvalidMemory(field, f"is {len(text)} characters long, at most {max_chars} allowed")
    if "\x00" in text:
        raise InvalidMemory(field, "contains a NUL character")
    if not text.isascii() and _SURROGATE.search(text):
        raise InvalidMemory(field, "contains a lone surrogate, which no UTF-8 text has")
    return text


def check_pool_name(name: object, field: str = "pool") -> str:
    """Return ``name``, or raise `InvalidMemory`: printable, at most 200 characters, trimmed."""
    name = check_text(field, name, 200)
    if name != name.strip() or not name.isprintable():
        raise InvalidMemory(field, f"{name!r} has unprintable characters or space around it")
    return name


def canonical_time(text: object) -> str:
    """ISO 8601 in UTC with microseconds and a Z, so that text order is time order.

    A time without a zone is taken as UTC. Raises `InvalidMemory`.
    """
    try:
        time = datetime.fromisoformat(text)  # type: ignore[arg-type]
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        raise InvalidMemory("created_at", f"{text!r} is no ISO 8601 time") from None
    return time.isoformat(timespec="microseconds").replace("+00:00", "Z")


def now() -> str:
    """The present in the form of `canonical_time`."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def check_score(score: object, field: str = "score") -> float | None:
    """None or a finite number in 0..100, as a float; raises `InvalidMemory`."""
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise InvalidMemory(field, f"a number expected, got {type(score).__name__}")
    if not 0 <= score <= 100:  # nor is NaN; a whole number may be beyond any float
        raise InvalidMemory(field, f"{score} is not in 0..100")
    return float(score)


def check_memory(memory: NewMemory, max_chars: int = MAX_TEXT_CHARS) -> NewMemory:
    """Return ``memory`` with ``created_at`` and ``score`` in canonical form.

    Raises `InvalidMemory` naming the field: text must not be empty after stripping, hold no NUL and
    no lone surrogate and at most ``max_chars`` characters; metadata must be a JSON object within
    the same limit; a score is in 0..100.
    """
    check_pool_name(memory.pool)
    check_text("prompt", memory.prompt, max_chars)
    check_text("answer", memory.answer, max_chars)
    if memory.agent is not None:
        check_text("agent", memory.agent, _MAX_NAME_CHARS)
    if memory.model is not None:
        check_text("model", memory.model, _MAX_NAME_CHARS)
    if memory.id is not None and not (isinstance(memory.id, str) and ID.fullmatch(memory.id)):
        raise InvalidMemory("id", "1 to 64 letters, digits, '-' or '_' expected")
    if memory.metadata:
        check_metadata(memory.metadata, max_chars)
    elif not isinstance(memory.metadata, Mapping):
        raise InvalidMemory("metadata", "a JSON object expected")
    return replace(
        memory,
        created_at=now() if memory.created_at is None else canonical_time(memory.created_at),
        score=check_score(memory.score),
        metadata=dict(memory.metadata),
    )


def check_metadata(metadata: object, max_chars: int) -> None:
    """Raise `InvalidMemory` unless ``metadata`` is a JSON object of at most ``max_chars``.

    Nor may it be nested deeper than `_MAX_DEPTH`.
    """
    if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
        raise InvalidMemory("metadata", "a JSON object expected")
    try:
        text = _ENCODER.encode(dict(metadata))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidMemory("metadata", f"is no JSON: {error}") from None
    if len(text) > max_chars:
        raise InvalidMemory("metadata", f"is {len(text)} characters long, at most {max_chars}")
    if _JSON_NUL.search(text) or _SURROGATE.search(text):
        raise InvalidMemory("metadata", "contains a NUL character or a lone surrogate")
    if _deeper(metadata, _MAX_DEPTH):
        raise InvalidMemory("metadata", f"is nested deeper than {_MAX_DEPTH} levels")


def _deeper(value: object, levels: int) -> bool:
    """Whether objects and lists are nested more than ``levels`` deep in ``value``, it included."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return False
    return levels == 0 or any(_deeper(item, levels - 1) for item in value)
