"""From one foreign row (a JSON object, a CSV record, a data set's row) to a `NewMemory`.

Without a column mapping a row must be in the wire form, or in the chat form; a column that is none
of these is an error, not a silent loss. With a mapping, columns that it does not name are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memshare.pool.errors import InvalidMemory, TransferError
from memshare.records import NewMemory

Mappings = Mapping[str, str]

_FIELDS = ("id", "pool", "prompt", "answer", "score", "agent", "model", "created_at", "metadata")
_CHAT_FIELDS = (*(name for name in _FIELDS if name not in ("prompt", "answer")), "messages")
_METADATA = "metadata."


def parse_mapping(items: Sequence[str]) -> dict[str, str]:
    """Read ``field=column[,field=column...]`` strings.

    Fields are those of a memory on the wire, and ``metadata.KEY``; ``prompt`` and ``answer`` must
    be among them. Raises `TransferError`.
    """
    mapping: dict[str, str] = {}
    for pair in (part for item in items for part in item.split(",")):
        field, equals, column = (piece.strip() for piece in pair.partition("="))
        if not equals or not field or not column:
            raise TransferError(f"--map {pair!r}: expected field=column")
        if field not in _FIELDS and not (field.startswith(_METADATA) and field != _METADATA):
            raise TransferError(
                f"--map {pair!r}: no field {field!r}; there are {', '.join(_FIELDS)}, metadata.KEY"
            )
        if field in mapping:
            raise TransferError(f"--map: {field} is mapped twice")
        mapping[field] = column
    missing = [name for name in ("prompt", "answer") if name not in mapping] if mapping else []
    if missing:
        raise TransferError(f"--map: no column for {' and '.join(missing)}")
    return mapping


def check_columns(source: str, columns: Iterable[str], mapping: Mappings) -> None:
    """Raise `TransferError` if a table with these columns can't give memories."""
    there = list(columns)
    if len(set(there)) != len(there):
        raise TransferError(f"{source}: two columns have one name: {', '.join(there)}")
    if mapping:
        missing = [column for column in mapping.values() if column not in there]
        if missing:
            raise TransferError(
                f"{source}: no column {', '.join(map(repr, missing))}; "
                f"there are {', '.join(map(repr, there))}"
            )
    elif "messages" not in there:
        missing = [name for name in ("prompt", "answer") if name not in there]
        unknown = [name for name in there if name not in _FIELDS]
        if missing or unknown:
            raise TransferError(
                f"{source}: columns prompt and answer are expected, and there are "
                f"{', '.join(map(repr, there))}; map them: --map prompt=COLUMN,answer=COLUMN"
            )


def to_memory(row: object, pool: str | None, mapping: Mappings, form: str = "auto") -> NewMemory:
    """Make a memory of one row; raises `InvalidMemory`.

    ``pool`` None takes the row's own. ``form``: ``native``, ``chat``, or ``auto`` (chat if the row
    has ``messages``). Texts are checked only when they are stored.
    """
    if not isinstance(row, Mapping):
        raise InvalidMemory("row", f"a JSON object expected, got {type(row).__name__}")
    if mapping:
        fields = _mapped(row, mapping)
    elif form == "chat" or (form == "auto" and "messages" in row):
        fields = _chat(row)
    else:
        _no_others(row, _FIELDS)
        fields = dict(row)
    for name in ("prompt", "answer"):
        if fields.get(name) is None:
            raise InvalidMemory(name, "is missing")
    if pool is not None:
        fields["pool"] = pool
    elif fields.get("pool") is None:
        raise InvalidMemory("pool", "is missing; name one in the row or with --pool")
    if fields.get("metadata") is None:
        fields["metadata"] = {}
    return NewMemory(**fields)


def from_strings(row: Mapping[str, str], mapping: Mappings) -> dict[str, Any]:
    """Give a CSV record the types of JSON: empty is missing, scores are numbers."""
    typed: dict[str, Any] = {column: text or None for column, text in row.items()}
    score, metadata = mapping.get("score", "score"), mapping.get("metadata", "metadata")
    if typed.get(score) is not None and (not mapping or "score" in mapping):
        try:
            typed[score] = float(row[score])
        except ValueError:
            raise InvalidMemory("score", f"{row[score]!r} is no number") from None
    if typed.get(metadata) is not None and (not mapping or "metadata" in mapping):
        try:
            typed[metadata] = json.loads(row[metadata])
        except (ValueError, RecursionError):
            raise InvalidMemory("metadata", "a JSON object expected") from None
    return typed


def _mapped(row: Mapping[str, Any], mapping: Mappings) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for field, column in mapping.items():
        if column not in row:
            raise InvalidMemory(field, f"its column {column!r} is missing")
        if field.startswith(_METADATA):
            extra[field.removeprefix(_METADATA)] = row[column]
        else:
            fields[field] = row[column]
    if extra:
        whole = fields.get("metadata") or {}
        if not isinstance(whole, Mapping):
            raise InvalidMemory("metadata", "a JSON object expected")
        fields["metadata"] = {**whole, **extra}
    return fields


def _chat(row: Mapping[str, Any]) -> dict[str, Any]:
    """One exchange: a user turn, then an assistant turn; system turns are left out.

    A longer conversation is refused rather than cut: its later answers rest on turns that a memory,
    which is one prompt and one answer, would not hold.
    """
    _no_others(row, _CHAT_FIELDS)
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise InvalidMemory("messages", "a list expected")
    turns: list[tuple[object, object]] = []
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise InvalidMemory("messages", "each must be an object with role and content")
        if message["role"] != "system":
            turns.append((message["role"], message.get("content")))
    roles = [role for role, _ in turns]
    if roles != ["user", "assistant"]:
        shown = ", ".join(map(str, roles[:6])) + (", ..." if len(roles) > 6 else "")
        raise InvalidMemory(
            "messages", f"one user turn, then one assistant turn expected, got: {shown or 'none'}"
        )
    fields = {name: value for name, value in row.items() if name != "messages"}
    return {**fields, "prompt": turns[0][1], "answer": turns[1][1]}


def _no_others(row: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [str(name) for name in row if name not in known]
    if unknown:
        raise InvalidMemory(
            "row", f"unknown field {', '.join(map(repr, unknown))}; a column mapping leaves it out"
        )
