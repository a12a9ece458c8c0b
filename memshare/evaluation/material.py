"""What experiments are made of: the configured domains, the pocket world, and pools from pairs."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from memshare.config import Config
from memshare.evaluation.data import Domain, Pair, data_root, load_domains
from memshare.evaluation.rows import AVERAGE, WORLD
from memshare.pocket.world import World
from memshare.records import Memory, content_key, normalise

_WORLD_LEAST = (60, 280)


def as_memories(pool: str, pairs: Iterable[Pair]) -> list[Memory]:
    """``pairs`` as a pool's memories in their order; copies count once, as in a store."""
    found: dict[str, Memory] = {}
    for pair in pairs:
        key = content_key(pool, *pair)
        if pair.answer.strip() and key not in found:
            found[key] = Memory(
                key[:24], pool, *pair, None, None, None, "1970-01-01T00:00:00+00:00", {},
                len(found) + 1,
            )  # fmt: skip
    return list(found.values())


def load_data(config: Config) -> dict[str, Domain]:
    """The configured domains as they were published, by name.

    Seed memories and problems come in an order drawn by the seed: the published files go dataset by
    dataset, so that the first part of a pool would hold one dataset alone. Raises FileNotFoundError
    or ValueError saying what is missing or wrong.
    """
    folder = config.evaluation.data or data_root() / "nine"
    domains = load_domains(folder)
    names = {*domains, *(dataset for domain in domains.values() for dataset in domain.tests)}
    if taken := sorted(names & {AVERAGE, WORLD}):
        raise ValueError(
            f"{folder}: {' and '.join(taken)} can't be the name of a domain or a dataset: reports "
            "call the pocket world and the mean of all datasets so; rename the folder or the file"
        )

    def drawn(name: str, pairs: Sequence[Pair]) -> tuple[Pair, ...]:
        order = random.Random(f"{config.run.seed}/{name}").sample(pairs, len(pairs))
        return tuple(order[: config.evaluation.memories])

    return {
        name: replace(
            domain,
            pool=drawn(f"{name}/pool", domain.pool),
            problems=drawn(f"{name}/problems", domain.problems),
        )
        for name, domain in domains.items()
    }


def world_domain(seed: int, sizes: tuple[int, int, int]) -> Domain:
    """The pocket world as a domain: ``sizes`` seed memories, problems and test questions."""
    # Cut as if for a larger pool where it is small: a test's names must occur in what goes before.
    wide = max(sizes[0], _WORLD_LEAST[0]), max(sizes[1], _WORLD_LEAST[1]), sizes[2]
    splits = World(seed).splits(*wide)
    parts = [
        [Pair(task.prompt, task.answer) for task in tasks[:size]]
        for tasks, size in zip((splits.seed, splits.problems, splits.test), sizes, strict=True)
    ]
    keys = {t.prompt: t.key for t in (*splits.seed, *splits.problems, *splits.test)}
    return Domain(WORLD, tuple(parts[0]), tuple(parts[1]), {WORLD: tuple(parts[2])}, keys)


def long_world(config: Config) -> Domain | None:
    """The pocket world with ``evaluation.stream`` problems, if the configuration wants it."""
    sizes, problems = config.evaluation.world, config.evaluation.stream
    return sizes and world_domain(config.run.seed, (sizes[0], problems or sizes[1], sizes[2]))


def relevant_ids(
    domain: Domain, memories: Sequence[Memory], tests: Sequence[Pair]
) -> list[set[str]]:
    """For each test the memories of its group, by `Domain.keys`."""
    keys = {normalise(prompt): key for prompt, key in domain.keys.items()}
    groups: dict[str, set[str]] = {}
    for memory in memories:
        groups.setdefault(keys[normalise(memory.prompt)], set()).add(memory.id)
    return [groups.get(keys[normalise(test.prompt)], set()) for test in tests]
