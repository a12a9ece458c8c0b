"""Bodies of requests and replies. The OpenAPI page at /openapi.json is made from these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
)

PoolName = Annotated[StrictStr, Field(min_length=1, max_length=200)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


# Of a list only the first fault is told. All of them, of a body full of them, would take the event
# loop seconds, and much memory. (A list of items has an end, and fails at that first of all.)
First = Field(fail_fast=True)


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > 16:  # pydantic looks at each before it counts them
        raise ValueError("at most 16 keys allowed")
    return value


class Body(BaseModel):
    """A request body that refuses fields it doesn't know."""

    model_config = ConfigDict(extra="forbid")


class MemoryIn(Body):
    """One memory to add.

    Provenance isn't the client's to claim: `id`, `score`, `agent` and `created_at` are ignored,
    except in an admin's import; what replies have besides, always.
    """

    pool: PoolName
    prompt: StrictStr
    answer: StrictStr
    model: StrictStr | None = Field(default=None, max_length=256)
    metadata: dict[str, Any] = Field(default_factory=dict)
    id: Any = Field(default=None, description="ignored but in an import")
    score: Any = Field(default=None, description="ignored but in an import")
    agent: Any = Field(default=None, description="ignored but in an import")
    created_at: Any = Field(default=None, description="ignored but in an import")
    similarity: Any = Field(default=None, description="ignored")
    standing: Any = Field(default=None, description="ignored")
    votes: Any = Field(default=None, description="ignored")
    hold_reason: Any = Field(default=None, description="ignored")


class AddMemories(Body):
    """Memories to add, stored in this order.

    `import` takes over their provenance and grades nothing: it needs the admin right on each pool.
    """

    import_: StrictBool = Field(default=False, alias="import")
    items: list[MemoryIn] = Field(min_length=1, max_length=1000)


class ItemResult(BaseModel):
    """What became of one item; a duplicate names the memory that was there first."""

    id: str | None
    status: Literal["stored", "duplicate", "held", "rejected", "pending"]
    reason: str | None = None


class AddResults(BaseModel):
    """One result an item, in the order of the items."""

    results: list[ItemResult]


class SearchFilter(Body):
    """Narrows a search: by the agent that wrote a memory, by time (ISO 8601), by metadata.

    A memory passes if its metadata has every key with that value, or with a list that holds it.
    """

    agent: StrictStr | None = Field(default=None, max_length=200)
    created_after: StrictStr | None = Field(default=None, max_length=64)
    created_before: StrictStr | None = Field(default=None, max_length=64)
    metadata: Annotated[
        dict[str, StrictBool | StrictInt | Number | StrictStr], BeforeValidator(_few)
    ] = Field(default_factory=dict, max_length=16)


class Search(Body):
    """A search for the ``k`` most useful memories of one pool."""

    pool: PoolName
    query: StrictStr = Field(min_length=1)
    k: Annotated[StrictInt, Field(ge=1)] = 3
    filter: SearchFilter | None = None


class FeedbackIn(Body):
    """An opinion of a memory: `up`, `down`, or anything between 1 and -1."""

    value: Annotated[Number, Field(ge=-1.0, le=1.0)] | Literal["up", "down"]
    comment: StrictStr | None = Field(default=None, min_length=1, max_length=2000)


class FeedbackReply(BaseModel):
    """The memory's standing with this opinion in it."""

    id: str
    standing: float
    votes: int


class MemoryOut(BaseModel):
    """A memory on the wire.

    `standing`, from -1 to 1, sums up the feedback of `votes` principals; 0 without any.
    """

    id: str
    pool: str
    prompt: str
    answer: str
    score: float | None
    agent: str | None
    model: str | None
    created_at: str
    metadata: dict[str, Any]
    standing: float
    votes: int


class FoundMemory(MemoryOut):
    """A search result: the memory and the cosine of its vector and the query's."""

    similarity: float


class SearchResults(BaseModel):
    """Best first, all of them found by one generation."""

    generation: int
    memories: list[FoundMemory]


class PagedMemory(MemoryOut):
    """A memory in a page; with ``hold_reason`` in a page of those on hold."""

    hold_reason: str | None = None


class Hold(Body):
    """Takes a memory out of retrieval and training until it is released."""

    reason: StrictStr | None = Field(default=None, min_length=1, max_length=500)


class HoldReply(BaseModel):
    """Whether a memory is on hold now."""

    id: str
    held: bool


class MemoryPage(BaseModel):
    """One page of a pool in the order of storing; ``next_cursor`` null at the end."""

    memories: list[PagedMemory]
    next_cursor: str | None


class Deleted(BaseModel):
    """A deleted memory."""

    id: str
    deleted: Literal[True] = True


class GenerationOut(BaseModel):
    """One generation on disk; ``serving`` is what the searcher answers with right now."""

    number: int
    created_at: str
    parent: int | None
    positions: dict[str, int]
    current: bool
    serving: bool


class Generations(BaseModel):
    """A retriever's generations, oldest first; a ``pinned`` CURRENT holds publishers off."""

    retriever: str
    serving: int
    current: int | None
    pinned: bool
    generations: list[GenerationOut]


class Activated(BaseModel):
    """CURRENT was moved and pinned; the searcher swaps within its polling time."""

    retriever: str
    current: int


class ChatMessage(BaseModel):
    """One OpenAI chat message; what isn't named here is passed on unchanged."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | Annotated[list[dict[str, Any]], First] | None = None


class MemoryOptions(Body):
    """How memory takes part in one chat completion.

    ``pool`` defaults to `gateway.default_pool` (or the only pool), ``shots`` to `agent.shots`.
    ``{"shots": 0, "write": false}`` makes the gateway a plain proxy.
    """

    pool: PoolName | None = None
    shots: Annotated[StrictInt, Field(ge=0, le=64)] | None = None
    write: StrictBool = True


class ChatRequest(BaseModel):
    """An OpenAI chat completion with memory; unknown fields go to the LLM unchanged."""

    model_config = ConfigDict(extra="allow")

    messages: Annotated[list[ChatMessage], First] = Field(min_length=1)
    model: StrictStr | None = Field(
        default=None, description="ignored: the gateway's agent LLM answers and names itself"
    )
    memory: MemoryOptions | None = None
    stream: StrictBool | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[Number, Field(ge=0.0, le=2.0)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    # Passed on like unknown fields; named here because every backend relies on their types.
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=1_000_000)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], First] | None = None
    logprobs: StrictBool | None = None
    stream_options: dict[str, Any] | None = None

    def passed_on(self) -> dict[str, Any]:
        """What goes to the LLM unchanged: everything sent that isn't the gateway's own."""
        sent = {name: getattr(self, name) for name in self.model_fields_set & _PASSED_ON}
        return {**sent, **(self.model_extra or {})}


_PASSED_ON = {"n", "top_p", "top_k", "stop", "logprobs", "stream_options"}


class MemshareNote(BaseModel):
    """What memory did for one answer: ``memories`` are the shots shown, best first.

    ``write``: ``pending`` is graded and stored in the background, ``off`` wasn't asked for (or
    can't be: the reason follows). In a stream this is part of the first chunk; ``write`` then says
    ``pending`` for what will be tried.
    """

    generation: int | None
    memories: list[str]
    write: Literal["pending", "off"]
    reason: str | None = None


class ChatReply(BaseModel):
    """OpenAI's chat completion, and ``memshare``."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any] | None = None
    memshare: MemshareNote


class ErrorDetail(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every 4xx and 5xx."""

    error: ErrorDetail
