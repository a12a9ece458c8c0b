from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from memshare.training.loss import info_nce, info_nce_rows


def unit(rows: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, dim, generator=generator), dim=-1)


def reference(
    queries: torch.Tensor, docs: torch.Tensor, positive: torch.Tensor, valid: torch.Tensor, t: float
) -> list[float]:
    """The formula, term by term, in Python floats."""
    losses = []
    for q in range(len(queries)):
        scores = [float(queries[q].double() @ d.double()) / t for d in docs]
        against = sum(
            math.exp(s) for j, s in enumerate(scores) if valid[q, j] and not positive[q, j]
        )
        own = [s for j, s in enumerate(scores) if positive[q, j]]
        each = [-math.log(math.exp(s) / (math.exp(s) + against)) for s in own]
        losses.append(sum(each) / len(each))
    return losses


def test_one_positive_is_cross_entropy() -> None:
    queries, docs = unit(6), unit(10, seed=1)
    positive = torch.eye(6, 10, dtype=torch.bool)
    got = info_nce(queries, docs, positive, torch.ones_like(positive), 0.05)
    want = cross_entropy(queries @ docs.T / 0.05, torch.arange(6))
    torch.testing.assert_close(got, want)


def test_several_positives_and_masks_follow_the_formula() -> None:
    queries, docs = unit(5), unit(12, seed=1)
    generator = torch.Generator().manual_seed(3)
    positive = torch.rand(5, 12, generator=generator) < 0.3
    positive[:, 0] = True
    valid = torch.rand(5, 12, generator=generator) < 0.7
    got = info_nce_rows(queries, docs, positive, valid, 0.1)
    want = torch.tensor(reference(queries, docs, positive, valid, 0.1))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_masked_doc_changes_nothing() -> None:
    queries, docs = unit(3), unit(5, seed=1)
    positive = torch.eye(3, 5, dtype=torch.bool)
    valid = torch.ones(3, 5, dtype=torch.bool)
    valid[:, 4] = False
    docs.requires_grad_()
    info_nce(queries, docs, positive, valid, 0.05).backward()
    assert docs.grad is not None and docs.grad[4].abs().max() == 0
    assert docs.grad[3].abs().max() > 0


def test_a_row_with_nothing_to_tell_apart_is_zero_with_zero_gradient() -> None:
    queries, docs = unit(2).requires_grad_(), unit(3, seed=1).requires_grad_()
    positive = torch.tensor([[True, False, False], [True, False, False]])
    valid = torch.tensor([[True, False, False], [True, True, True]])
    rows = info_nce_rows(queries, docs, positive, valid, 0.05)
    assert rows[0] == 0 and rows[1] > 0
    rows[0].backward()
    assert queries.grad is not None and torch.equal(queries.grad, torch.zeros_like(queries))
    no_positive = info_nce_rows(queries, docs, torch.zeros_like(valid), valid, 0.05)
    assert torch.equal(no_positive, torch.zeros(2))


@pytest.mark.parametrize("temperature", [1e-4, 0.01, 1.0])
def test_finite_at_any_temperature(temperature: float) -> None:
    queries = unit(4).requires_grad_()
    docs = torch.cat([queries.detach(), -queries.detach()])
    positive = torch.eye(4, 8, dtype=torch.bool).roll(4, dims=1)  # the worst doc is the positive
    loss = info_nce(queries, docs, positive, torch.ones_like(positive), temperature)
    loss.backward()
    assert loss.isfinite() and queries.grad is not None and queries.grad.isfinite().all()


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    queries, docs = unit(4).bfloat16(), unit(6, seed=1).bfloat16()
    positive = torch.eye(4, 6, dtype=torch.bool)
    got = info_nce(queries, docs, positive, torch.ones_like(positive), 0.05)
    assert got.dtype == torch.float32
    want = info_nce(queries.float(), docs.float(), positive, torch.ones_like(positive), 0.05)
    assert got == want
