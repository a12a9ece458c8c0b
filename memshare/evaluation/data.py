"""Readers for the data that the experiments run on.

``nine``: the datasets published with the paper, in three domains and one mixed pool (chat JSONL).
``banking77``: customer questions with fine-grained intents (Casanueva et al. 2020; CSV).
The folder is named by ``MEMSHARE_DATA``; by default it lies beside the project.
"""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

DOMAINS: dict[str, tuple[str, ...]] = {
    "literary": ("limerick", "lvshi", "sonnet"),
    "logic": ("puns", "puzzle", "riddles"),
    "plan": ("fitness", "study", "travel"),
}
CHINESE = frozenset({"lvshi"})  # no English model may average over these
SINGLE = "single"


class Pair(NamedTuple):
    """One question and its reference answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Domain:
    """One pool's material: seed memories, the questions that grow it, and its tests by dataset."""

    name: str
    pool: tuple[Pair, ...]
    problems: tuple[Pair, ...]
    tests: dict[str, tuple[Pair, ...]]


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
                pairs.append(Pair(turns["user"], turns["assistant"]))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a chat pair: {error!r}") from error
    return tuple(pairs)


def load_nine(root: Path | None = None) -> dict[str, Domain]:
    """The three domains, and ``single`` with the mixed pool and the tests of all nine datasets."""
    base = (root or data_root()) / "nine"
    domains = {
        name: Domain(
            name,
            read_chat(base / name / "pool.jsonl"),
            read_chat(base / name / "problems.jsonl"),
            {dataset: read_chat(base / name / f"test_{dataset}.jsonl") for dataset in datasets},
        )
        for name, datasets in DOMAINS.items()
    }
    domains[SINGLE] = Domain(
        SINGLE,
        read_chat(base / SINGLE / "pool.jsonl"),
        read_chat(base / SINGLE / "problems.jsonl"),
        {dataset: pairs for domain in domains.values() for dataset, pairs in domain.tests.items()},
    )
    return domains


def load_banking77(root: Path | None = None) -> tuple[list[Pair], list[Pair]]:
    """Training and test questions, each with its intent as the answer."""
    base = (root or data_root()) / "banking77"

    def read(path: Path) -> list[Pair]:
        with path.open(encoding="utf-8", newline="") as handle:
            return [Pair(row["text"].strip(), row["category"]) for row in csv.DictReader(handle)]

    return read(base / "train.csv"), read(base / "test.csv")
