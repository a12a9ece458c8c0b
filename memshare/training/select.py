"""Choose positives and negatives from scored candidates, when training and not when mining.

Every scored candidate stays in the examples on disk, so that v, the margins and the rules below can
change without asking an LLM again. For one example:

* positives are the best ``training.positives`` candidates by likelihood, of those that beat the
  likelihood with no example by more than ``training.margin`` (without a baseline: the best ones,
  unless all are worth the same);
* hard negatives are the worst ``training.hard_negatives`` of the rest. Never one of them: the
  query's own memory or a copy of it, another one with the query for its prompt, a copy of a
  positive, a memory with the query's own answer or a positive's, or with its given label, a
  candidate within ``training.false_negative_margin`` of the worst positive chosen;
* what can't be a hard negative of this query can't be its in-batch negative either, wherever else
  in the batch it turns up: ``Selected.never_negative`` carries the keys.

Candidates come in the order in which they were proposed, BM25's first ranks first, and equal scores
go to the earlier one: among the positives as among the hard negatives, where an early rank means
that the query takes the memory for useful. With ``labels: none`` the query's own memory is the
positive and BM25's candidates are the negatives, first ranks first. With ``labels: given`` a
candidate of log-likelihood 0 or more has the query's label and is a positive, and all others are
equally bad: as negatives they come as proposed. There is no baseline to beat. An example without
hard negatives is kept, since the batch gives it negatives.

Of a query that was mined more than once the latest example counts, at the place of the first. What
is chosen goes to disk (`Spool`) as it is read, so that examples may be larger than memory.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from memshare.config import TrainingConfig
from memshare.records import Candidate, Example, answer_key, normalise
from memshare.retrieval.text import memory_text
from memshare.training.spool import Spool

NO_CANDIDATES = "no candidates"
NOT_SCORED = "no candidate has a usable score"
NOT_BETTER = "no positive beats the baseline"
NO_LABEL = "no candidate has the query's label"
ITSELF = "their positive is the query itself"
ALL_ALIKE = "all candidates are worth the same"


def text_key(text: str) -> str:
    """Key of a text up to Unicode form, case and white space: copies have equal keys."""
    return hashlib.blake2b(normalise(text).encode(), digest_size=12).hexdigest()


class Passage(NamedTuple):
    """One memory as the encoder sees it: its text, and the keys that tell copies and answers.

    ``loglik``: what an LM measured of it for this query, None where none did. ``prompt``: the key
    of its prompt, ``principal``: who wrote it, ``label``: the key of its given label; None where
    the examples don't say.
    """

    id: str
    text: str
    key: str
    answer: str
    loglik: float | None = None
    prompt: str | None = None
    principal: str | None = None
    label: str | None = None

    @property
    def names(self) -> set[str]:
        """What tells it, its copies and what has its label from others."""
        return {self.id, self.key} | (set() if self.label is None else {self.label})

    @classmethod
    def of(cls, candidate: Candidate, key: str) -> Passage:
        """The passage of one mined candidate; ``key``: its text's."""
        value = candidate.loglik
        known = value is not None and math.isfinite(value)
        return cls(
            candidate.id, candidate.text, key, candidate.answer_key, value if known else None,
            candidate.prompt_key, candidate.principal, candidate.label_key,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Selected:
    """One training query, ready for batching.

    ``answer`` is the key of the query's own answer; ``never_negative`` the text keys, ids and label
    keys of what must not count against this query even if another query of the batch brings it in.
    Neither must what has ``prompt`` for its prompt.
    """

    query_id: str
    query: str
    pool: str
    principal: str | None
    round: int
    answer: str
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...]
    never_negative: frozenset[str]

    @property
    def prompt(self) -> str:
        """The query's key, and that of any memory with the same prompt."""
        return text_key(self.query)


@dataclass(frozen=True, slots=True)
class Selection:
    """What `select` made of a set of examples; ``dropped`` counts by reason.

    ``items`` are read from disk one by one. ``pools``: how many there are of each; ``labels`` and
    ``scorers``: what kinds of labels the usable ones have, and what measured them. ``idle``: that
    `training.distill_weight` is set, and no query has two measured passages to prefer one of.
    ``more_positives``: queries of data sets that have more of them than `training.positives` takes.
    """

    items: Sequence[Selected]
    dropped: dict[str, int]
    without_negatives: int
    pools: dict[str, int]
    labels: tuple[str, ...]
    scorers: tuple[str, ...]
    idle: bool = False
    more_positives: int = 0

    def counts(self) -> dict[str, Any]:
        """For a report."""
        return {
            "examples": len(self.items),
            "dropped": self.dropped,
            "without_hard_negatives": self.without_negatives,
            "pools": self.pools,
            "labels": list(self.labels),
            "scorers": list(self.scorers),
        }

    def __str__(self) -> str:
        reasons = "".join(f"; {count} dropped: {why}" for why, count in self.dropped.items())
        idle = (
            "; warning: training.distill_weight does nothing, since no example has two measured "
            "candidates (see mining.labels, training.hard_negatives, and pos_scores of a data set)"
        )
        more = (
            f"; of {self.more_positives} not all positives are learned from (see "
            "training.positives, training.positives_per_step)"
        )
        return (
            f"{len(self.items)} usable examples ({self.without_negatives} without hard "
            f"negatives){reasons}{more if self.more_positives else ''}{idle if self.idle else ''}"
        )


class _Kind(NamedTuple):
    """What is told of a usable example."""

    pool: str
    labels: str
    scorer: str
    bare: bool
    distils: bool
    more: bool

    @classmethod
    def of(cls, example: Example, chosen: Selected, config: TrainingConfig) -> _Kind:
        trained = (*chosen.positives[: config.positives_per_step], *chosen.negatives)
        distils = sum(passage.loglik is not None for passage in trained) > 1
        good = sum(one.loglik is not None and one.loglik >= 0.0 for one in example.candidates)
        more = example.exhaustive and good > config.positives
        bare = not chosen.negatives
        return cls(example.pool, example.labels, example.scorer, bare, distils, more)


def select(examples: Iterable[Example], config: TrainingConfig) -> Selection:
    """Choose positives and hard negatives of every example; unusable ones are counted."""
    items = Spool[Selected](_to_json, _from_json)
    places: dict[str, int] = {}
    numbers: list[int | None] = []  # in the spool, by place; None: unusable
    told: list[_Kind | str] = []  # by place; of an unusable one the reason
    known: dict[_Kind | str, _Kind | str] = {}  # each once in memory
    for example in examples:
        place = places.setdefault(example.query_id, len(places))
        if place == len(numbers):
            numbers.append(None)
            told.append("")
        chosen = select_one(example, config)
        numbers[place] = None if isinstance(chosen, str) else items.append(chosen)
        kind = chosen if isinstance(chosen, str) else _Kind.of(example, chosen, config)
        told[place] = known.setdefault(kind, kind)
    items.arrange(number for number in numbers if number is not None)
    kinds = Counter(told)
    usable = {kind: count for kind, count in kinds.items() if isinstance(kind, _Kind)}
    pools: Counter[str] = Counter()
    for kind, count in usable.items():
        pools[kind.pool] += count
    return Selection(
        items=items,
        dropped={why: kinds[why] for why in sorted(k for k in kinds if isinstance(k, str))},
        without_negatives=sum(count for kind, count in usable.items() if kind.bare),
        pools=dict(sorted(pools.items())),
        labels=tuple(sorted({kind.labels for kind in usable})),
        scorers=tuple(sorted({kind.scorer for kind in usable})),
        idle=bool(usable) and config.distill_weight > 0 and not any(k.distils for k in usable),
        more_positives=sum(count for kind, count in usable.items() if kind.more),
    )


def _to_json(item: Selected) -> list[Any]:
    return [
        item.query_id, item.query, item.pool, item.principal, item.round, item.answer,
        item.positives, item.negatives, sorted(item.never_negative),
    ]  # fmt: skip


def _from_json(row: list[Any]) -> Selected:
    query_id, query, pool, principal, round_, answer, positives, negatives, never = row
    return Selected(
        query_id, query, pool, principal, round_, answer,
        positives=tuple(Passage(*passage) for passage in positives),
        negatives=tuple(Passage(*passage) for passage in negatives),
        never_negative=frozenset(never),
    )  # fmt: skip


def select_one(example: Example, config: TrainingConfig) -> Selected | str:
    """One example's positives and negatives, or the reason why it can't be used."""
    own_text = memory_text(example.query, example.answer)
    own = Passage(
        example.query_id, own_text, text_key(own_text), answer_key(example.answer),
        prompt=text_key(example.query), principal=example.principal,
    )  # fmt: skip
    others = [Passage.of(candidate, key) for candidate, key in _distinct(example)]
    if example.labels == "none":
        return _selected(example, own, [own], others, floor=math.inf, count=config.hard_negatives)
    if not others:
        return ITSELF if example.exhaustive and example.candidates else NO_CANDIDATES
    # A score that is missing or not finite says nothing; such a candidate is neither.
    scored = [p for p in others if p.loglik is not None]
    if not scored:
        return NOT_SCORED
    scored.sort(key=lambda p: -_score(p))
    if example.labels == "given":
        good = [p for p in scored if _score(p) >= 0.0]
        if not good:
            return ITSELF if example.exhaustive else NO_LABEL  # a row has a positive
    else:
        least = -math.inf
        if example.baseline_loglik is not None:
            least = example.baseline_loglik + config.margin
        elif len(scored) > 1 and _score(scored[0]) == _score(scored[-1]):
            return ALL_ALIKE  # an LLM that states 0 of each: BM25's order would be what is learned
        good = [p for p in scored if _score(p) > least]
        if not good:
            return NOT_BETTER
    best = good[: config.positives]
    if example.labels == "given":  # labels are sure: whatever a teacher thought of a text
        floor, rest = 0.0, [p for p in others if p.loglik is not None]
    else:
        floor = _score(best[-1]) - config.false_negative_margin
        # Worst first. Sorted, not reversed: of equal ones the first proposed is the hardest.
        rest = sorted(scored, key=_score)
    taken = {p.id for p in best}
    rest = [p for p in rest if p.id not in taken]
    chosen = _selected(example, own, best, rest, floor=floor, count=config.hard_negatives)
    return _unmeasured(chosen) if config.distill_weight > 0 and _only_labelled(example) else chosen


def _only_labelled(example: Example) -> bool:
    """Whether a data set's row came without a teacher's scores, so that 0 and -1 stand for them."""
    return example.exhaustive and all(one.loglik in (0.0, -1.0) for one in example.candidates)


def _unmeasured(item: Selected) -> Selected:
    """Without scores: there is nothing to distil of labels."""
    good, bad = (
        tuple(passage._replace(loglik=None) for passage in part)
        for part in (item.positives, item.negatives)
    )
    return replace(item, positives=good, negatives=bad)


def _score(passage: Passage) -> float:
    assert passage.loglik is not None  # callers keep scored ones only
    return passage.loglik


def distinct_candidates(example: Example) -> list[Candidate]:
    """Candidates without the query's own memory, copies of it, and repeats."""
    return [candidate for candidate, _ in _distinct(example)]


def _distinct(example: Example) -> Iterator[tuple[Candidate, str]]:
    """The same with the keys of their texts, which are costly to make."""
    own_key = text_key(memory_text(example.query, example.answer))
    seen_ids, seen_keys = {example.query_id}, {own_key}
    for candidate in example.candidates:
        key = text_key(candidate.text)
        if candidate.id in seen_ids or key in seen_keys:
            continue
        seen_ids.add(candidate.id)
        seen_keys.add(key)
        yield candidate, key


def _selected(
    example: Example,
    own: Passage,
    positives: Sequence[Passage],
    rest: Sequence[Passage],
    *,
    floor: float,
    count: int,
) -> Selected:
    """Take the first ``count`` of ``rest`` that may be negatives; ``floor``: at or above is not."""
    answers = {own.answer, *(p.answer for p in positives)}
    never = {own.id, own.key}
    for passage in positives:
        never |= passage.names
    negatives: list[Passage] = []
    for passage in rest:
        if passage.loglik is not None and passage.loglik >= floor:
            never |= passage.names
        elif passage.answer in answers or passage.prompt == own.prompt:
            continue
        elif len(negatives) < count:
            negatives.append(passage)
    return Selected(
        query_id=example.query_id,
        query=example.query,
        pool=example.pool,
        principal=example.principal,
        round=example.round,
        answer=own.answer,
        positives=tuple(positives),
        negatives=tuple(negatives),
        never_negative=frozenset(never),
    )
