"""Losses as pure functions over unit embeddings and masks; no model, no process group.

InfoNCE with several positives per query: each positive p is told from the negatives n on its own,
as LLM-R tells its one (Wang et al. 2024), and a query's loss is the mean over its positives. So it
is in supervised contrastive learning (Khosla et al. 2020, "L_out"), but that other positives stay
out of the denominator here, where they would be pushed away:

    mean over p of  -log( exp(s_p / T) / (exp(s_p / T) + sum over n of exp(s_n / T)) )

To it can be added the divergence of the encoder's preference among a query's measured candidates
from the LM's (`distillation_rows`), and all of it can be taken over several widths of the vectors
(`objective_rows`; Kusupati et al. 2022, "Matryoshka Representation Learning"), so that their first
entries alone are useful vectors too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize, softplus


def info_nce_rows(
    queries: Tensor, docs: Tensor, positive: Tensor, valid: Tensor, temperature: float
) -> Tensor:
    """The loss of every query.

    Args:
        queries: (b, d) unit rows.
        docs: (m, d) unit rows: every query's positives and hard negatives.
        positive: (b, m) bool, which docs are positives of which query.
        valid: (b, m) bool, which docs count; the negatives are those valid and not positive.
            False negatives are False here. Positives count whatever it says.
        temperature: the similarity's divisor.

    Returns:
        (b,) float32. A row whose negatives are all masked out has a loss of 0 and a gradient of 0,
        since there is nothing to tell its positives from; so has a row without positives.
    """
    scores = queries.float() @ docs.float().T / temperature
    negative = valid & ~positive
    # The least finite number in place of -inf: the gradient of logsumexp over -inf alone is NaN.
    low = torch.finfo(scores.dtype).min
    against = torch.logsumexp(scores.masked_fill(~negative, low), dim=1, keepdim=True)
    each = softplus(against - scores).masked_fill(~positive, 0.0)
    return each.sum(dim=1) / positive.sum(dim=1).clamp(min=1)


def distillation_rows(
    queries: Tensor, docs: Tensor, logliks: Tensor, temperature: float, teacher_temperature: float
) -> Tensor:
    """KL divergence of each query's preference among its measured docs from the LM's, in nats.

    The LM's preference is a softmax over its scores, standardised per query and divided by
    ``teacher_temperature``: raw log-likelihoods differ in scale from query to query, and training
    on them made retrieval worse in LLM-R (Wang et al. 2023).

    Args:
        queries: (b, d) unit rows.
        docs: (m, d) unit rows.
        logliks: (b, m), nats per token; NaN where nothing was measured.
        temperature: the similarity's divisor.
        teacher_temperature: the standardised scores' divisor.

    Returns:
        (b,) float32; 0, with a gradient of 0, for a query with fewer than two measured docs.
    """
    known = ~logliks.isnan()
    count = known.sum(dim=1, keepdim=True).clamp(min=1)
    values = logliks.float().masked_fill(~known, 0.0)
    centred = (values - values.sum(dim=1, keepdim=True) / count).masked_fill(~known, 0.0)
    deviation = (centred.square().sum(dim=1, keepdim=True) / count).sqrt().clamp(min=1e-6)
    # The least finite number in place of -inf: a row without measured docs must not become NaN.
    low = torch.finfo(torch.float32).min
    scores = queries.float() @ docs.float().T / temperature
    teacher = log_softmax((centred / deviation / teacher_temperature).masked_fill(~known, low), 1)
    student = log_softmax(scores.masked_fill(~known, low), dim=1)
    each = (teacher.exp() * (teacher - student)).masked_fill(~known, 0.0).sum(dim=1)
    return each * (known.sum(dim=1) > 1)


class Objective(NamedTuple):
    """What training minimises, of every query, and its parts; each (b,) float32.

    ``loss`` is ``info_nce`` plus ``distill_weight`` times ``distillation``, which is zero where
    nothing is distilled.
    """

    loss: Tensor
    info_nce: Tensor
    distillation: Tensor


def objective_rows(
    queries: Tensor,
    docs: Tensor,
    positive: Tensor,
    valid: Tensor,
    logliks: Tensor | None,
    *,
    temperature: float,
    distill_weight: float = 0.0,
    distill_temperature: float = 1.0,
    dims: Sequence[int] = (),
) -> Objective:
    """`info_nce_rows`, and `distillation_rows` where ``logliks`` are given.

    Of each the mean over the whole vectors and their first ``dims`` entries, made unit again.
    """
    info_nce = queries.new_zeros(len(queries), dtype=torch.float32)
    distillation = torch.zeros_like(info_nce)
    for width in (None, *dims):
        q, d = queries, docs
        if width is not None:
            q, d = (normalize(rows[:, :width].float(), dim=-1) for rows in (queries, docs))
        info_nce = info_nce + info_nce_rows(q, d, positive, valid, temperature)
        if logliks is not None:
            more = distillation_rows(q, d, logliks, temperature, distill_temperature)
            distillation = distillation + more
    info_nce, distillation = (part / (1 + len(dims)) for part in (info_nce, distillation))
    return Objective(info_nce + distill_weight * distillation, info_nce, distillation)
