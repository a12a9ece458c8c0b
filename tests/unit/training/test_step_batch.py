"""Batches assembled from numbers, against their definition, passage by passage."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memshare.config import TrainingConfig
from memshare.records import Example
from memshare.retrieval.encoder import Encoder
from memshare.training.batching import Batches
from memshare.training.select import Passage, Selected, select
from tests.tiny import tiny_encoder
from tests.training_data import candidate, example

WORDS = st.sampled_from(["tea", "Tea", "rain", "iron", "moss  ", "moss"])
NAMES = st.sampled_from([f"m{letter}" for letter in string.ascii_lowercase[:9]])
CANDIDATES = st.builds(
    lambda name, prompt, answer, loglik, label: replace(
        candidate(name, f"{prompt}\n{answer}", loglik, answer), label_key=label
    ),
    NAMES, WORDS, WORDS, st.sampled_from([None, -0.5, -1.0, -1.01, -2.0, -5.0]),
    st.sampled_from([None, "one", "two", "three"]),
)  # fmt: skip
EXAMPLES = st.builds(
    lambda name, query, answer, found: example(
        name, query=query, answer=answer, candidates=tuple(found)
    ),
    NAMES, WORDS, WORDS, st.lists(CANDIDATES, min_size=1, max_size=6),
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder.from_folder(tiny_encoder(tmp_path_factory.mktemp("e") / "tiny"), device="cpu")


def passages(items: list[Selected]) -> Iterator[Passage]:
    return chain.from_iterable((*item.positives, *item.negatives) for item in items)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(EXAMPLES, min_size=1, max_size=10), st.sampled_from([1, 3]))
def test_a_batch_is_what_its_definition_says(
    encoder: Encoder, made: list[Example], positives: int
) -> None:
    config = TrainingConfig(positives=positives, hard_negatives=2)
    chosen = select(made, config).items
    if not chosen:
        return
    data = Batches(chosen, encoder, global_batch=len(chosen), seed=0, settings=config)
    batch = data.batch(0)
    by_id = {item.query_id: item for item in chosen}
    items = [by_id[name] for name in batch.query_ids]
    docs = list(dict.fromkeys(p.text for p in passages(items)))
    first = {p.text: p for p in [*passages(items)][::-1]}
    positive, valid = batch.masks(0, len(items), torch.device("cpu"))
    logliks = batch.measured(0, len(items), torch.device("cpu"))
    assert batch.docs == len(docs)
    bare = ~(valid & ~positive).any(dim=1)
    assert batch.idle == pytest.approx(float(bare.float().mean()))
    assert batch.teaches == (not bare.all())
    distils = TrainingConfig(positives=positives, hard_negatives=2, distill_weight=0.5)
    other = Batches(chosen, encoder, global_batch=len(chosen), seed=0, settings=distils).batch(0)
    bare &= (~logliks.isnan()).sum(dim=1) < 2  # the others have a KL divergence
    assert other.idle == pytest.approx(float(bare.float().mean()))
    for row, item in enumerate(items):
        equal = [other for other in items if other.prompt == item.prompt]
        never = set().union(*(other.never_negative for other in equal))
        known = {other.answer for other in equal}
        known |= {p.answer for other in equal for p in other.positives}
        ours = {p.text for p in item.positives}
        out = {p.text for p in passages(items) if {p.id, p.key} & never or p.prompt == item.prompt}
        out |= {text for text in docs if first[text].answer in known}
        out |= {text for text in docs if first[text].label in never}
        assert [text for text, on in zip(docs, positive[row], strict=True) if on] == [
            text for text in docs if text in ours
        ]
        assert [text for text, on in zip(docs, valid[row], strict=True) if on] == [
            text for text in docs if text in ours or text not in out
        ]
        measured = {p.text: p.loglik for p in (*item.positives, *item.negatives)}
        assert [None if value.isnan() else float(value) for value in logliks[row]] == [
            None if (value := measured.get(text)) is None else pytest.approx(value) for text in docs
        ]


def test_ids_of_any_characters_come_back(encoder: Encoder) -> None:
    names = ["a", "", "ключ \U0001f511", "lone \ud800"]
    made = [
        example(
            name, query=f"q {n}", answer=f"a {n}", candidates=(candidate(f"c{n}", f"t {n}", -0.5),)
        )
        for n, name in enumerate(names)
    ]
    chosen = select(made, TrainingConfig()).items
    batch = Batches(chosen, encoder, global_batch=4, seed=0).batch(0)
    assert sorted(batch.query_ids) == sorted(names)
