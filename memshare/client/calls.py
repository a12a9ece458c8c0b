"""Every call of the gateway as data: what is sent, and how the reply is read.

So the sync and the async client differ in nothing but how they send.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

from memshare.client.replies import (
    AddResult,
    ChatChunk,
    ChatReply,
    Found,
    Generation,
    Generations,
    Memory,
    Page,
    Standing,
)

T = TypeVar("T")
Messages = str | Sequence[Mapping[str, Any]]
Opinion = float | Literal["up", "down"]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request; ``read`` makes the result of the reply's JSON."""

    method: str
    path: str
    read: Callable[[Any], T]
    json: Mapping[str, Any] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)


def _take(kind: type[T], reply: Mapping[str, Any]) -> T:
    """``kind`` of the fields it knows: a newer gateway may send more."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in reply.items() if name in names})


def _memories(reply: Any) -> tuple[Memory, ...]:
    return tuple(_take(Memory, memory) for memory in reply["memories"])


def add(items: Sequence[Mapping[str, Any]], import_: bool) -> Call[tuple[AddResult, ...]]:
    """Add memories."""
    return Call(
        "POST",
        "/v1/memories",
        lambda reply: tuple(_take(AddResult, result) for result in reply["results"]),
        {"items": [dict(item) for item in items], **({"import": True} if import_ else {})},
    )


def search(pool: str, query: str, k: int, restrict: Mapping[str, Any]) -> Call[Found]:
    """Search a pool."""
    filter = {name: value for name, value in restrict.items() if value is not None}
    return Call(
        "POST",
        "/v1/memories/search",
        lambda reply: Found(reply["generation"], _memories(reply)),
        {"pool": pool, "query": query, "k": k, **({"filter": filter} if filter else {})},
    )


def get(id: str) -> Call[Memory]:
    """Read one memory."""
    return Call("GET", _memory(id), lambda reply: _take(Memory, reply))


def page(pool: str, cursor: str | None, limit: int) -> Call[Page]:
    """Read one page of a pool."""
    params = {"pool": pool, "limit": limit, **({"cursor": cursor} if cursor else {})}
    return Call(
        "GET",
        "/v1/memories",
        lambda reply: Page(_memories(reply), reply["next_cursor"]),
        params=params,
    )


def delete(id: str) -> Call[None]:
    """Erase one memory."""
    return Call("DELETE", _memory(id), lambda reply: None)


def feedback(id: str, value: Opinion, comment: str | None) -> Call[Standing]:
    """Give an opinion of a memory."""
    body = {"value": value, **({"comment": comment} if comment is not None else {})}
    return Call("POST", f"{_memory(id)}/feedback", lambda reply: _take(Standing, reply), body)


def generations(retriever: str) -> Call[Generations]:
    """Read a retriever's generations."""

    def read(reply: Any) -> Generations:
        rows = tuple(_take(Generation, row) for row in reply["generations"])
        return _take(Generations, {**reply, "generations": rows})

    return Call("GET", f"/v1/retrievers/{_quoted(retriever)}/generations", read)


def activate(retriever: str, number: int) -> Call[None]:
    """Roll a retriever back or forward."""
    path = f"/v1/retrievers/{_quoted(retriever)}/generations/{number}/activate"
    return Call("POST", path, lambda reply: None)


def chat(
    messages: Messages, options: Mapping[str, Any], stream: bool, **memory: Any
) -> Call[ChatReply]:
    """Answer with memories as examples. ``memory``: pool, shots, write; None is left out."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    asked = {name: value for name, value in memory.items() if value is not None}
    body: dict[str, Any] = {**options, "messages": list(messages)}
    if asked:
        body["memory"] = asked
    if stream:
        body["stream"] = True
    return Call("POST", "/v1/chat/completions", _reply, body)


def _reply(reply: Any) -> ChatReply:
    note = reply["memshare"]
    choice = next(choice for choice in reply["choices"] if choice.get("index", 0) == 0)
    return ChatReply(
        text=_text(choice["message"].get("content")),
        finish_reason=choice["finish_reason"],
        generation=note["generation"],
        memories=tuple(note["memories"]),
        write=note["write"],
        reason=note["reason"],
        raw=reply,
    )


def chunk(event: Mapping[str, Any]) -> ChatChunk:
    """One event of a stream."""
    choices = [item for item in event.get("choices") or () if item.get("index", 0) == 0]
    choice = choices[0] if choices else {}
    return ChatChunk(
        text=_text((choice.get("delta") or {}).get("content")),
        finish_reason=choice.get("finish_reason"),
        note=event.get("memshare"),
        raw=event,
    )


def _text(content: Any) -> str:
    """A content's text: some LLMs answer in parts, of which not every one is text."""
    if isinstance(content, str):
        return content
    parts = (part.get("text") for part in content or ())
    return "".join(text for text in parts if isinstance(text, str))


def _memory(id: str) -> str:
    return f"/v1/memories/{_quoted(id)}"


def _quoted(name: str) -> str:
    """``name`` as one part of a path; what isn't text can't name anything, and becomes "?"."""
    return quote(name, safe="", errors="replace")
