"""Structured replies: a JSON object of bounded integers, asked for and read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from memshare.llm.base import LLM, Chat, Message


def integer_schema(fields: Mapping[str, int]) -> dict[str, Any]:
    """JSON schema of an object with one integer a field, each from 0 to its given maximum."""
    return {
        "type": "object",
        "properties": {
            name: {"type": "integer", "minimum": 0, "maximum": most}
            for name, most in fields.items()
        },
        "required": list(fields),
        "additionalProperties": False,
    }


async def read_integers(
    llm: LLM, messages: Sequence[Message], fields: Mapping[str, int], max_tokens: int
) -> dict[str, int] | str:
    """Ask for ``fields`` (name to maximum); the values, or why the reply is unusable."""
    schema = integer_schema(fields)
    completion = await llm.chat(Chat(messages, max_tokens, json_schema=schema))
    if completion.finish_reason != "stop":
        return f"the reply ended by {completion.finish_reason}, not by itself"
    return parse_integers(completion.text, fields)


def parse_integers(text: str, fields: Mapping[str, int]) -> dict[str, int] | str:
    """Exactly ``fields`` with integers in range, or what is wrong with ``text``.

    Nothing else is accepted: no prose around the object, no further or repeated field, no number
    in quotes. Whatever a judged text has smuggled into the reply is refused with the reply.
    """
    try:
        value = json.loads(text, object_pairs_hook=_pairs, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return f"not the JSON asked for: {error}"
    if not isinstance(value, dict) or value.keys() != fields.keys():
        return f"not the fields asked for ({', '.join(fields)})"
    for name, most in fields.items():
        number = value[name]
        if type(number) is not int or not 0 <= number <= most:
            return f"{name} is no integer from 0 to {most}"
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a field stands there twice")
    return dict(pairs)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")
