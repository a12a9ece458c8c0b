"""The paper's own label: the LLM is asked how probably a memory helps (arXiv 2404.09982, 3.3).

An alternative to the measured likelihood, kept for comparison: it needs no log-probabilities, and
depends on how well the LLM judges itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from memshare.llm.base import LLM, Message
from memshare.llm.labels import expected_fraction
from memshare.llm.quoting import quote, warning
from memshare.llm.structured import read_integers

_TASK = (
    "You judge worked examples. Given a question, its correct answer, and one example (another "
    "question with its answer), estimate the probability that a writer who sees only the example "
    "and the question produces the correct answer."
)


class Prompted:
    """Asks ``llm`` for the probability, by digit labels (nothing is generated) or a JSON number."""

    def __init__(self, llm: LLM, grading: Literal["labels", "structured"] = "labels") -> None:
        self.llm = llm
        self.grading = grading

    async def score(
        self, query_prompt: str, answer: str, shots: Sequence[tuple[str, str]] = ()
    ) -> float | None:
        """Probability (0..1) that ``shots`` (best first) help to produce ``answer``.

        None if the LLM's reply can't be read.
        """
        await self.llm.ready()
        if self.grading == "labels":
            form = "Reply with one digit: 0 for impossible, 9 for certain."
            return await expected_fraction(
                self.llm, self._messages(query_prompt, answer, shots, form)
            )
        form = 'Reply with JSON only: {"probability": an integer from 0 to 100}.'
        fields = {"probability": 100}
        values = await read_integers(
            self.llm, self._messages(query_prompt, answer, shots, form), fields, max_tokens=32
        )
        return values["probability"] / 100 if isinstance(values, dict) else None

    @staticmethod
    def _messages(
        query_prompt: str, answer: str, shots: Sequence[tuple[str, str]], form: str
    ) -> list[Message]:
        data = {"question": query_prompt, "correct answer": answer}
        for number, (prompt, reply) in enumerate(shots, 1):
            data[f"example {number} question"] = prompt
            data[f"example {number} answer"] = reply
        code, block = quote(data)
        return [
            {"role": "system", "content": f"{_TASK}\n\n{warning(code)}"},
            {"role": "user", "content": f"{block}\n\n{form}"},
        ]
