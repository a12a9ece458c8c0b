from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from memshare.config import LLMConfig
from memshare.llm.base import Chat, ContextTooLong, LLMError, LLMUnavailable
from memshare.llm.hf import TransformersBackend
from memshare.llm.hf_forward import cut_batches
from memshare.llm.hf_generate import Row
from memshare.llm.hf_worker import Worker
from memshare.llm.prompts import few_shot

WORDS = [
    "the",
    "cat",
    "sat",
    "by",
    "a",
    "sea",
    "in",
    "spring",
    "while",
    "洞庭",
    "rivers",
    "flow",
    "and",
    "poems",
    "grow",
]


def _text(rng: random.Random, most: int = 30) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def _model(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def test_batched_likelihoods_equal_plain_ones(
    backend: TransformersBackend, lm_folder: Path
) -> None:
    rng = random.Random(0)
    jobs = [
        (few_shot("", [(_text(rng), _text(rng))] * rng.randint(0, 2), _text(rng)), _text(rng))
        for _ in range(40)
    ]

    async def measure() -> list:
        return await asyncio.gather(*(backend.loglikelihood(*job) for job in jobs))

    model = _model(lm_folder)
    for job, got in zip(jobs, asyncio.run(measure()), strict=True):
        span = backend.chat_tokenizer.span(*job, 2048)
        with torch.no_grad():
            logs = model(torch.tensor([span.ids])).logits[0].log_softmax(-1)
        picks = range(span.start, len(span.ids))
        expected = sum(float(logs[i - 1, span.ids[i]]) for i in picks)
        assert got.tokens == len(picks)
        assert got.sum == pytest.approx(expected, abs=1e-3)


def test_labels_are_next_token_probabilities(backend: TransformersBackend, lm_folder: Path) -> None:
    labels = list("0123456789")
    contexts = [
        few_shot("", [], text) for text in ("how many", "count the poems in spring, please")
    ]

    async def ask() -> list:
        return await asyncio.gather(*(backend.label_probabilities(c, labels) for c in contexts))

    for context, got in zip(contexts, asyncio.run(ask()), strict=True):
        ids = backend.chat_tokenizer.prompt_ids(context)
        with torch.no_grad():
            last = _model(lm_folder)(torch.tensor([ids])).logits[0, -1]
        expected = last[backend.chat_tokenizer.label_ids(labels)[1]].softmax(-1)
        assert got == pytest.approx(expected.tolist(), abs=1e-5)
        assert sum(got) == pytest.approx(1.0)


def test_greedy_answers_equal_transformers_own(
    backend: TransformersBackend, lm_folder: Path
) -> None:
    prompts = [
        few_shot("", [], "a teapot"),
        few_shot("be brief", [("a", "b")], "the museum in Paris"),
    ]

    async def ask() -> list:
        return await asyncio.gather(*(backend.chat(Chat(p, max_tokens=12)) for p in prompts))

    model = _model(lm_folder)
    for prompt, got in zip(prompts, asyncio.run(ask()), strict=True):
        ids = backend.chat_tokenizer.prompt_ids(prompt)
        out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        assert got.text == backend.chat_tokenizer.decode(out[0, len(ids) :].tolist())
        assert got.prompt_tokens == len(ids)


def test_sampling_depends_on_the_seed_not_on_the_company(backend: TransformersBackend) -> None:
    def ask(seed: int, question: str = "spring"):
        prompt = few_shot("", [], question)
        return backend.chat(Chat(prompt, max_tokens=10, temperature=1.0, seed=seed))

    async def run() -> tuple:
        alone = (await ask(7)).text
        crowd = await asyncio.gather(*(ask(s, "x" * s) for s in range(5)), ask(7), ask(8))
        return alone, crowd[-2].text, crowd[-1].text

    alone, same, other = asyncio.run(run())
    assert alone == same
    assert alone != other


def test_sampled_frequencies_follow_the_model(
    backend: TransformersBackend, lm_folder: Path
) -> None:
    prompt = few_shot("", [], "sea")

    async def draw() -> list[str]:
        jobs = (
            backend.chat(Chat(prompt, max_tokens=1, temperature=0.5, seed=s)) for s in range(600)
        )
        return [completion.text for completion in await asyncio.gather(*jobs)]

    drawn = Counter(asyncio.run(draw()))
    with torch.no_grad():
        ids = torch.tensor([backend.chat_tokenizer.prompt_ids(prompt)])
        expected = (_model(lm_folder)(ids).logits[0, -1] / 0.5).softmax(-1)
    top = int(expected.argmax())
    share = drawn[backend.chat_tokenizer.decode([top])] / 600
    assert share == pytest.approx(float(expected[top]), abs=0.08)


def test_length_and_stop(backend: TransformersBackend) -> None:
    prompt = few_shot("", [], "the river")
    whole = asyncio.run(backend.chat(Chat(prompt, max_tokens=12)))
    assert whole.finish_reason == "length" and whole.completion_tokens == 12
    stop = whole.text[4:6]
    cut = asyncio.run(backend.chat(Chat(prompt, max_tokens=12, extra={"stop": [stop]})))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_end_token_stops_an_answer(lm_folder: Path) -> None:
    one = TransformersBackend(str(lm_folder))
    prompt = few_shot("", [], "the river")
    first = one.chat_tokenizer.encode(asyncio.run(one.chat(Chat(prompt, max_tokens=1))).text)
    model = one._worker._model
    end = int(model(torch.tensor([one.chat_tokenizer.prompt_ids(prompt)])).logits[0, -1].argmax())
    one._end_ids = frozenset({end})
    done = asyncio.run(one.chat(Chat(prompt, max_tokens=5)))
    assert first and (done.finish_reason, done.text, done.completion_tokens) == ("stop", "", 1)
    one.close()


def test_stream_gives_the_whole_answer_in_pieces(backend: TransformersBackend) -> None:
    prompt = few_shot("", [], "write verse")

    async def read(**kwargs) -> list:
        return [chunk async for chunk in backend.stream(Chat(prompt, max_tokens=16, **kwargs))]

    chunks = asyncio.run(read(extra={"stream_options": {"include_usage": True}}))
    whole = asyncio.run(backend.chat(Chat(prompt, max_tokens=16)))
    deltas = [c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]]
    assert "".join(deltas) == whole.text
    assert len([delta for delta in deltas if delta]) > 3
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 16
    stop = whole.text[5:7]
    stopped = asyncio.run(read(extra={"stop": stop}))
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in stopped)
    assert text == whole.text[: whole.text.index(stop)]


def test_a_reader_that_leaves_stops_the_generation(backend: TransformersBackend) -> None:
    async def run() -> int:
        stream = backend.stream(Chat(few_shot("", [], "go on"), max_tokens=1500))
        async for chunk in stream:
            if chunk["choices"][0]["delta"].get("content"):
                break
        await stream.aclose()
        return (await asyncio.wait_for(backend.chat(Chat(few_shot("", [], "x"), max_tokens=2)), 20)
                ).completion_tokens  # fmt: skip

    assert asyncio.run(run()) == 2


def test_a_chat_that_nobody_waits_for_stops(backend: TransformersBackend) -> None:
    begun, gone = threading.Event(), threading.Event()
    worker = backend._worker
    generated: list[Row] = []

    def rows(work: list[Row]) -> list[Row]:
        begun.set()
        gone.wait()
        generated.extend(work)
        return Worker._rows(worker, work)

    async def run() -> None:
        worker._rows = rows
        chat = asyncio.create_task(backend.chat(Chat(few_shot("", [], "go on"), max_tokens=1500)))
        await asyncio.to_thread(begun.wait)
        chat.cancel()
        await asyncio.wait([chat])
        del worker._rows
        gone.set()
        await backend.chat(
            Chat(few_shot("", [], "x"), max_tokens=2)
        )  # when the worker is free again

    asyncio.run(run())
    assert [row.count for row in generated] == [1]


def test_too_long_and_unsupported_requests_are_refused(backend: TransformersBackend) -> None:
    prompt = few_shot("", [], "x")
    with pytest.raises(ContextTooLong, match="2048"):
        asyncio.run(backend.chat(Chat(prompt, max_tokens=2048)))
    with pytest.raises(LLMError, match="tools"):
        asyncio.run(backend.chat(Chat(prompt, max_tokens=1, extra={"tools": [{}], "user": "u"})))
    with pytest.raises(LLMError, match=r"\bn\b"):
        asyncio.run(backend.chat(Chat(prompt, max_tokens=1, extra={"n": 2})))
    asyncio.run(backend.chat(Chat(prompt, max_tokens=1, extra={"user": "u", "n": 1, "top_p": 0.5})))


def test_an_error_reaches_its_caller_and_the_worker_lives_on(lm_folder: Path) -> None:
    one = TransformersBackend(str(lm_folder))
    forward = one._worker._model.forward
    one._worker._model.forward = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        asyncio.run(one.loglikelihood(few_shot("", [], "x"), "y"))

    def full(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    one._worker._model.forward = full
    with pytest.raises(LLMUnavailable, match="no memory left"):  # as the trainer beside it may go
        asyncio.run(one.loglikelihood(few_shot("", [], "x"), "y"))
    one._worker._model.forward = forward
    assert asyncio.run(one.loglikelihood(few_shot("", [], "x"), "y")).sum < 0
    asyncio.run(one.aclose())
    asyncio.run(one.aclose())
    with pytest.raises(LLMError, match="closed"):
        asyncio.run(one.loglikelihood(few_shot("", [], "x"), "y"))


def test_batches_hold_every_item_once_within_the_budget() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(2, 300) for _ in range(200)]
    read = [rng.randint(1, length - 1) for length in lengths]
    batches = cut_batches(lengths, read, 1000, 512)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 1000
    assert len(batches) < 60
    huge = cut_batches([100] * 8, [50] * 8, 10_000, 2**20)
    assert max(map(len, huge)) <= 2  # logits, not tokens, are what fills the memory here


def test_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(LLMError, match=str(tmp_path)):
        TransformersBackend(str(tmp_path), LLMConfig())
