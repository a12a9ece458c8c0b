from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from memshare.training.loss import (
    distillation_rows,
    info_nce_rows,
    objective_rows,
)


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
    got = info_nce_rows(queries, docs, positive, torch.ones_like(positive), 0.05).mean()
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
    info_nce_rows(queries, docs, positive, valid, 0.05).mean().backward()
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
    loss = info_nce_rows(queries, docs, positive, torch.ones_like(positive), temperature).mean()
    loss.backward()
    assert loss.isfinite() and queries.grad is not None and queries.grad.isfinite().all()


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    queries, docs = unit(4).bfloat16(), unit(6, seed=1).bfloat16()
    positive = torch.eye(4, 6, dtype=torch.bool)
    got = info_nce_rows(queries, docs, positive, torch.ones_like(positive), 0.05).mean()
    assert got.dtype == torch.float32
    want = info_nce_rows(
        queries.float(), docs.float(), positive, torch.ones_like(positive), 0.05
    ).mean()
    assert got == want


def test_distillation_follows_the_formula_and_ignores_what_was_not_measured() -> None:
    queries, docs = unit(3).requires_grad_(), unit(6, seed=1).requires_grad_()
    logliks = torch.full((3, 6), math.nan)
    logliks[0, [0, 2, 5]] = torch.tensor([-1.0, -2.0, -4.5])
    logliks[1, [1, 3]] = torch.tensor([-0.25, -0.25])
    logliks[2, 4] = -1.0  # one alone says nothing
    got = distillation_rows(queries, docs, logliks, 0.1, 0.7)
    for row, columns in ((0, [0, 2, 5]), (1, [1, 3])):
        values = [float(logliks[row, j]) for j in columns]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)) or 1.0
        weights = [math.exp((v - mean) / spread / 0.7) for v in values]
        scores = [math.exp(float(queries[row].double() @ docs[j].double()) / 0.1) for j in columns]
        want = sum(
            w / sum(weights) * math.log(w / sum(weights) / (s / sum(scores)))
            for w, s in zip(weights, scores, strict=True)
        )
        assert float(got[row].detach()) == pytest.approx(want, rel=1e-4)
    assert float(got[2].detach()) == 0.0
    got.sum().backward()
    assert queries.grad is not None and docs.grad is not None
    assert queries.grad.isfinite().all() and queries.grad[2].abs().max() == 0
    assert docs.grad[4].abs().max() == 0 and docs.grad[0].abs().max() > 0


def test_distillation_is_zero_where_the_encoder_agrees_and_knows_no_scale() -> None:
    queries = unit(1)
    docs = unit(4, seed=1)
    scores = queries @ docs.T / 0.1
    agreed = (scores - scores.mean()) / scores.std(correction=0)
    teacher = float(1 / scores.std(correction=0))  # so that both softmaxes are the same
    assert float(distillation_rows(queries, docs, agreed, 0.1, teacher)) == pytest.approx(
        0.0, abs=1e-6
    )
    wrong = -agreed
    left = distillation_rows(queries, docs, wrong, 0.1, 1.0)
    right = distillation_rows(queries, docs, 20 * wrong - 3, 0.1, 1.0)
    torch.testing.assert_close(left, right)
    assert float(left) > 0.1


def test_objective_adds_its_parts_over_all_widths() -> None:
    queries, docs = unit(4), unit(7, seed=1)
    positive = torch.eye(4, 7, dtype=torch.bool)
    valid = torch.ones_like(positive)
    logliks = torch.randn(4, 7, generator=torch.Generator().manual_seed(5))
    got = objective_rows(
        queries, docs, positive, valid, logliks,
        temperature=0.1, distill_weight=0.3, distill_temperature=2.0, dims=(8, 4),
    )  # fmt: skip
    info_nce, distillation = [], []
    for width in (16, 8, 4):
        q, d = (normalize(rows[:, :width], dim=-1) for rows in (queries, docs))
        info_nce.append(info_nce_rows(q, d, positive, valid, 0.1))
        distillation.append(distillation_rows(q, d, logliks, 0.1, 2.0))
    torch.testing.assert_close(got.info_nce, sum(info_nce) / 3)
    torch.testing.assert_close(got.distillation, sum(distillation) / 3)
    torch.testing.assert_close(got.loss, got.info_nce + 0.3 * got.distillation)
    assert got.distillation.min() > 0.01
    plain = objective_rows(queries, docs, positive, valid, None, temperature=0.1)
    assert torch.equal(plain.loss, info_nce_rows(queries, docs, positive, valid, 0.1))
    assert torch.equal(plain.info_nce, plain.loss) and not plain.distillation.any()
