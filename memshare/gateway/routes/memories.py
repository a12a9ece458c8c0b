"""Memories over HTTP: add, search, get, list, delete, and feedback on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse

from memshare.gateway.access import Caller, known_pool, need
from memshare.gateway.errors import ApiError, error_body
from memshare.gateway.schemas import (
    AddMemories,
    AddResults,
    Deleted,
    ErrorReply,
    FeedbackIn,
    FeedbackReply,
    Hold,
    HoldReply,
    ItemResult,
    MemoryOut,
    MemoryPage,
    Search,
    SearchFilter,
    SearchResults,
)
from memshare.gateway.state import Gateway, ReadyGateway
from memshare.gateway.strict import StrictRoute
from memshare.gateway.write import check_room
from memshare.pool.errors import InvalidMemory, PoolError
from memshare.pool.feedback import NO_STANDING, Standing
from memshare.pool.keys import LOCAL, Key
from memshare.pool.rows import read_cursor
from memshare.pool.validate import check_memory, check_text
from memshare.records import Memory, NewMemory, Pair
from memshare.retrieval.filters import Filter, terms_of

router = APIRouter(prefix="/v1/memories", route_class=StrictRoute, tags=["memories"])
MemoryId = Annotated[str, Path(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
_NOT_FOUND: dict[int | str, dict[str, Any]] = {
    403: {"model": ErrorReply, "description": "the key has no right to that"},
    404: {"model": ErrorReply, "description": "there is none, or none that the key may read"},
}


@router.post(
    "",
    status_code=201,
    response_model=AddResults,
    responses={
        202: {"model": AddResults, "description": "a scorer decides first"},
        **_NOT_FOUND,
    },
)
async def add(body: AddMemories, gateway: ReadyGateway, caller: Caller) -> JSONResponse:
    """Store memories; answered once they are durable and searchable.

    201 with one result an item (`stored`, `duplicate`, `held` for a review, or `rejected`, the last
    two with the reason); 422 if every item is rejected; 404 if a pool is unknown, with nothing
    stored. With `gateway.score_writes` on: 202 and `pending`, and the scorer decides in the
    background; 429 if it is too far behind.
    """
    for name in sorted({item.pool for item in body.items}):
        await known_pool(gateway.shared, caller, name, "admin" if body.import_ else "write")
    scored = gateway.config.gateway.score_writes and not body.import_
    if scored:
        await check_room(gateway)
    results, accepted = _check(body, caller, gateway.config.gateway.max_text_chars)
    status = 201
    if not accepted:
        return _refusal(results)
    if scored:
        status = 202
        await gateway.queue.put([_pair(memory) for _, memory in accepted])
        for place, _ in accepted:
            results[place] = ItemResult(id=None, status="pending")
    else:
        stored = await gateway.shared.append([memory for _, memory in accepted], body.import_)
        for (place, memory), result in zip(accepted, stored, strict=True):
            # A duplicate's id is another's memory, which not everybody who writes may know.
            own = result.status in ("stored", "held")
            known = result.id and (own or caller.may("read", memory.pool))
            results[place] = ItemResult(
                id=result.id if known else None,
                status=result.status,
                reason=result.reason or None,
            )
        if all(result.status == "rejected" for result in stored):
            return _refusal(results)
    return JSONResponse(
        {"results": [result.model_dump() for result in results if result]}, status_code=status
    )


def _refusal(results: Sequence[ItemResult | None]) -> JSONResponse:
    reasons = "; ".join(f"items.{i}: {r.reason}" for i, r in enumerate(results) if r)
    refusal = error_body(422, f"no item can be stored: {reasons[:2000]}", "items", "rejected")
    refusal["results"] = [result.model_dump() for result in results if result]
    return JSONResponse(refusal, status_code=422)


def _check(
    body: AddMemories, caller: Key, max_chars: int
) -> tuple[list[ItemResult | None], list[tuple[int, NewMemory]]]:
    """Rejections by place (None: not yet decided), and what is acceptable, with places."""
    results: list[ItemResult | None] = []
    accepted: list[tuple[int, NewMemory]] = []
    for place, item in enumerate(body.items):
        memory = NewMemory(
            item.pool,
            item.prompt,
            item.answer,
            agent=caller.principal,
            model=item.model,
            metadata=item.metadata,
        )
        if body.import_:
            memory = replace(
                memory,
                id=item.id,
                score=item.score,
                agent=item.agent,
                created_at=item.created_at,
            )
        try:
            accepted.append((place, check_memory(memory, max_chars)))
            results.append(None)
        except InvalidMemory as error:
            results.append(ItemResult(id=None, status="rejected", reason=str(error)))
    return results, accepted


def _pair(memory: NewMemory) -> Pair:
    return Pair(
        memory.pool,
        memory.prompt,
        memory.answer,
        agent=memory.agent,
        model=memory.model,
        metadata=memory.metadata,
    )


@router.post("/search", response_model=SearchResults, responses=_NOT_FOUND)
async def search(body: Search, gateway: ReadyGateway, caller: Caller) -> JSONResponse:
    """The `k` most useful memories for `query`, best first; all there are if the pool has fewer."""
    await known_pool(gateway.shared, caller, body.pool, "read")
    limits = gateway.config.gateway
    if body.k > limits.max_k:
        raise ApiError(422, f"k: at most {limits.max_k} allowed", param="k", code="k_too_large")
    check_text("query", body.query, limits.max_text_chars)
    found = await gateway.shared.retrieve(
        body.pool,
        body.query,
        body.k,
        filter=_filter(body.filter) if body.filter else None,
        standings=True,
    )
    shown = _wire(found.memories, found.standings)
    memories = [
        {**memory, "similarity": float(similarity)}
        for memory, similarity in zip(shown, found.similarities, strict=True)
    ]
    return JSONResponse({"generation": found.generation, "memories": memories})


def _filter(body: SearchFilter) -> Filter:
    try:
        return Filter(
            body.agent, body.created_after, body.created_before, terms=terms_of(body.metadata)
        )
    except ValueError as error:
        raise ApiError(422, f"filter.{error}", param="filter", code="invalid_filter") from error


@router.get("", response_model=MemoryPage, responses=_NOT_FOUND)
async def page(
    gateway: ReadyGateway,
    caller: Caller,
    pool: Annotated[str, Query(min_length=1, max_length=200)],
    cursor: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    held: bool = False,
) -> JSONResponse:
    """One page of a pool, in the order of storing; `held`: of its memories on hold, for admins."""
    await known_pool(gateway.shared, caller, pool, "admin" if held else "read")
    if cursor is not None:
        _check_cursor(cursor)
    store = gateway.shared.store
    memories, after = await gateway.shared.read(store.list, pool, cursor, limit, held)
    shown = await _shown(gateway, memories)
    if held:
        for memory, row in zip(memories, shown, strict=True):
            row["hold_reason"] = memory.hold_reason
    return JSONResponse({"memories": shown, "next_cursor": after})


def _check_cursor(cursor: str) -> None:
    try:
        usable = 0 <= read_cursor(cursor) < 2**63  # a database integer
    except PoolError:
        usable = False
    if not usable:
        message = f"cursor: {cursor!r} is none of ours; start again without one"
        raise ApiError(422, message, param="cursor", code="invalid_cursor")


@router.get("/{id}", response_model=MemoryOut, responses=_NOT_FOUND)
async def get(id: MemoryId, gateway: ReadyGateway, caller: Caller) -> JSONResponse:
    """One memory."""
    (memory,) = await _shown(gateway, [await _readable(gateway, caller, id)])
    return JSONResponse(memory)


@router.delete("/{id}", response_model=Deleted, responses=_NOT_FOUND)
async def delete(id: MemoryId, gateway: ReadyGateway, caller: Caller) -> JSONResponse:
    """Erase one memory's text for good; no search finds it from now on.

    Needs the admin right on its pool, or, for what the key's principal wrote, the write right.
    """
    shared = gateway.shared
    memory = await _readable(gateway, caller, id)
    need(caller, "write" if memory.agent == caller.principal else "admin", memory.pool, "id")
    if not await shared.write(shared.store.delete, id):
        raise _unknown(id)
    shared.searcher.notify(memory.pool)
    return JSONResponse({"id": id, "deleted": True})


@router.post("/{id}/hold", response_model=HoldReply, responses=_NOT_FOUND)
async def hold(id: MemoryId, body: Hold, gateway: ReadyGateway, caller: Caller) -> JSONResponse:
    """Take a memory out of retrieval and training, for a review. Needs the admin right.

    Nothing changes where it is on hold already.
    """
    shared = gateway.shared
    memory = await _readable(gateway, caller, id)
    need(caller, "admin", memory.pool, "id")
    await shared.write(shared.store.hold, id, body.reason)
    shared.searcher.notify(memory.pool)
    return JSONResponse({"id": id, "held": True})


@router.post("/{id}/release", response_model=HoldReply, responses=_NOT_FOUND)
async def release(id: MemoryId, gateway: ReadyGateway, caller: Caller) -> JSONResponse:
    """End the hold on a memory. Needs the admin right on its pool."""
    shared = gateway.shared
    memory = await _readable(gateway, caller, id)
    need(caller, "admin", memory.pool, "id")
    await shared.write(shared.store.release, id)
    shared.searcher.notify(memory.pool)
    return JSONResponse({"id": id, "held": False})


@router.post("/{id}/feedback", response_model=FeedbackReply, responses=_NOT_FOUND)
async def give_feedback(
    id: MemoryId, body: FeedbackIn, gateway: ReadyGateway, caller: Caller
) -> JSONResponse:
    """Say how useful a memory is, from -1 to 1 (`down` and `up` are its ends).

    One opinion a principal and memory: a later one replaces it. A memory whose standing sinks below
    `hold_below` of its pool is put on hold. Needs the read and write rights, and is not for one's
    own memories.
    """
    memory = await _readable(gateway, caller, id)
    need(caller, "write", memory.pool, "id")
    # `local` is whoever has no key: nobody can tell whether it was the same one.
    if memory.agent == caller.principal != LOCAL:
        message = f"{caller.principal} wrote this memory, and can't judge it"
        raise ApiError(403, message, param="id", code="own_memory")
    value = {"up": 1.0, "down": -1.0}[body.value] if isinstance(body.value, str) else body.value
    standing = await gateway.shared.write(
        gateway.shared.feedback.give, id, caller.principal, value, body.comment
    )
    if standing is None:
        raise _unknown(id)
    shared = gateway.shared
    if reason := shared.writer.guard.sunk(memory.pool, standing):
        await shared.write(shared.store.hold, id, reason)
        shared.searcher.notify(memory.pool)
    sign = "up" if value > 0 else "down" if value < 0 else "neutral"
    gateway.metrics.feedback.labels(memory.pool, sign).inc()
    return JSONResponse({"id": id, "standing": standing.value, "votes": standing.votes})


async def _shown(gateway: Gateway, memories: Sequence[Memory]) -> list[dict[str, Any]]:
    """Memories on the wire, with their standings as of now."""
    shared, ids = gateway.shared, [memory.id for memory in memories]
    return _wire(memories, await shared.read(shared.feedback.standings, ids))


def _wire(memories: Sequence[Memory], standings: Mapping[str, Standing]) -> list[dict[str, Any]]:
    shown = []
    for memory in memories:
        standing = standings.get(memory.id, NO_STANDING)
        shown.append({**memory.wire(), "standing": standing.value, "votes": standing.votes})
    return shown


async def _readable(gateway: Gateway, caller: Key, id: str) -> Memory:
    """The memory; 404 if there is none, or none that ``caller`` may read.

    One on hold is there for its author and for admins alone.
    """
    memory = await gateway.shared.read(gateway.shared.store.get, id)
    if memory is None or not caller.may("read", memory.pool):
        raise _unknown(id)
    if memory.held and memory.agent != caller.principal and not caller.may("admin", memory.pool):
        raise _unknown(id)
    return memory


def _unknown(id: str) -> ApiError:
    return ApiError(404, f"no memory {id!r}", param="id", code="unknown_memory")
