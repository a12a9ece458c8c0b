"""The in-process backend: ``transformers`` behind one worker thread that batches what comes in."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from memshare.config import LLMConfig
from memshare.llm.base import Chat, Completion, ContextTooLong, LLMError, LogLikelihood, Message
from memshare.llm.factory import model_identity
from memshare.llm.hf_generate import Row, Sampling
from memshare.llm.hf_worker import Worker
from memshare.llm.tokens import ChatTokenizer
from memshare.loading import using_transformers

_NO_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "stream_options", "n", "logprobs"}
)


class TransformersBackend:
    """An LLM in this process. Follows `memshare.llm.base.LLM`.

    One thread owns the model. It takes whatever has queued up, sorts it by length and cuts it into
    batches: likelihoods by ``config.batch_tokens``, answers also by ``config.batch_size``. An
    answer depends only on its own prompt, temperature and seed, up to floating-point noise.

    ``json_schema`` is **not enforced**: this backend has no constrained decoding, so the caller
    must check the text (`memshare.llm.scorer` rejects what it can't read; label scoring needs no
    structure). Other fields that would change the answer but aren't supported raise `LLMError`.

    ``model`` is a resolved folder or hub name; raises `LLMError` if it can't be loaded.
    """

    def __init__(self, model: str, config: LLMConfig | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        config = config or LLMConfig()
        self.config = config
        self.chat_tokenizer = ChatTokenizer(model)
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype: Any = config.dtype
        if dtype == "auto" and device == "cpu":
            dtype = "float32"  # bfloat16 is slower there on most machines, and less exact
        try:
            with using_transformers():
                loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
            loaded = loaded.to(device).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise LLMError(f"{model}: the model can't be loaded: {error}") from error
        self.model = model_identity(model)
        tokenizer = self.chat_tokenizer.tokenizer
        limits = (
            getattr(loaded.config, "max_position_embeddings", None),
            tokenizer.model_max_length,
        )
        self._context_length = min((int(n) for n in limits if n and n < 10**9), default=2048)
        ends = loaded.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._end_ids = frozenset(i for i in [*ends, tokenizer.eos_token_id] if i is not None)
        pad_id = tokenizer.pad_token_id
        if pad_id is None:
            pad_id = min(self._end_ids, default=0)
        self._worker = Worker(loaded, model, pad_id, config.batch_tokens, config.batch_size)

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self._context_length

    async def ready(self) -> None:
        """The weights are loaded with the object; raises `LLMError` after ``aclose``."""
        if self._worker.closed:
            raise LLMError(f"{self.model}: the backend is closed")

    def count_tokens(
        self, messages: Sequence[Message], extra: Mapping[str, Any] | None = None
    ) -> int:
        """Tokens of the rendered prompt, generation header included."""
        return self.chat_tokenizer.count(messages, extra)

    async def chat(self, chat: Chat) -> Completion:
        """The whole answer; of ``extra``, ``top_p``, ``top_k`` and ``stop`` are understood."""
        row = self._row(chat)
        gone = threading.Event()
        row.cancelled = gone.is_set
        try:
            done: Row = await self._worker.submit(row)
        finally:  # cancelled: the generation need not go on
            gone.set()
        return Completion(done.text, done.finish or "stop", len(done.ids), done.count)

    async def stream(self, chat: Chat) -> AsyncIterator[Mapping[str, Any]]:
        """Yield OpenAI chunks while the text grows; closing the iterator stops the generation."""
        row = self._row(chat)
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        gone = threading.Event()
        row.cancelled = gone.is_set

        def emit(piece: str | None) -> None:
            # The loop may be closed already if the reader went away; then nobody waits for it.
            if not gone.is_set():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        row.emit = emit
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": self.model,
        }
        finished = asyncio.ensure_future(self._worker.submit(row))
        finished.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            yield {**head, "choices": [_choice({"role": "assistant", "content": ""}, None)]}
            while (piece := await pieces.get()) is not None:
                yield {**head, "choices": [_choice({"content": piece}, None)]}
            done: Row = await finished
            yield {**head, "choices": [_choice({}, done.finish)]}
            if (chat.extra.get("stream_options") or {}).get("include_usage"):
                usage = {
                    "prompt_tokens": len(done.ids),
                    "completion_tokens": done.count,
                    "total_tokens": len(done.ids) + done.count,
                }
                yield {**head, "choices": [], "usage": usage}
        finally:
            gone.set()
            finished.cancel()

    async def loglikelihood(self, context: Sequence[Message], continuation: str) -> LogLikelihood:
        """Log-likelihood of ``continuation`` (without end-of-turn) as the reply to ``context``."""
        span = self.chat_tokenizer.span(context, continuation, self.context_length)
        result: LogLikelihood = await self._worker.submit(span)
        return result

    async def label_probabilities(
        self, context: Sequence[Message], labels: Sequence[str]
    ) -> list[float]:
        """Probability of each label as the reply's first token, renormalised over ``labels``."""
        prefix, ids = self.chat_tokenizer.label_ids(labels)
        prompt = self.chat_tokenizer.prompt_ids(context) + prefix
        if len(prompt) + 1 > self.context_length:
            raise ContextTooLong(self.model, len(prompt) + 1, self.context_length)
        result: list[float] = await self._worker.submit((prompt, ids))
        return result

    async def aclose(self) -> None:
        """Finish what is queued, stop the thread and drop the weights."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """The same, blocking."""
        self._worker.close()

    def _row(self, chat: Chat) -> Row:
        given = {key: value for key, value in chat.extra.items() if value is not None}
        stop = given.pop("stop", ())
        sampling = Sampling(
            max_tokens=chat.max_tokens,
            temperature=chat.temperature,
            seed=chat.seed,
            top_p=float(given.pop("top_p", 1.0)),
            top_k=int(given.pop("top_k", 0)),
            stop=tuple(s for s in ((stop,) if isinstance(stop, str) else stop) if s),
        )
        unknown = given.keys() - _NO_EFFECT
        unknown |= {key for key, least in (("n", 1), ("logprobs", 0)) if given.get(key, 0) > least}
        if unknown:
            raise LLMError(
                f"the transformers backend doesn't support {', '.join(sorted(unknown))}; "
                "use backend vllm"
            )
        ids = self.chat_tokenizer.prompt_ids(chat.messages)
        if len(ids) + chat.max_tokens > self.context_length:
            raise ContextTooLong(self.model, len(ids) + chat.max_tokens, self.context_length)
        return Row(ids, sampling, self.chat_tokenizer.decode, self._end_ids)


def _choice(delta: dict[str, str], finish: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
