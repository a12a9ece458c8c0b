"""Where to set the scorer's threshold, and which scorer: what is let in, and what it is worth."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import combinations

from memshare.evaluation.data import Domain
from memshare.evaluation.experiment import Experiment, View
from memshare.evaluation.grow import Answered, Attempt, answered, graded
from memshare.evaluation.lab import Lab, ScorerKind
from memshare.evaluation.material import as_memories
from memshare.evaluation.measures import CHRF, F1
from memshare.evaluation.rows import Key, Row, count_row, mean_row, question_keys
from memshare.metrics.stats import spearman
from memshare.records import Memory

THRESHOLDS = (0, 20, 40, 60, 80, 95)
KINDS: tuple[ScorerKind, ...] = ("rubric", "likelihood", "reference")
RANDOM = "random"
QUALITY = "true quality of the accepted"
AGREEMENT = "agreement (Spearman)"
ACCEPTED = "count: accepted"
TOKENS = "tokens per accepted memory"


async def rows(lab: Lab) -> AsyncIterator[Row]:
    """The agents answer every problem once, from the seed memories; each scorer grades all of it.

    ``at`` a threshold, an arm's pool is the seed memories and what its scorer lets in: how many
    answers those are, how good they truly are (BERTScore F1 against the reference), what they cost
    in tokens, and three shots from that pool. ``random``: random shots from all that could be
    graded, whatever the threshold. ``agreement``: of two scorers' grades.
    """
    names = ", ".join(lab.agents)
    for name, domain in lab.sampled().items():
        seeds = as_memories(name, domain.pool)
        problems = domain.problems[: lab.config.evaluation.problems]
        answers = await answered(lab, list(lab.agents.values()), problems, seeds)
        grades = {kind: await graded(lab, lab.scorer(kind), name, answers) for kind in KINDS}
        truth = await quality(lab, answers)
        for left, right in combinations(KINDS, 2):
            both = [
                (a.grade.value, b.grade.value)
                for a, b in zip(grades[left], grades[right], strict=True)
                if a.grade.value is not None and b.grade.value is not None
            ]
            if len(both) > 2:
                key = Key(f"{left} and {right}", "", name, AGREEMENT, names, "decontaminated")
                yield count_row(key, spearman(*zip(*both, strict=True)), len(both), lab.seed)
        for kind, attempts in grades.items():
            for threshold in THRESHOLDS:
                async for row in at_threshold(lab, kind, threshold, domain, attempts, truth):
                    yield row
        readable = [a.pair for a in grades[KINDS[0]] if a.grade.value is not None]
        everything = as_memories(name, [*domain.pool, *readable])
        for threshold in THRESHOLDS:
            control = {RANDOM: lab.random(everything)}
            for row in await lab.answers(control, domain, everything, at=str(threshold)):
                yield row


async def quality(lab: Lab, answers: Sequence[Answered]) -> Mapping[str, float]:
    """The BERTScore F1 (for text that an English model can't read, chrF) of each answer."""
    # One by one, since a domain's problems may be in several languages.
    scores = await lab.measures.datasets([([a.problem], [a.pair.answer]) for a in answers])
    names = question_keys(item.problem.prompt for item in answers)
    return {
        name: row.get(F1, row.get(CHRF, 0.0)) for name, (row,) in zip(names, scores, strict=True)
    }


async def at_threshold(
    lab: Lab, kind: str, threshold: int, domain: Domain, attempts: Sequence[Attempt],
    truth: Mapping[str, float],
) -> AsyncIterator[Row]:  # fmt: skip
    """One scorer at one threshold."""
    key = Key(kind, str(threshold), domain.name, "", ", ".join(lab.agents), "decontaminated")
    names = question_keys(item.problem.prompt for item in attempts)
    accepted = {
        name: item
        for name, item in zip(names, attempts, strict=True)
        if item.grade.value is not None and item.grade.value >= threshold
    }
    yield count_row(key._replace(metric=ACCEPTED), len(accepted), len(attempts), lab.seed)
    if accepted:
        tokens = sum(
            item.completion.prompt_tokens + item.completion.completion_tokens
            for item in attempts
            if item.completion
        )
        cost = tokens / len(accepted)
        yield count_row(key._replace(metric=TOKENS), cost, len(accepted), lab.seed)
        good = {name: truth[name] for name in accepted}
        yield mean_row(key._replace(metric=QUALITY), good, lab.seed)
    pairs = [*domain.pool, *(item.pair for item in accepted.values())]
    memories: list[Memory] = as_memories(domain.name, pairs)
    arms = {kind: lab.dense(memories, lab.encoder)}
    for row in await lab.answers(arms, domain, memories, at=str(threshold)):
        yield row


EXPERIMENT = Experiment(
    "threshold",
    "Which scorer, at which threshold, lets in the answers that help later ones?",
    rows,
    contrasts=(
        ("rubric", "reference"), ("likelihood", "reference"), ("rubric", "rubric@0"),
        ("likelihood", "likelihood@0"), ("reference", "reference@0"),
        *((kind, RANDOM) for kind in KINDS),
    ),
    shown=(F1, CHRF, QUALITY, TOKENS, AGREEMENT),
    views=(View("Three shots from what each scorer lets in", "lines", "threshold"),),
)  # fmt: skip
