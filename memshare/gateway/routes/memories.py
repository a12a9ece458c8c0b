"""Memories over HTTP: add, search, get, list, delete."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse

from memshare.gateway.errors import ApiError, error_body
from memshare.gateway.schemas import (
    AddMemories,
    AddResults,
    Deleted,
    ErrorReply,
    ItemResult,
    MemoryIn,
    MemoryOut,
    MemoryPage,
    Search,
    SearchFilter,
    SearchResults,
)
from memshare.gateway.state import LOCAL_AGENT, Gateway, ReadyGateway
from memshare.gateway.strict import StrictRoute
from memshare.pool.errors import InvalidMemory, PoolError
from memshare.pool.rows import read_cursor
from memshare.pool.validate import check_memory, check_text
from memshare.records import NewMemory
from memshare.retrieval.searcher import Filter
from memshare.sharing import Pair

router = APIRouter(prefix="/v1/memories", route_class=StrictRoute, tags=["memories"])
MemoryId = Annotated[str, Path(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorReply}}


@router.post(
    "",
    status_code=201,
    response_model=AddResults,
    responses={
        202: {"model": AddResults, "description": "a scorer decides first"},
        429: {"model": ErrorReply, "description": "the scoring queue is full"},
        **_NOT_FOUND,
    },
)
async def add(body: AddMemories, gateway: ReadyGateway) -> JSONResponse:
    """Store memories; answered once they are durable and searchable.

    201 with one result an item (`stored`, `duplicate`, or `rejected` with the reason); 422 if every
    item is rejected; 404 if a pool is unknown, with nothing stored. With `gateway.score_writes` on:
    202 and `pending`, and the scorer decides in the background.
    """
    for name in sorted({item.pool for item in body.items}):
        await gateway.shared.read(gateway.shared.store.pool, name)
    results, accepted = _check(body.items, gateway.config.gateway.max_text_chars)
    status = 201
    if not accepted:
        reasons = "; ".join(f"items.{i}: {r.reason}" for i, r in enumerate(results) if r)
        refusal = error_body(422, f"no item can be stored: {reasons[:2000]}", "items", "rejected")
        refusal["results"] = [result.model_dump() for result in results if result]
        return JSONResponse(refusal, status_code=422)
    if gateway.config.gateway.score_writes:
        status = 202
        taken = [_offer(gateway, memory) for _, memory in accepted]
        if not any(taken):
            raise ApiError(429, "the scoring queue is full; try again", code="queue_full")
        for (place, _), ok in zip(accepted, taken, strict=True):
            reason = None if ok else "scoring queue full"
            results[place] = ItemResult(
                id=None, status="pending" if ok else "rejected", reason=reason
            )
    else:
        stored = await gateway.shared.write(
            gateway.shared.append_visible, [memory for _, memory in accepted]
        )
        for (place, _), result in zip(accepted, stored, strict=True):
            results[place] = ItemResult(id=result.id, status=result.status)
    return JSONResponse(
        {"results": [result.model_dump() for result in results if result]}, status_code=status
    )


def _check(
    items: list[MemoryIn], max_chars: int
) -> tuple[list[ItemResult | None], list[tuple[int, NewMemory]]]:
    """Rejections by place (None: not yet decided), and what is acceptable, with places."""
    results: list[ItemResult | None] = []
    accepted: list[tuple[int, NewMemory]] = []
    for place, item in enumerate(items):
        memory = NewMemory(
            item.pool,
            item.prompt,
            item.answer,
            agent=LOCAL_AGENT,
            model=item.model,
            metadata=item.metadata,
        )
        try:
            accepted.append((place, check_memory(memory, max_chars)))
            results.append(None)
        except InvalidMemory as error:
            results.append(ItemResult(id=None, status="rejected", reason=str(error)))
    return results, accepted


def _offer(gateway: Gateway, memory: NewMemory) -> bool:
    return gateway.queue.offer(
        Pair(
            memory.pool,
            memory.prompt,
            memory.answer,
            agent=memory.agent,
            model=memory.model,
            metadata=memory.metadata,
        )
    )


@router.post("/search", response_model=SearchResults, responses=_NOT_FOUND)
async def search(body: Search, gateway: ReadyGateway) -> JSONResponse:
    """The `k` most useful memories for `query`, best first; all there are if the pool has fewer."""
    limits = gateway.config.gateway
    if body.k > limits.max_k:
        raise ApiError(422, f"k: at most {limits.max_k} allowed", param="k", code="k_too_large")
    check_text("query", body.query, limits.max_text_chars)
    await gateway.shared.read(gateway.shared.store.pool, body.pool)
    found = await gateway.shared.retrieve(
        body.pool, body.query, body.k, filter=_filter(body.filter) if body.filter else None
    )
    memories = [
        {**memory.wire(), "similarity": float(similarity)}
        for memory, similarity in zip(found.memories, found.similarities, strict=True)
    ]
    return JSONResponse({"generation": found.generation, "memories": memories})


def _filter(body: SearchFilter) -> Filter:
    try:
        return Filter(body.agent, body.created_after, body.created_before)
    except ValueError as error:
        raise ApiError(422, f"filter.{error}", param="filter", code="invalid_filter") from error


@router.get("", response_model=MemoryPage, responses=_NOT_FOUND)
async def page(
    gateway: ReadyGateway,
    pool: Annotated[str, Query(min_length=1, max_length=200)],
    cursor: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> JSONResponse:
    """One page of a pool, in the order of storing."""
    if cursor is not None:
        _check_cursor(cursor)
    memories, after = await gateway.shared.read(gateway.shared.store.list, pool, cursor, limit)
    return JSONResponse({"memories": [memory.wire() for memory in memories], "next_cursor": after})


def _check_cursor(cursor: str) -> None:
    try:
        usable = 0 <= read_cursor(cursor) < 2**63  # a database integer
    except PoolError:
        usable = False
    if not usable:
        message = f"cursor: {cursor!r} is none of ours; start again without one"
        raise ApiError(422, message, param="cursor", code="invalid_cursor")


@router.get("/{id}", response_model=MemoryOut, responses=_NOT_FOUND)
async def get(id: MemoryId, gateway: ReadyGateway) -> JSONResponse:
    """One memory."""
    memory = await gateway.shared.read(gateway.shared.store.get, id)
    if memory is None:
        raise _unknown(id)
    return JSONResponse(memory.wire())


@router.delete("/{id}", response_model=Deleted, responses=_NOT_FOUND)
async def delete(id: MemoryId, gateway: ReadyGateway) -> JSONResponse:
    """Erase one memory's text for good; no search finds it from now on."""
    shared = gateway.shared
    memory = await shared.read(shared.store.get, id)
    if memory is None or not await shared.write(shared.store.delete, id):
        raise _unknown(id)
    shared.searcher.notify(memory.pool)
    return JSONResponse({"id": id, "deleted": True})


def _unknown(id: str) -> ApiError:
    return ApiError(404, f"no memory {id!r}", param="id", code="unknown_memory")
