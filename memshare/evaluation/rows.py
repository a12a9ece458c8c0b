"""The rows that every experiment yields, and what is made of them: averages and paired contrasts.

A row is one measured number: which arm of the experiment, on which dataset, by which metric, and
the model that made it. Where it is a mean over questions, it keeps each question's value, so that
arms, and whole runs, are compared question by question.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from memshare.evaluation.cache import content_hash
from memshare.evaluation.measures import CHRF
from memshare.metrics.stats import bootstrap_mean, holm, paired_bootstrap, paired_permutation
from memshare.records import normalise

DECONTAMINATED = "decontaminated"
PUBLISHED = "published"
AVERAGE = "average"  # over all questions of the data's English datasets
WORLD = "world"  # the pocket world: in no average of the data
_DRAWS, _TOLD = 10_000, 500  # of a randomisation test, for so many differences told together


class Key(NamedTuple):
    """What makes two rows the same measurement, in two runs too."""

    arm: str
    at: str
    dataset: str
    metric: str
    model: str
    split: str


@dataclass(frozen=True, slots=True)
class Row:
    """One number. ``at``: the point on the experiment's axis (share of the pool, number of agents).

    ``model``: what made it. That is the agent by its name where one answered; where memories were
    only looked for, what ranked them (the encoder's name, ``BM25``, the scorer LM of an oracle);
    where text was only compared, by what.
    ``low`` and ``high``: the 95 % bootstrap interval, None for what was counted and not sampled.
    ``n``: questions, or what else was counted. ``failed``: questions that got no answer; they count
    as 0. ``questions``: question -> value.
    """

    arm: str
    dataset: str
    metric: str
    model: str
    value: float
    low: float | None
    high: float | None
    n: int
    seed: int
    failed: int = 0
    at: str = ""
    split: str = DECONTAMINATED
    questions: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What it measured."""
        return Key(self.arm, self.at, self.dataset, self.metric, self.model, self.split)

    def record(self) -> dict[str, Any]:
        """The report's form: all but the single questions."""
        row = asdict(self)
        del row["questions"]
        return row


def question_keys(prompts: Iterable[str]) -> list[str]:
    """A name for each question, by its text alone; a repeated one is numbered."""
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        name = content_hash(normalise(prompt))[:16]
        keys.append(name if not seen[name] else f"{name}-{seen[name]}")
        seen[name] += 1
    return keys


def mean_row(key: Key, questions: Mapping[str, float], seed: int, failed: int = 0) -> Row:
    """The mean over ``questions`` with its interval; raises ValueError for none."""
    interval = bootstrap_mean(list(questions.values()), seed=seed)
    return Row(
        key.arm, key.dataset, key.metric, key.model, interval.mean, interval.low, interval.high,
        len(questions), seed, failed, key.at, key.split, questions,
    )  # fmt: skip


def count_row(key: Key, value: float, n: int, seed: int) -> Row:
    """A number that was counted over ``n`` things."""
    return Row(
        key.arm, key.dataset, key.metric, key.model, float(value), None, None, n, seed, 0, key.at,
        key.split,
    )  # fmt: skip


def averages(rows: Iterable[Row]) -> list[Row]:
    """For each arm and metric the mean over all questions of the data's English datasets.

    The pocket world is no part of it, nor what was measured by characters, as no English model
    reads it; a metric that only some of the others have is averaged over none.
    """
    groups: dict[Key, list[Row]] = defaultdict(list)
    widest: dict[Key, int] = defaultdict(int)
    for row in rows:
        if row.questions and row.dataset not in (WORLD, AVERAGE) and row.metric != CHRF:
            groups[row.key._replace(dataset=AVERAGE)].append(row)
    for key, parts in groups.items():
        anywhere = key._replace(metric="")
        widest[anywhere] = max(widest[anywhere], len(parts))
    made = []
    for key, parts in groups.items():
        if len(parts) > 1 and len(parts) == widest[key._replace(metric="")]:
            questions = {
                f"{part.dataset}/{name}": value
                for part in parts
                for name, value in part.questions.items()
            }
            failed = sum(part.failed for part in parts)
            made.append(mean_row(key, questions, parts[0].seed, failed))
    return made


def matched(
    ours: Iterable[Row], theirs: Iterable[Row], opposite: Callable[[Key], Key] = lambda key: key
) -> list[tuple[Row, Row]]:
    """Each of ``ours`` with the row of ``theirs`` that measured what ``opposite`` makes of its key.

    That is the one by the same model. Where both sides were measured by one model alone, it may be
    another: two runs' agents, or what ranked the memories.
    """
    ours = list(ours)
    by_key = {row.key: row for row in theirs}
    here, there = (_by_model(rows) for rows in (ours, by_key.values()))
    pairs = []
    for row in ours:
        key = opposite(row.key)
        found = by_key.get(key)
        if found is None and len(here[_of_any(row.key)]) == 1:
            others = there.get(_of_any(key), [])
            found = others[0] if len(others) == 1 else None
        if found is not None:
            pairs.append((row, found))
    return pairs


def _of_any(key: Key) -> Key:
    return key._replace(model="")


def _by_model(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """The rows that differ by nothing but their model."""
    found: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        found[_of_any(row.key)].append(row)
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """Ours minus theirs over the questions that both answered.

    ``low``, ``high``: 95 % paired bootstrap; ``p``: paired randomisation test, two-sided;
    ``p_holm``: the same, adjusted for the number of differences told together.
    """

    ours: Key
    theirs: Key
    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    n: int

    def record(self) -> dict[str, Any]:
        """The report's form: what is the same on both sides once."""
        ours, theirs = self.ours._asdict(), self.theirs._asdict()
        same = {name: value for name, value in ours.items() if theirs[name] == value}
        figures = {name: getattr(self, name) for name in ("mean", "low", "high", "p", "p_holm")}
        return {
            **same,
            "ours": {name: value for name, value in ours.items() if name not in same},
            "theirs": {name: value for name, value in theirs.items() if name not in same},
            **figures,
            "n": self.n,
        }


def differences(pairs: Sequence[tuple[Row, Row]], seed: int) -> list[Difference]:
    """Each pair of rows compared over their common questions; pairs without any are left out.

    The more there are, the more signs are drawn for each: no p is below one in as many, and by
    Holm's correction that of the surest difference must still be able to be below 0.05.
    """
    draws = _DRAWS * math.ceil(len(pairs) / _TOLD)
    found: list[Difference] = []
    for ours, theirs in pairs:
        names = [name for name in ours.questions if name in theirs.questions]
        if not names:
            continue
        left = [ours.questions[name] for name in names]
        right = [theirs.questions[name] for name in names]
        interval = paired_bootstrap(left, right, seed=seed)
        p = paired_permutation(left, right, draws=draws, seed=seed)
        found.append(Difference(ours.key, theirs.key, *interval, p, p, len(names)))
    adjusted = holm([item.p for item in found])
    return [
        Difference(d.ours, d.theirs, d.mean, d.low, d.high, d.p, p, d.n)
        for d, p in zip(found, adjusted, strict=True)
    ]
