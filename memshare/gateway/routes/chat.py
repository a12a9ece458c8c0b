"""OpenAI's chat completions, with memory."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from memshare.gateway.access import Caller, known_pool
from memshare.gateway.disconnect import while_connected
from memshare.gateway.errors import ApiError
from memshare.gateway.prompt import Question, answer_of, compose, question_of
from memshare.gateway.schemas import ChatReply, ChatRequest, ErrorReply, MemoryOptions
from memshare.gateway.state import Gateway, ReadyGateway
from memshare.gateway.stream import events
from memshare.gateway.strict import StrictRoute
from memshare.gateway.wire import Json
from memshare.gateway.write import check_room, submit
from memshare.llm.base import Chat, Completion
from memshare.pool.keys import Key, Right
from memshare.records import Pair
from memshare.sharing import Retrieved

router = APIRouter(route_class=StrictRoute, tags=["chat"])


@router.get("/v1/models")
async def models(gateway: ReadyGateway, _: Caller) -> JSONResponse:
    """The one model that answers here: the agent LLM."""
    model = {"id": gateway.shared.agent.llm.model, "object": "model", "owned_by": "memshare"}
    return JSONResponse({"object": "list", "data": [{**model, "created": 0}]})


@router.post(
    "/v1/chat/completions",
    response_model=ChatReply,
    responses={
        200: {"content": {"text/event-stream": {}}},
        403: {"model": ErrorReply, "description": "no right on the pool"},
        404: {"model": ErrorReply, "description": "no such pool"},
    },
)
async def chat(
    body: ChatRequest, request: Request, gateway: ReadyGateway, caller: Caller
) -> JSONResponse | StreamingResponse:
    """Answer with the most useful memories as examples; grade and store the pair afterwards.

    The last user message is the question. `memshare` in the reply (in a stream: in the first
    chunk) names the generation that searched and the memories that were shown. Only the first of
    `n` choices is stored, and none with tool calls. If the client goes away before its answer is
    there, the LLM's work is given up and nothing is stored.
    """
    shared = gateway.shared
    options = body.memory or MemoryOptions()
    question = question_of(body.messages)
    shots = shared.config.agent.shots if options.shots is None else options.shots
    pool = _pool_name(gateway, options) if shots or options.write else ""
    refusal = _no_write(options, question, caller, pool)
    wanted: dict[Right, bool] = {"read": shots > 0, "write": refusal is None}
    # Of a pool that nothing is wanted of, not even whether it is there is told.
    if rights := [right for right, is_wanted in wanted.items() if is_wanted]:
        await known_pool(shared, caller, pool, *rights, param="memory.pool")
    if not refusal:
        await check_room(gateway)
    found = Retrieved(None, (), ())
    if shots and question.text.strip():
        limit = shared.config.gateway.max_text_chars
        found = await shared.retrieve(pool, question.text[:limit], shots)
    agent = shared.config.agent
    max_tokens = body.max_completion_tokens or body.max_tokens or agent.max_tokens
    llm = shared.agent.llm
    await llm.ready()
    extra = body.passed_on()
    parts = (llm, body.messages, found.memories, agent.instruction, max_tokens, extra)
    with shared.stage("prompt"):
        # Only where shots are to fit are there tokens to count, which takes a thread.
        messages, kept = await shared.read(compose, *parts) if found.memories else compose(*parts)
    note: dict[str, Any] = {
        "generation": found.generation,
        "memories": [memory.id for memory in kept],
        "write": "pending",
        "reason": None,
    }
    if refusal:
        note |= {"write": "off", "reason": refusal}
    temperature = agent.temperature if body.temperature is None else body.temperature
    pair = Pair(pool, question.text, "", agent=caller.principal, model=llm.model) if pool else None
    asked = Chat(messages, max_tokens, temperature, body.seed, extra=extra)
    if body.stream:
        chunks = llm.stream(asked)
        return await events(gateway, request, chunks, note, None if refusal else pair, kept)
    with shared.stage("llm"):
        completion = await while_connected(request, llm.chat(asked))
    reply = _reply(completion, llm.model)
    if pair and not refusal:
        note |= await submit(gateway, pair, kept, *answer_of(reply))
    return Json({**reply, "memshare": note})


def _pool_name(gateway: Gateway, options: MemoryOptions) -> str:
    config = gateway.config
    name = options.pool or config.gateway.default_pool
    if name is None and len(config.pools) == 1:
        (name,) = config.pools
    if name is None:
        raise ApiError(
            422,
            'memory.pool: name one (or send "memory": {"shots": 0, "write": false})',
            param="memory.pool",
            code="no_pool",
        )
    return name


def _no_write(options: MemoryOptions, question: Question, caller: Key, pool: str) -> str | None:
    """Why nothing will be stored, as far as question and key decide it.

    A key that can't write, and doesn't ask for it in so many words, just gets its answer.
    """
    if not options.write:
        return "not asked for"
    if "write" not in options.model_fields_set and not caller.may("write", pool):
        return "this key may not write to the pool"
    if not question.plain:
        return "the question is not plain text"
    return None if question.text.strip() else "the question is empty"


def _reply(completion: Completion, model: str) -> dict[str, Any]:
    """The backend's own reply, or one in the same form from a backend that has none."""
    if completion.raw.get("choices"):
        return dict(completion.raw)
    message = {"role": "assistant", "content": completion.text}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": completion.finish_reason}],
        "usage": {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
            "total_tokens": completion.prompt_tokens + completion.completion_tokens,
        },
    }
