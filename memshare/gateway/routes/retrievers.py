"""Generations over HTTP: what is there, what serves, roll back or forward."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse

from memshare.config import Config
from memshare.gateway.access import Caller
from memshare.gateway.errors import ApiError
from memshare.gateway.schemas import Activated, ErrorReply, Generations
from memshare.gateway.state import Gateway, ReadyGateway
from memshare.gateway.strict import StrictRoute
from memshare.retrieval.generation import generations
from memshare.retrieval.manifest import DamagedGeneration, Manifest, NoGeneration
from memshare.retrieval.publish import PublishError, activate
from memshare.retrieval.shelf import read_current

router = APIRouter(prefix="/v1/retrievers", route_class=StrictRoute, tags=["retrievers"])
Name = Annotated[str, Path(min_length=1, max_length=100)]
Number = Annotated[int, Path(ge=0, le=999_999)]
_ERRORS: dict[int | str, dict[str, Any]] = {
    403: {"model": ErrorReply, "description": "the key has no admin right on a pool"},
    404: {"model": ErrorReply},
    409: {"model": ErrorReply, "description": "the generation is damaged"},
}


def _known(gateway: Gateway, name: str) -> None:
    own = gateway.config.retriever.name
    if name != own:
        raise ApiError(404, f"no retriever {name!r} (there: {own})", param="name")


def _read(config: Config) -> tuple[list[Manifest], int | None, bool]:
    current, pinned = read_current(config.retriever_dir)
    return generations(config.retriever_dir), current, pinned


@router.get("/{name}/generations", response_model=Generations, responses=_ERRORS)
async def list_generations(name: Name, gateway: ReadyGateway, caller: Caller) -> JSONResponse:
    """The generations on disk, oldest first, and the one that answers right now.

    `positions` names the pools that the key may read.

    `serving` 0 is the untrained encoder of the configuration, before anything was published.
    """
    _known(gateway, name)
    try:
        manifests, current, pinned = await gateway.shared.read(_read, gateway.config)
    except DamagedGeneration as error:
        raise ApiError(409, str(error), code="damaged_generation") from error
    serving = gateway.shared.searcher.stats().generation
    rows = [
        {
            "number": manifest.number,
            "created_at": manifest.created_at,
            "parent": manifest.parent,
            "positions": {
                pool: seq for pool, seq in manifest.positions.items() if caller.may("read", pool)
            },
            "current": manifest.number == current,
            "serving": manifest.number == serving,
        }
        for manifest in manifests
    ]
    return JSONResponse(
        {
            "retriever": name,
            "serving": serving,
            "current": current,
            "pinned": pinned,
            "generations": rows,
        }
    )


@router.post("/{name}/generations/{number}/activate", response_model=Activated, responses=_ERRORS)
async def activate_generation(
    name: Name, number: Number, gateway: ReadyGateway, caller: Caller
) -> JSONResponse:
    """Roll back or forward: verify the generation, make it CURRENT and pin it there.

    Needs the admin right on every pool that the retriever serves.
    """
    _known(gateway, name)
    # Which they are is not told: the key may have no right on any.
    if not all(caller.may("admin", pool) for pool in gateway.config.served_pools):
        message = f"the admin right is needed on every pool that retriever {name!r} serves"
        raise ApiError(403, message, param="name", code="forbidden")
    try:
        await gateway.shared.write(activate, gateway.config.retriever_dir, number)
    except NoGeneration as error:
        raise ApiError(404, str(error), param="number", code="unknown_generation") from error
    except DamagedGeneration as error:
        raise ApiError(409, str(error), param="number", code="damaged_generation") from error
    except (PublishError, OSError) as error:  # such as a full disk, or a read-only one
        raise ApiError(503, str(error), param="number", code="current_not_written") from error
    return JSONResponse({"retriever": name, "current": number})
