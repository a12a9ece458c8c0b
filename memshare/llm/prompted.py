"""The paper's own label: the LLM is asked how probably a memory helps (arXiv 2404.09982, 3.3).

An alternative to the measured likelihood, kept for comparison: it needs no log-probabilities, and
depends on how well the LLM judges itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from memshare.llm.base import LLM, Message
from memshare.llm.labels import expected_fraction
from memshare.llm.quoting import quote, warning

_TASK = (
    "You judge worked examples. Given a question, its correct answer, and one example (another "
    "question with its answer), estimate the probability that a writer who sees only the example "
    "and the question produces the correct answer."
)


class Prompted:
    """Asks ``llm`` for the probability, by digit labels: nothing is generated."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    async def score(
        self, query_prompt: str, answer: str, shots: Sequence[tuple[str, str]] = ()
    ) -> float:
        """Probability (0..1) that ``shots`` (best first) help to produce ``answer``."""
        await self.llm.ready()
        return await expected_fraction(self.llm, self._messages(query_prompt, answer, shots))

    @staticmethod
    def _messages(
        query_prompt: str, answer: str, shots: Sequence[tuple[str, str]]
    ) -> list[Message]:
        data = {"question": query_prompt, "correct answer": answer}
        for number, (prompt, reply) in enumerate(shots, 1):
            data[f"example {number} question"] = prompt
            data[f"example {number} answer"] = reply
        code, block = quote(data)
        form = "Reply with one digit: 0 for impossible, 9 for certain."
        return [
            {"role": "system", "content": f"{_TASK}\n\n{warning(code)}"},
            {"role": "user", "content": f"{block}\n\n{form}"},
        ]
