"""Readers for the data that the experiments run on.

``nine``: the datasets published with the paper, in three domains and one mixed pool (chat JSONL).
``banking77``: customer questions with fine-grained intents (Casanueva et al. 2020; CSV).
The folder is named by ``MEMSHARE_DATA``; by default it lies beside the project.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

SINGLE = "single"
_IDEOGRAPHS = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


class Pair(NamedTuple):
    """One question and its reference answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Domain:
    """One pool's material: seed memories, the questions that grow it, and its tests by dataset.

    ``keys``: prompt -> group, where it is known which memories are relevant to which question:
    those of the same group.
    """

    name: str
    pool: tuple[Pair, ...]
    problems: tuple[Pair, ...]
    tests: dict[str, tuple[Pair, ...]]
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Seed memories and problems that have an answer, in their order."""
        return tuple(pair for pair in (*self.pool, *self.problems) if pair.answer.strip())


def by_characters(tests: Sequence[Pair]) -> bool:
    """Whether a dataset is in Chinese, so that English models can't read it and words mean nothing.

    That is: whether a third of its reference answers' characters are ideographs.
    """
    text = "".join("".join(test.answer.split()) for test in tests)
    return 3 * len(_IDEOGRAPHS.findall(text)) >= len(text) > 0


def data_root() -> Path:
    """The data folder; raises FileNotFoundError saying how to name another."""
    root = Path(os.environ.get("MEMSHARE_DATA", "../shared/data"))
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no data folder there; set MEMSHARE_DATA to one")
    return root


def read_chat(path: Path) -> tuple[Pair, ...]:
    """Read chat JSONL with one user and one assistant message a line."""
    pairs = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                turns = {turn["role"]: turn["content"] for turn in json.loads(line)["messages"]}
                pair = Pair(turns["user"], turns["assistant"])
                if not all(isinstance(text, str) for text in pair):
                    raise TypeError("content must be text")
                pairs.append(pair)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a chat pair: {error!r}") from error
    return tuple(pairs)


def load_domains(folder: Path) -> dict[str, Domain]:
    """The domains in ``folder``, one sub-folder each, by name.

    A domain has ``pool.jsonl``, ``problems.jsonl`` if there are any, and ``test_<dataset>.jsonl``.
    One without tests is a mixed pool, gets the tests of all others, and comes after them. Raises
    FileNotFoundError or ValueError saying what is missing.
    """
    domains = {}
    for home in sorted(path for path in folder.iterdir() if path.is_dir()):
        problems = home / "problems.jsonl"
        domains[home.name] = Domain(
            home.name,
            read_chat(home / "pool.jsonl"),
            read_chat(problems) if problems.exists() else (),
            {
                path.stem.removeprefix("test_"): read_chat(path)
                for path in sorted(home.glob("test_*.jsonl"))
            },
        )
    names = [dataset for domain in domains.values() for dataset in domain.tests]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{folder}: test_<dataset>.jsonl files with names of their own are needed")
    every = {name: pairs for domain in domains.values() for name, pairs in domain.tests.items()}
    return {
        name: domain if domain.tests else replace(domain, tests=every)
        for name, domain in sorted(domains.items(), key=lambda item: not item[1].tests)
    }


def load_nine() -> dict[str, Domain]:
    """The three domains, and ``single`` with the mixed pool and the tests of all nine datasets."""
    return load_domains(data_root() / "nine")


def load_banking77() -> tuple[list[Pair], list[Pair]]:
    """Training and test questions, each with its intent as the answer."""
    base = data_root() / "banking77"

    def read(path: Path) -> list[Pair]:
        with path.open(encoding="utf-8", newline="") as handle:
            return [Pair(row["text"].strip(), row["category"]) for row in csv.DictReader(handle)]

    return read(base / "train.csv"), read(base / "test.csv")
