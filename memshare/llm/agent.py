"""An agent: the LLM that answers a question with the pool's memories as worked examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memshare.config import AgentConfig
from memshare.llm.base import LLM, Chat, Completion, Message
from memshare.llm.prompts import few_shot, fit_shots
from memshare.records import Memory


@dataclass(frozen=True, slots=True)
class AgentAnswer:
    """An answer and the ids of the memories that were shown for it, best first."""

    completion: Completion
    used: list[str]

    @property
    def text(self) -> str:
        """The answer itself."""
        return self.completion.text

    @property
    def cut_off(self) -> bool:
        """Whether it did not end by itself: at its length limit, by a filter. Never stored."""
        return self.completion.finish_reason != "stop"


class Agent:
    """Answers with ``config``'s instruction, sampling and length."""

    def __init__(self, llm: LLM, config: AgentConfig) -> None:
        self.llm = llm
        self.config = config

    async def prompt(
        self, question: str, memories: Sequence[Memory]
    ) -> tuple[list[Message], list[str]]:
        """The messages sent for ``question``, and the ids of the memories that fitted in.

        ``memories`` come best first; the least similar are dropped until all fits. Raises
        `ContextTooLong` if the question alone is too long.
        """
        await self.llm.ready()
        bare = few_shot(self.config.instruction, (), question)
        shots = [(memory.prompt, memory.answer) for memory in memories]
        messages, kept = fit_shots(self.llm, bare, shots, self.config.max_tokens)
        return messages, [memory.id for memory in memories[:kept]]

    async def answer(
        self, question: str, memories: Sequence[Memory], seed: int | None = None
    ) -> AgentAnswer:
        """Answer ``question`` with ``memories`` (best first) shown."""
        messages, used = await self.prompt(question, memories)
        config = self.config
        chat = Chat(messages, config.max_tokens, config.temperature, seed)
        return AgentAnswer(await self.llm.chat(chat), used)
