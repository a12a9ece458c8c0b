"""Interactive learning (Gao & Zhang, arXiv 2404.09982): a pool grows before any user arrives.

From a small seed set the agents write questions, answer them with what they retrieve, and the
scorer decides. A written question must be one: not too short, not a seed, not written before, and
no near-duplicate of any of these. Every rejection is counted with its reason; a weak LLM that
writes poor questions is honestly told so by the report.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from memshare.config import BootstrapConfig
from memshare.llm.base import LLM, Chat, LLMError, LLMUnavailable
from memshare.llm.prompts import few_shot, fit_shots
from memshare.pool.errors import InvalidMemory
from memshare.pool.validate import check_text
from memshare.progress import log, track
from memshare.records import Memory, normalise
from memshare.sharing import Pair, SharedMemory
from memshare.training.split import Similar, grams

AGENT = "bootstrap"
_EXAMPLES = 4
_WRITERS = (
    8  # questions written at the same time: enough for a batch, few enough for a small machine
)
_MAX_TOKENS = 128
_INSTRUCTION = (
    "You write questions that a group of agents will answer. Each reply is one new question or "
    "task of the same kind as those before, about something else, and nothing but the question."
)
_ASK = "Write one new question."
_NUMBERING = re.compile(
    r"^\s*(?:[-*•]|\d{1,3}[.)]|(?:question|q|task)\s*\d*\s*:)\s*", re.IGNORECASE
)

TOO_SHORT = "question too short"
CUT_OFF = "question cut off by length"
UNFINISHED = "question not finished"
SEED_COPY = "copy of a seed question"
REPEATED = "repeated question"
NEAR_DUPLICATE = "near-duplicate question"
UNUSABLE = "unusable question"
NO_ANSWER = "no answer"


class BootstrapError(RuntimeError):
    """Bootstrapping can't start: the message says what is missing."""


class QuestionFilter:
    """Rejects trivial questions, each with its reason; remembers those it let through.

    Near-duplicate: the Jaccard similarity of word 3-gram sets is at least
    ``config.near_duplicate``.
    """

    def __init__(self, config: BootstrapConfig, seeds: Iterable[str], max_chars: int) -> None:
        """``seeds``: questions that are in the pool already."""
        self._config = config
        self._max_chars = max_chars
        self._seeds = set[str]()
        self._written = set[str]()
        self._similar = Similar()
        for seed in seeds:
            self._seeds.add(normalise(seed))
            self._similar.add(grams(seed))

    def reject(self, question: str) -> str | None:
        """Why ``question`` is no good; None lets it through, and remembers it."""
        if len(question.strip()) < self._config.min_chars:
            return TOO_SHORT
        try:
            check_text("question", question, self._max_chars)
        except InvalidMemory:
            return UNUSABLE
        key = normalise(question)
        if key in self._seeds:
            return SEED_COPY
        if key in self._written:
            return REPEATED
        own = grams(question)
        if self._similar.near(own, self._config.near_duplicate):
            return NEAR_DUPLICATE
        self._written.add(key)
        self._similar.add(own)
        return None


@dataclass
class BootstrapReport:
    """What came of it: ``counts`` by reason ("stored" for accepted), ids of what was stored."""

    pool: str
    seeds: int
    questions: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    stored: list[str] = field(default_factory=list)

    def count(self, reason: str) -> None:
        """One more question that ended like this."""
        self.questions += 1
        self.counts[reason] = self.counts.get(reason, 0) + 1


def tidy(text: str) -> str:
    """The question in an LLM's reply: its first paragraph, without numbering and quotes."""
    paragraph = text.strip().split("\n\n", 1)[0].strip()
    question = _NUMBERING.sub("", paragraph)
    for left, right in (('"', '"'), ("“", "”")):
        if len(question) > 1 and question[0] == left and question[-1] == right:
            question = question[1:-1]
    return question.strip()


async def write_question(
    llm: LLM, seeds: Sequence[Memory], config: BootstrapConfig, seed: int
) -> tuple[str, str]:
    """One question in the manner of a few seeds, and the LLM's finish reason.

    The same ``seed`` shows the same examples and asks for the same sample.
    """
    chosen = random.Random(seed).sample(list(seeds), min(_EXAMPLES, len(seeds)))
    shots = [(_ASK, memory.prompt) for memory in chosen]
    limit = min(_MAX_TOKENS, max(1, llm.context_length // 4))
    messages, _ = fit_shots(llm, few_shot(_INSTRUCTION, [], _ASK), shots, limit)
    completion = await llm.chat(Chat(messages, limit, config.temperature, seed))
    return tidy(completion.text), completion.finish_reason


async def bootstrap(shared: SharedMemory, pool: str) -> BootstrapReport:
    """Grow ``pool`` from the memories in it; ``config.bootstrap`` says how far.

    Each round shows what the rounds before it stored. Raises `BootstrapError` for an empty pool,
    `UnknownPool`, and `LLMUnavailable` with everything decided so far stored.
    """
    config = shared.config.bootstrap
    seeds = await _seeds(shared, pool)
    if not seeds:
        raise BootstrapError(f"pool {pool!r} is empty: add a few seed memories first")
    report = BootstrapReport(pool, len(seeds))
    prompts = [memory.prompt for memory in seeds]
    filter_ = QuestionFilter(config, prompts, shared.config.gateway.max_text_chars)
    for round_ in range(config.rounds):
        first = shared.config.run.seed * 1_000_003 + round_ * config.questions
        numbers = range(first, first + config.questions)
        batches = [numbers[i : i + _WRITERS] for i in range(0, len(numbers), _WRITERS)]
        for batch in track(batches, f"bootstrap {pool}, round {round_ + 1}"):
            await _batch(shared, seeds, filter_, report, batch)
        if round_ + 1 < config.rounds:
            seeds = await _seeds(shared, pool)
    return report


async def _seeds(shared: SharedMemory, pool: str) -> list[Memory]:
    """The pool's memories, in an order that doesn't depend on when each was stored."""
    memories = await shared.read(lambda: list(shared.store.iter(pool)))
    return sorted(memories, key=lambda memory: (memory.prompt, memory.answer))


async def _batch(
    shared: SharedMemory,
    seeds: Sequence[Memory],
    filter_: QuestionFilter,
    report: BootstrapReport,
    numbers: Sequence[int],
) -> None:
    """Write, sift and answer a few questions. The answers of one batch don't see each other."""
    llm, config = shared.agent.llm, shared.config.bootstrap
    await llm.ready()
    written = await asyncio.gather(*(write_question(llm, seeds, config, n) for n in numbers))
    asked: list[tuple[int, str]] = []
    for number, (question, finish_reason) in zip(numbers, written, strict=True):
        if finish_reason == "stop":
            reason = filter_.reject(question)
        else:
            reason = CUT_OFF if finish_reason == "length" else UNFINISHED
        if reason is None:
            asked.append((number, question))
        else:
            report.count(reason)
    # All answers before the first grade: what one turn stores must not depend on another's speed.
    pairs = await asyncio.gather(
        *(_answer(shared, report.pool, question, number) for number, question in asked)
    )
    decisions = await asyncio.gather(*(shared.grade_and_store(pair) for pair in pairs if pair))
    for _ in range(pairs.count(None)):
        report.count(NO_ANSWER)
    for decision in decisions:
        report.count(decision.reason)
        if decision.status == "stored" and decision.memory_id is not None:
            report.stored.append(decision.memory_id)


async def _answer(shared: SharedMemory, pool: str, question: str, number: int) -> Pair | None:
    """The answer to one question by what the pool holds; None if the LLM refuses it."""
    try:
        found = await shared.retrieve(pool, question, shared.config.agent.shots)
        answer = await shared.answer(question, found, number)
    except LLMUnavailable:
        raise
    except LLMError as error:  # this one question is refused (too long, say): the rest goes on
        log(f"a question was refused: {error}")
        return None
    return shared.pair(pool, question, answer, found.memories, AGENT, {"source": "bootstrap"})
