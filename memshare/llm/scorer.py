"""Scorers: what decides whether a pair becomes a memory. Three kinds behind one interface.

Every scorer rejects an empty answer and one that repeats the question. An unusable verdict is
``Grade(None, reason)``, which always rejects; nothing ever defaults to a number.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from memshare.config import ScorerConfig
from memshare.llm.base import LLM, ContextTooLong, LLMError, Message
from memshare.llm.labels import expected_fraction
from memshare.llm.prompts import few_shot
from memshare.llm.quoting import quote, warning, without_hidden
from memshare.llm.rubric import criteria
from memshare.llm.structured import read_integers
from memshare.records import Grade, normalise


class Scorer(ABC):
    """Grades a pair 0-100. May be called concurrently."""

    async def grade(self, prompt: str, answer: str, rubric_text: str) -> Grade:
        """The verdict on ``answer`` to ``prompt``; only the rubric scorer reads ``rubric_text``.

        Raises `LLMUnavailable` when the scorer LLM can't be asked now: that is no verdict.
        """
        if not normalise(without_hidden(answer)):
            return Grade(None, "the answer is empty")
        if normalise(answer) == normalise(prompt):
            return Grade(None, "the answer repeats the question")
        try:
            grade = await self._grade(prompt, answer, rubric_text)
        except ContextTooLong as error:
            return Grade(None, f"too long to grade: {error}")
        if grade.value is not None and not 0 <= grade.value <= 100:  # nor is NaN
            return Grade(None, f"the grade, {grade.value}, is no number from 0 to 100")
        return grade

    @abstractmethod
    async def _grade(self, prompt: str, answer: str, rubric_text: str) -> Grade: ...


_ROLE = (
    "You are a strict examiner. You grade one answer to one question by the rubric below, and only "
    "by what the answer says."
)


class RubricScorer(Scorer):
    """An LLM grades against the pool's rubric.

    ``grading`` structured: the LLM fills in points for every criterion of the rubric (a JSON
    schema enforced by vLLM), added up here. ``labels``: the expected value over ten digits, which
    works with every backend. The pair is quoted data (see `quoting`).
    """

    def __init__(self, llm: LLM, config: ScorerConfig) -> None:
        self.llm = llm
        self.config = config

    async def _grade(self, prompt: str, answer: str, rubric_text: str) -> Grade:
        await self.llm.ready()
        points = criteria(rubric_text)
        structured = self.config.grading == "structured"
        messages = rubric_messages(prompt, answer, rubric_text, points if structured else None)
        room = self.config.max_tokens if structured else 1
        needed = self.llm.count_tokens(messages) + room
        if needed > self.llm.context_length:
            raise ContextTooLong(self.llm.model, needed, self.llm.context_length)
        if not structured:
            return Grade(100 * await expected_fraction(self.llm, messages), "rubric, by labels")
        values = await read_integers(self.llm, messages, points, self.config.max_tokens)
        if isinstance(values, str):
            return Grade(None, f"unreadable grade: {values}")
        return Grade(
            float(sum(values.values())),
            ", ".join(f"{k} {v}/{points[k]}" for k, v in values.items()),
        )


def rubric_messages(
    prompt: str, answer: str, rubric_text: str, points: Mapping[str, int] | None
) -> list[Message]:
    """The grading prompt; ``points`` asks for them as JSON, None asks for one digit."""
    code, block = quote({"question": prompt, "answer": answer})
    if points is None:
        form = "Reply with one digit, the whole grade: 0 for worthless, 9 for full marks."
    else:
        shape = json.dumps({name: f"0 to {most}" for name, most in points.items()})
        form = f"Reply with JSON only, one integer for each criterion: {shape}"
    return [
        {"role": "system", "content": f"{_ROLE}\n\n{rubric_text.strip()}\n\n{warning(code)}"},
        {"role": "user", "content": f"{block}\n\n{form}"},
    ]


class LikelihoodScorer(Scorer):
    """How natural the scorer LLM finds the answer: 100 * exp(l / likelihood_scale), clipped.

    l is the mean log-likelihood (nats per token) of the answer after the bare question, so 0 nats
    give 100 and ``-likelihood_scale`` nats give 36.8. What can't be seen and what was said before
    is easy to predict, so the answer is judged without it (`said_once`).
    """

    def __init__(self, llm: LLM, config: ScorerConfig) -> None:
        self.llm = llm
        self.config = config

    async def _grade(self, prompt: str, answer: str, rubric_text: str) -> Grade:
        mean = (await self.llm.loglikelihood(few_shot("", (), prompt), said_once(answer))).mean
        if not math.isfinite(mean):
            return Grade(None, "the likelihood is not finite")
        value = 100 * math.exp(min(0.0, mean) / self.config.likelihood_scale)
        return Grade(value, f"{mean:.4f} nats per token")


def said_once(answer: str) -> str:
    """``answer`` without invisible characters, and without four words running that came before.

    Padding with either would raise a mean likelihood. Words are what blanks separate, so repetition
    in scripts without blanks is not found.
    """
    # Blanks at the end are of no word; to find that out, `\s*` would begin anew at each of them.
    words = re.findall(r"\s*\S+", without_hidden(answer).rstrip())
    keys = [normalise(word) for word in words]
    seen: set[tuple[str, ...]] = set()
    again: set[int] = set()
    for end in range(4, len(words) + 1):
        gram = tuple(keys[end - 4 : end])
        if gram in seen:
            again.update(range(end - 4, end))
        seen.add(gram)
    return "".join(word for place, word in enumerate(words) if place not in again)


class ReferenceScorer(Scorer):
    """100 * BERTScore F1 against the known answer; the best of several known answers counts.

    Raises `LLMError` for references that can't be read, naming file and line.
    """

    def __init__(self, config: ScorerConfig) -> None:
        from memshare.metrics.bertscore import BertScorer
        from memshare.retrieval.encoder_folder import resolve_encoder

        self._references = read_references(config.references)
        self._bertscore = BertScorer(resolve_encoder(config.bertscore_model))
        self._lock = threading.Lock()  # one model; its tokenizer serves one thread at a time

    async def _grade(self, prompt: str, answer: str, rubric_text: str) -> Grade:
        known = self._references.get(normalise(prompt))
        if known is None:
            return Grade(None, "no reference")
        scores = await asyncio.to_thread(self._score, answer, known)
        value = 100 * max(f1 for _, _, f1 in scores)
        return Grade(min(100.0, max(0.0, value)), f"BERTScore F1 against {len(known)} reference(s)")

    def _score(self, answer: str, known: list[str]) -> list[tuple[float, float, float]]:
        with self._lock:
            return [(p, r, f1) for p, r, f1 in self._bertscore.score([answer] * len(known), known)]


def read_references(paths: Sequence[Path]) -> dict[str, list[str]]:
    """Known answers by normalised question, from JSONL of prompt/answer or chat rows.

    Raises `LLMError` naming file and line of a row that can't be read.
    """
    found: dict[str, list[str]] = {}
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise LLMError(f"scorer.references: {path} can't be read: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if "messages" in row:
                    turns = {turn["role"]: turn["content"] for turn in row["messages"]}
                    row = {"prompt": turns["user"], "answer": turns["assistant"]}
                prompt, answer = row["prompt"], row["answer"]
                if not (isinstance(prompt, str) and isinstance(answer, str) and answer.strip()):
                    raise ValueError("prompt and answer must be texts")
            except (ValueError, KeyError, TypeError) as error:
                raise LLMError(f"scorer.references: {path}:{number}: {error!r}") from error
            answers = found.setdefault(normalise(prompt), [])
            if answer not in answers:
                answers.append(answer)
    if not found:
        raise LLMError("scorer.references: kind `reference` needs at least one known answer")
    return found


def make_scorer(config: ScorerConfig, llm: LLM | None) -> Scorer:
    """The scorer that ``config`` names; only ``reference`` does without an LLM."""
    if config.kind == "reference":
        return ReferenceScorer(config)
    if llm is None:
        raise LLMError(f"scorer.kind {config.kind} needs a scorer LLM")
    return RubricScorer(llm, config) if config.kind == "rubric" else LikelihoodScorer(llm, config)
