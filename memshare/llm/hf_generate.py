"""Batched generation in which every row keeps its own sampling, seed, limit and stop strings.

``transformers`` samples a batch from one global generator, so that a request's answer would depend
on what it was batched with. Here greedy decoding runs over scores to which each row adds Gumbel
noise from a generator of its own; the argmax is then an exact sample (Maddison et al., "A*
Sampling", 2014).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one answer is drawn; temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()


@dataclass(slots=True)
class Row:
    """One request while it is generated. ``emit`` gets each new piece of text, if it is set."""

    ids: Sequence[int]
    sampling: Sampling
    decode: Callable[[Sequence[int]], str]
    end_ids: frozenset[int]
    emit: Callable[[str], None] | None = None
    cancelled: Callable[[], bool] = lambda: False
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    sent: int = 0
    count: int = 0  # generated tokens, the end token among them
    finish: str | None = None

    def feed(self, token: int) -> None:
        """Take the next token; afterwards ``finish`` says whether the answer is complete."""
        if self.finish is not None:
            return
        self.count += 1
        if self.cancelled() or token in self.end_ids:
            self.finish = "stop"
        else:
            self.tokens.append(token)
            if self.emit is not None or self.sampling.stop:
                self.text = self.decode(self.tokens)
                cuts = [at for stop in self.sampling.stop if (at := self.text.find(stop)) >= 0]
                if cuts:
                    self.text = self.text[: min(cuts)]
                    self.finish = "stop"
            if self.finish is None and self.count >= self.sampling.max_tokens:
                self.finish = "length"
        if self.finish is not None and not self.sampling.stop:
            self.text = self.decode(self.tokens)
        self._send()

    def _send(self) -> None:
        """Emit what can't change any more: no half character, nothing a stop string may cut off."""
        if self.emit is None:
            return
        ready = len(self.text)
        if self.finish is None:
            while ready and self.text[ready - 1] == "\ufffd":
                ready -= 1
            ready -= max((len(stop) - 1 for stop in self.sampling.stop), default=0)
        if ready > self.sent:
            self.emit(self.text[self.sent : ready])
            self.sent = ready


def generate(model: Any, rows: Sequence[Row], pad_id: int) -> None:
    """Run ``rows`` to their end in one batch; the results are in the rows.

    Prompts are padded on the left. The model's own generation settings hold (repetition penalty
    and the like), except for sampling, which is each row's own.
    """
    import torch
    from transformers import LogitsProcessorList, StoppingCriteriaList

    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row.ids) :] = torch.tensor(row.ids)
        mask[index, longest - len(row.ids) :] = 1
    settings = copy.deepcopy(model.generation_config)
    settings.do_sample = False
    settings.temperature = settings.top_p = settings.top_k = None
    settings.max_length = None
    settings.max_new_tokens = max(row.sampling.max_tokens for row in rows)
    settings.pad_token_id = pad_id
    settings.eos_token_id = sorted(frozenset.union(*(row.end_ids for row in rows))) or None
    samplers = [_Sampler(row.sampling) for row in rows]

    def sample(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for index, sampler in enumerate(samplers):
            if sampler.sampling.temperature > 0 and rows[index].finish is None:
                scores[index] = sampler(scores[index])
        return scores

    def stop(so_far: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        for row, token in zip(rows, so_far[:, -1].tolist(), strict=True):
            row.feed(token)
        done = [row.finish is not None for row in rows]
        return torch.tensor(done, dtype=torch.bool, device=so_far.device)

    with torch.inference_mode():
        model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([sample]),
            stopping_criteria=StoppingCriteriaList([stop]),
        )


class _Sampler:
    """Adds Gumbel noise to one row's scores, from a generator that only this row uses."""

    def __init__(self, sampling: Sampling) -> None:
        import torch

        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**63)

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (vocabulary,) to noisy scores whose argmax is a sample."""
        import torch

        scores = scores / self.sampling.temperature
        if 0 < self.sampling.top_k < len(scores):
            least = scores.topk(self.sampling.top_k).values[-1]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.sampling.top_p < 1.0:
            ordered, order = scores.sort(descending=True)
            probabilities = ordered.softmax(-1)
            outside = probabilities.cumsum(-1) - probabilities >= self.sampling.top_p
            scores = scores.index_fill(0, order[outside], -torch.inf)
        uniform = torch.rand(len(scores), generator=self._generator, dtype=torch.float64)
        noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
        return scores + noise.to(scores)
