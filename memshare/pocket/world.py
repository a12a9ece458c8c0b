"""A seeded world of open-ended tasks in the paper's three domains: verse, logic and plans.

Each of nine kinds of task knows six groups (schools, courts, guilds: `Task.key`). A group has a
hidden way, one text with a slot for the subject, and a right answer is that way told of the
question's subject. Nothing in a question says what the way is: it can only be known from another
memory of the same group. A group goes by four names that share no word, and the same names serve
other groups in other kinds, while scenes and subjects recur everywhere; so wording misleads BM25
and an encoder that never saw this world, and training on the pool's own memories can teach which
names belong together.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from memshare.files import write_atomic
from memshare.pocket.language import ALIAS_SORTS, Domain, Kind
from memshare.pocket.logic import LOGIC
from memshare.pocket.plans import PLANS
from memshare.pocket.verse import VERSE

DOMAINS: tuple[Domain, ...] = (VERSE, LOGIC, PLANS)
GROUPS = 6  # a kind's groups; the last LATE of them are unknown to the seed memories
LATE = 2
SUBJECTS_PER_NAME = 10  # tasks of each (kind, group, name)
SEED_NAMES = 3  # how many of a group's four names the seed memories use
TAUGHT = 2  # first arrivals of an unknown name that come with their answer


@dataclass(frozen=True, slots=True)
class Task:
    """A question, its right answer, and what only the world knows about them.

    ``key`` names the group whose way the answer follows; ``alias`` is the name that the prompt
    uses for it; ``subject`` is what it is about. ``taught``: in the stream of problems it arrives
    as a finished memory, written by someone who knows, since no earlier memory used this name.
    """

    id: str
    domain: str
    kind: str
    key: str
    prompt: str
    answer: str
    subject: str
    alias: str
    taught: bool = False


@dataclass(frozen=True, slots=True)
class Splits:
    """``seed`` memories to start with, ``problems`` in order of arrival, ``test`` never stored."""

    seed: tuple[Task, ...]
    problems: tuple[Task, ...]
    test: tuple[Task, ...]


@dataclass(frozen=True, slots=True)
class _Group:
    """A group's hidden way and its names."""

    number: int
    way: str
    names: tuple[str, ...]


def relevant(task: Task, other: Task) -> bool:
    """Whether ``other``'s answer shows how ``task`` is to be answered (a task shows itself)."""
    return task.key == other.key


class World:
    """The world of one seed; the same seed gives the same tasks and splits, everywhere."""

    def __init__(self, seed: int = 0) -> None:
        """Draw the groups' ways and names; tasks are made when first asked for."""
        self.seed = seed
        self._tasks: tuple[Task, ...] | None = None

    def tasks(self) -> list[Task]:
        """All tasks (2,160), in an order that mixes domains, kinds and groups."""
        if self._tasks is None:
            made: list[Task] = []
            for domain in DOMAINS:
                for kind in domain.kinds:
                    made.extend(self._kind_tasks(domain, kind))
            random.Random(f"{self.seed}/order").shuffle(made)
            self._tasks = tuple(made)
        return list(self._tasks)

    def splits(self, seed: int = 300, problems: int = 900, test: int = 200) -> Splits:
        """Cut the tasks into seed memories, problems and test questions.

        Every name and subject of a test question also occurs, in another combination, among seed
        and problems. Raises ValueError when the world has too few tasks.
        """
        late = {f"{number}" for number in range(GROUPS - LATE, GROUPS)}
        start: list[Task] = []
        rest: list[Task] = []
        for task in self.tasks():
            number, name = task.id.split("-")[1:3]
            early = number not in late and int(name) < SEED_NAMES
            (start if early and len(start) < seed else rest).append(task)
        if len(start) < seed or len(rest) < problems + test:
            raise ValueError(
                f"the world has {len(start) + len(rest)} tasks, not enough for "
                f"{seed} seed memories, {problems} problems and {test} tests"
            )
        known = {(task.kind, task.alias) for task in start}
        arrivals: dict[tuple[str, str], int] = {}
        stream: list[Task] = []
        for task in rest[:problems]:
            name_of = (task.kind, task.alias)
            arrivals[name_of] = arrivals.get(name_of, 0) + 1
            if name_of not in known and arrivals[name_of] <= TAUGHT:
                task = _taught(task)
            stream.append(task)
        known |= arrivals.keys()
        subjects = {(task.kind, task.subject) for task in (*start, *stream)}
        tests = [
            task
            for task in rest[problems:]
            if (task.kind, task.alias) in known and (task.kind, task.subject) in subjects
        ]
        if len(tests) < test:
            raise ValueError(f"only {len(tests)} tests use known names and subjects, not {test}")
        return Splits(tuple(start), tuple(stream), tuple(tests[:test]))

    def _kind_tasks(self, domain: Domain, kind: Kind) -> Iterable[Task]:
        rng = random.Random(f"{self.seed}/{domain.name}/{kind.name}")
        for group in _groups(rng, kind):
            for index, name in enumerate(group.names):
                for subject in rng.sample(domain.subjects, SUBJECTS_PER_NAME):
                    number = domain.subjects.index(subject)
                    ask = _fill(rng.choice(kind.asks), subject, name)
                    scene = rng.choice(domain.scenes)
                    parts = (ask, scene) if rng.random() < 0.5 else (scene, ask)
                    yield Task(
                        id=f"{kind.name}-{group.number}-{index}-{number}",
                        domain=domain.name,
                        kind=kind.name,
                        key=f"{kind.name}/{group.number}",
                        prompt=" ".join(parts),
                        answer=_fill(group.way, subject, name),
                        subject=subject,
                        alias=name,
                    )


def _groups(rng: random.Random, kind: Kind) -> list[_Group]:
    """Six groups whose ways share no part and whose names share no word but the frame."""
    parts = [rng.sample(texts, GROUPS) for texts in (kind.openings, kind.middles, kind.closings)]
    names = [
        [frame.format(word) for word in rng.sample(words, GROUPS)] for frame, words in ALIAS_SORTS
    ]
    groups = []
    for number in range(GROUPS):
        order = rng.sample(range(len(names)), len(names))  # the sort the seed lacks varies
        groups.append(
            _Group(
                number=number,
                way=" ".join(part[number] for part in parts),
                names=tuple(names[sort][number] for sort in order),
            )
        )
    return groups


def _fill(text: str, subject: str, name: str) -> str:
    """Put the quoted subject and the name into a text; a capital slot begins a sentence."""
    return (
        text.replace("{s}", f"“the {subject}”")
        .replace("{S}", f"“The {subject}”")
        .replace("{a}", name)
        .replace("{A}", name[0].upper() + name[1:])
    )


def _taught(task: Task) -> Task:
    """The same task, arriving with its answer."""
    return Task(
        id=task.id,
        domain=task.domain,
        kind=task.kind,
        key=task.key,
        prompt=task.prompt,
        answer=task.answer,
        subject=task.subject,
        alias=task.alias,
        taught=True,
    )


def write_references(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Write the known answers as JSONL of ``{"prompt", "answer"}``, for the reference scorer."""
    rows = (
        json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False)
        for prompt, answer in pairs
    )
    write_atomic(path, "".join(row + "\n" for row in rows))
