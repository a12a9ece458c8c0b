"""One step's global batch, assembled from numbers: its texts, and what is no negative of what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memshare.arrays import Ints, Mask
from memshare.retrieval.ragged import spans
from memshare.training.item_table import ItemTable, Records


@dataclass(frozen=True)
class StepBatch:
    """One step's global batch: g queries, m distinct docs, n texts: those docs, then the queries.

    ``texts`` (n,) are rows of the token table, each once, so that with one tower a query may stand
    among the docs. ``rows`` (g,) says where in ``texts`` each query stands. ``positives`` (p, 2)
    are pairs of query and doc, ordered by query; ``logliks`` (l, 3) are query, doc and the score
    that an LM gave to the pair, ordered likewise.

    What is no negative depends on the prompt alone: queries with equal ones pull and push the same
    vector. ``prompts`` (g,) numbers them. ``masked`` (k, 2) are pairs of prompt and doc. With
    numbers for the answers, too, ``doc_answers`` (m,) has each doc's, and ``answers`` (a, 2) are
    pairs of prompt and answer: whatever doc gives that answer is no negative either. Likewise
    ``doc_labels`` (m,) and ``labels`` (b, 2), where labels are given.

    ``idle``: the share of queries that teach nothing, since they have no negative and, where a
    LM's scores are learned from, not two of those either. Their loss is 0 whatever the vectors.
    """

    query_ids: tuple[str, ...]
    texts: Ints
    docs: int
    rows: Ints
    prompts: Ints
    positives: Ints
    masked: Ints
    logliks: npt.NDArray[np.float64]
    answers: Ints
    doc_answers: Ints
    labels: Ints
    doc_labels: Ints
    idle: float

    @property
    def teaches(self) -> bool:
        """Whether the loss has a gradient at all."""
        return self.idle < 1.0

    def masks(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positive and valid masks (stop - start, m) of some queries, as `info_nce_rows` wants."""
        positive = _paired(np.arange(start, stop), self.positives, self.docs, device)
        asked, row = np.unique(self.prompts[start:stop], return_inverse=True)
        masked = _paired(asked, self.masked, self.docs, device)
        for pairs, numbers in ((self.answers, self.doc_answers), (self.labels, self.doc_labels)):
            if not len(pairs):  # as a rule there are no labels, and masks are large
                continue
            known = _paired(asked, pairs, int(numbers.max()) + 1, device)
            given = torch.from_numpy(numbers).to(device)
            masked |= known.gather(1, given.expand(len(asked), -1))
        return positive, positive | ~masked.index_select(0, torch.from_numpy(row).to(device))

    def measured(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Log-likelihoods (stop - start, m) of some queries, as `distillation_rows` wants them."""
        low, high = np.searchsorted(self.logliks[:, 0], (start, stop))
        found = torch.from_numpy(self.logliks[low:high]).to(device)
        # Filled where it is used: nearly all of it is NaN, and it is as large as the similarities.
        table = torch.full((stop - start, self.docs), math.nan, device=device)
        table[found[:, 0].long() - start, found[:, 1].long()] = found[:, 2].float()
        return table


def assemble(
    table: ItemTable,
    places: Ints,
    drawn: Sequence[Sequence[int]],
    *,
    distils: bool = False,
    two_towers: bool = False,
) -> StepBatch:
    """The batch of the items at ``places``.

    ``drawn``: of each, where in ``table.passages`` the positives are that it is trained on.
    ``distils``: an LM's scores are learned from, too. ``two_towers``: queries and docs have a tower
    each, and an equal text is not encoded once for both.
    """
    items = table.items(places)
    at, whose, ours = _passages(table, places, drawn)
    found = table.passages[at]
    sides = np.repeat([0, int(two_towers)], [len(found), len(items)])
    texts = 2 * np.concatenate([found["row"], items["row"]]) + sides
    first_text, numbers = _numbered(texts)
    columns, rows = numbers[: len(found)], numbers[len(found) :]
    docs = int(columns.max()) + 1
    first = first_text[:docs]
    first_prompt, prompts = _numbered(items["prompt"])
    first_answer, doc_answers = _numbered(found["answer"][first])
    first_label, doc_labels = _numbered(found["label"][first])
    known = ~np.isnan(found["loglik"])
    measured = (whose[known], columns[known], found["loglik"][known])
    positives = np.stack([whose[ours], columns[ours]], axis=1)
    masked = _masked(table, places, found, columns, items["prompt"][first_prompt], prompts)
    answers = _answers(table, places, prompts, found["answer"][first][first_answer])
    labels = _labels(table, places, prompts, found["label"][first][first_label])
    same = (answers, doc_answers), (labels, doc_labels)
    idle = _negatives(prompts, positives, masked, *same) == 0
    if distils:
        idle &= np.bincount(whose[known], minlength=len(places)) < 2
    return StepBatch(
        query_ids=table.query_ids(places),
        texts=texts[first_text] // 2,
        docs=docs,
        rows=rows,
        prompts=prompts,
        positives=positives,
        masked=masked,
        logliks=np.stack([part.astype(np.float64) for part in measured], axis=1),
        answers=answers,
        doc_answers=doc_answers,
        labels=labels,
        doc_labels=doc_labels,
        idle=float(idle.mean()),
    )


def _passages(
    table: ItemTable, places: Ints, drawn: Sequence[Sequence[int]]
) -> tuple[Ints, Ints, Mask]:
    """Where in ``table.passages`` each item's are, its ``drawn`` ones first; whose; which drawn."""
    ours = np.fromiter(chain.from_iterable(drawn), dtype=np.int64)
    owners = np.repeat(np.arange(len(places)), [len(one) for one in drawn])
    theirs, others = table.negatives(places)
    order = np.argsort(np.concatenate([owners, others]), kind="stable")
    at, whose = np.concatenate([ours, theirs])[order], np.concatenate([owners, others])[order]
    return at, whose, order < len(ours)


def _masked(
    table: ItemTable, places: Ints, found: Records, columns: Ints, asked: Records, prompts: Ints
) -> Ints:
    """Pairs of prompt and doc: it has that prompt, or a query with it never has it for a negative.

    ``found``: the batch's passages, of the docs ``columns``. ``asked``: the prompts' names.
    """
    number, place = _matches(asked, found["prompt"])
    pairs = [(number, columns[place])]
    unwanted, whose = table.never(places)
    names, name = np.unique(unwanted, return_inverse=True)
    never, number = _distinct(name, prompts[whose], len(asked)).T
    name, place = _matches(names, np.concatenate([found["key"], found["id"]]))
    known, column = _distinct(name, np.tile(columns, 2)[place], len(columns)).T
    place, other = _matches(never, known)
    pairs.append((number[place], column[other]))
    first, second = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return _distinct(first, second, len(columns))


def _answers(table: ItemTable, places: Ints, prompts: Ints, given: Records) -> Ints:
    """Pairs of prompt and number of an answer among the docs' (names ``given``) that it knows.

    It knows its queries' own answers, and those of all their positives, drawn or not.
    """
    items = table.items(places)
    at, whose = spans(items["passages"], items["passages"] + items["positives"])
    names = np.concatenate([items["answer"], table.passages["answer"][at]])
    place, number = _matches(names, given)
    return _distinct(np.concatenate([prompts, prompts[whose]])[place], number, len(given))


def _labels(table: ItemTable, places: Ints, prompts: Ints, given: Records) -> Ints:
    """Pairs of prompt and number of a label among the docs' (names ``given``) that it has."""
    names, whose = table.never(places)
    place, number = _matches(names, given)
    return _distinct(prompts[whose][place], number, len(given))


def _negatives(
    prompts: Ints,
    positives: Ints,
    masked: Ints,
    answers: tuple[Ints, Ints],
    labels: tuple[Ints, Ints],
) -> Ints:
    """How many negatives each query has (g,); arguments as `StepBatch` has them.

    ``answers`` and ``labels``: the pairs with prompts, and each doc's.
    """
    docs = len(answers[1])
    lost = np.zeros(len(prompts), dtype=np.int64)  # by prompt

    def known(prompt: Ints, column: Ints) -> Mask:
        """Whether a prompt has a doc's answer, or its label."""
        has = [
            np.isin(prompt * docs + numbers[column], pairs @ (docs, 1))
            for pairs, numbers in (answers, labels)
        ]
        return has[0] | has[1]

    for pairs, numbers in (answers, labels):
        np.add.at(lost, pairs[:, 0], np.bincount(numbers)[pairs[:, 1]])
    # Counted twice: docs whose answer and whose label a prompt has.
    kinds, count = np.unique(answers[1] * docs + labels[1], return_counts=True)
    answer, label = np.divmod(kinds, docs)
    low, high = (np.searchsorted(answer, answers[0][:, 1], side) for side in ("left", "right"))
    at, which = spans(low, high)
    prompt = answers[0][which, 0]
    twice = np.isin(prompt * docs + label[at], labels[0] @ (docs, 1))
    np.subtract.at(lost, prompt[twice], count[at[twice]])
    np.add.at(lost, masked[~known(masked[:, 0], masked[:, 1]), 0], 1)
    # Of a query's own positives those that are no negatives for these reasons already don't count.
    query, column = positives.T
    own = ~known(prompts[query], column)
    own &= ~np.isin(prompts[query] * docs + column, masked @ (docs, 1))
    return docs - lost[prompts] - np.bincount(query[own], minlength=len(prompts))


def _numbered(values: npt.NDArray[Any]) -> tuple[Ints, Ints]:
    """Distinct ``values`` by their first places, in order, and the number of each (k,) in that."""
    _, first, number = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[number]


def _matches(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> tuple[Ints, Ints]:
    """All pairs of a place in ``left`` and one in ``right`` whose values are equal."""
    order = np.argsort(right, kind="stable")
    low, high = (np.searchsorted(right[order], left, side) for side in ("left", "right"))
    at, place = spans(low, high)
    return place, order[at]


def _distinct(first: Ints, second: Ints, seconds: int) -> Ints:
    """Pairs (k, 2), each once and in order; ``second`` is below ``seconds``."""
    codes = np.unique(first * seconds + second)
    return np.stack(np.divmod(codes, seconds), axis=1)


def _paired(firsts: Ints, pairs: Ints, columns: int, device: torch.device) -> Tensor:
    """A mask (f, columns) of what ``pairs`` (k, 2) pair each of the sorted ``firsts`` (f,) with."""
    first, second = pairs[np.isin(pairs[:, 0], firsts)].T
    at = np.stack([np.searchsorted(firsts, first), second])
    mask = torch.zeros(len(firsts), columns, dtype=torch.bool, device=device)
    mask[tuple(torch.from_numpy(at).to(device))] = True
    return mask
