"""Losses as pure functions over unit embeddings and masks; no model, no process group.

InfoNCE with several positives per query (the form of LLM-R, Wang et al. 2024, and of supervised
contrastive learning, Khosla et al. 2020, "L_out"): each positive p is told from the negatives n on
its own, other positives stay out of its denominator, and a query's loss is the mean over its
positives:

    mean over p of  -log( exp(s_p / T) / (exp(s_p / T) + sum over n of exp(s_n / T)) )
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


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


def info_nce(
    queries: Tensor, docs: Tensor, positive: Tensor, valid: Tensor, temperature: float
) -> Tensor:
    """Mean of `info_nce_rows` over the b queries: a scalar."""
    return info_nce_rows(queries, docs, positive, valid, temperature).mean()
