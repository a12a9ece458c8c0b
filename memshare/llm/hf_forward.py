"""Likelihoods by plain forward passes: batches cut by tokens, logits only where they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from memshare.llm.base import LogLikelihood
from memshare.llm.tokens import Span

if TYPE_CHECKING:
    import torch

LOGIT_CELLS = 2**27  # float32 cells of one batch's logits: 512 MiB


def cut_batches(
    lengths: Sequence[int], read: Sequence[int], batch_tokens: int, vocabulary: int
) -> list[list[int]]:
    """Indices of similar length, so that padding is small; longest first.

    ``lengths`` are tokens of each sequence, ``read`` the positions whose logits are wanted. A batch
    holds at most ``batch_tokens`` padded tokens and about `LOGIT_CELLS` logits, but always one
    sequence.
    """
    batches: list[list[int]] = []
    longest = widest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = len(batches[-1]) + 1 if batches else 1
        width = max(widest, read[index] + longest - lengths[index])
        if batches and size * longest <= batch_tokens and size * width * vocabulary <= LOGIT_CELLS:
            batches[-1].append(index)
            widest = width
        else:
            batches.append([index])
            longest, widest = lengths[index], read[index]
    return batches


def _logits(
    model: Any, sequences: Sequence[Sequence[int]], first: Sequence[int]
) -> Iterator[torch.Tensor]:
    """Logits of each sequence from position ``first[i]`` on: (length - first, vocabulary) float32.

    Padding stands on the right, where causal attention never looks back at it: no mask is needed,
    which keeps the fast attention path. Positions outside the wanted range cost no vocabulary
    projection.
    """
    import torch

    longest = max(map(len, sequences))
    start = min(first)
    ids = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    keep = torch.arange(start, longest, device=model.device)
    logits = model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=keep).logits
    if logits.shape[1] != len(keep):  # a model that ignores the argument returns every position
        logits = logits[:, start:]
    for row, sequence in enumerate(sequences):
        yield logits[row, first[row] - start : len(sequence) - start].float()


def span_loglikelihoods(model: Any, spans: Sequence[Span]) -> list[LogLikelihood]:
    """Sum of the continuation's token log-likelihoods of each span, one forward pass for all."""
    import torch

    results = []
    with torch.inference_mode():
        # The last token predicts nothing here; the one before the span predicts its first token.
        rows = _logits(model, [span.ids[:-1] for span in spans], [span.start - 1 for span in spans])
        for span, logits in zip(spans, rows, strict=True):
            targets = torch.tensor(span.ids[span.start :], device=logits.device)
            chosen = logits.gather(-1, targets[:, None]).squeeze(-1)
            total = (chosen - logits.logsumexp(-1)).double().sum()
            results.append(LogLikelihood(float(total), len(targets)))
    return results


def next_token_probabilities(
    model: Any, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Probability of each prompt's label ids as its next token, renormalised over the labels."""
    import torch

    with torch.inference_mode():
        rows = _logits(model, prompts, [len(prompt) - 1 for prompt in prompts])
        return [
            logits[0, list(ids)].double().softmax(-1).tolist()
            for logits, ids in zip(rows, labels, strict=True)
        ]
