"""The real path, for benchmarks: our own programs as child processes over a work folder.

A `Work` is one run folder with its configuration file. It fills the pools, runs one round of
``train/continual.py`` as a user would (mining, ``accelerate launch train/contrastive.py``, index,
gate, publishing), and searches through the hot-swapping searcher. What the programs print goes to
``logs/`` in the folder, and the tail of it into the error when one fails.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from common import ROOT

from memshare.config import Config, load_config
from memshare.evaluation.data import Pair
from memshare.pocket.lm import lm_folder
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.records import Example, Memory, NewMemory, SearchAnswer, normalise
from memshare.retrieval.searcher import Searcher
from memshare.training.examples import read_training, round_dir
from memshare.training.journal import Journal

_TAIL_CHARS = 2000
_SEARCH_SECONDS = 1800.0  # all questions are queued at once, so the last one waits for the others


class ProgramFailed(RuntimeError):
    """One of our programs ended with an error; the message has the end of its log."""


def environment() -> dict[str, str]:
    """This process's environment, with as many threads as there are cores unless it says.

    They may spin while they wait: a benchmark runs one program at a time.
    """
    cores = str(len(os.sched_getaffinity(0)))
    return {"OMP_NUM_THREADS": cores, "TOKENIZERS_PARALLELISM": "false", **os.environ}


def run_program(words: Sequence[str], logfile: Path) -> None:
    """Run ``words`` to their end with all output in ``logfile``; raises `ProgramFailed`."""
    logfile.parent.mkdir(parents=True, exist_ok=True)
    with logfile.open("ab") as output:
        done = subprocess.run(
            words, stdout=output, stderr=subprocess.STDOUT, env=environment(), check=False
        )
    if done.returncode:
        tail = logfile.read_text(encoding="utf-8", errors="replace")[-_TAIL_CHARS:]
        raise ProgramFailed(f"{' '.join(words)} ended with {done.returncode}; {logfile}:\n{tail}")


def build_pocket_lm(logs: Path) -> dict[str, Any]:
    """Train the pocket LM unless the user's cache has it; returns its own report."""
    run_program([sys.executable, str(ROOT / "train" / "pocket_lm.py")], logs / "pocket_lm.log")
    report: dict[str, Any] = json.loads((lm_folder() / "report.json").read_text(encoding="utf-8"))
    return report


class Work:
    """One run folder and its configuration."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Write ``settings`` as ``config.yaml`` into ``folder`` and load them.

        Neighbouring folders share one cache of likelihoods, so that none is measured twice.
        """
        folder.mkdir(parents=True)
        cache = folder.parent / "cache"
        cache.mkdir(exist_ok=True)
        (folder / "cache").symlink_to(cache, target_is_directory=True)
        self.folder = folder
        self.file = folder / "config.yaml"
        tree = {
            **settings,
            "run": {**settings.get("run", {}), "dir": str(folder)},
            "continual": {"min_new": 1, "poll_seconds": 0.1},
        }
        self.file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        self.config: Config = load_config(self.file)

    def learn(self) -> dict[str, Any]:
        """One round; what mining, training and indexing reported, by step.

        Raises `ProgramFailed`, also where no generation came of it.
        """
        program = str(ROOT / "train" / "continual.py")
        logfile = self.folder / "logs" / "round.log"
        log(f"{self.folder.name}: mining, training, indexing")
        run_program([sys.executable, program, "--config", str(self.file), "--once"], logfile)
        done = Journal.load(self.folder / "continual.json").rounds[-1]
        if done.outcome != "published":
            raise ProgramFailed(f"{self.folder}: the round ended {done.outcome}: {done.results}")
        return dict(done.results)

    def mine(self) -> list[Example]:
        """All of the pools mined by ``train/mine.py``. Raises `ProgramFailed`."""
        program = str(ROOT / "train" / "mine.py")
        words = [sys.executable, program, "--config", str(self.file), "--round", "1"]
        run_program(words, self.folder / "logs" / "mine.log")
        return list(read_training([round_dir(self.config.examples_dir, 1)]))

    def fill(self, pairs: Mapping[str, Sequence[Pair]]) -> dict[str, list[Memory]]:
        """Make each pool of ``pairs``; returns their memories. Copies are stored once."""
        with PoolStore.open(self.config.url) as store:
            for pool, items in pairs.items():
                settings = self.config.pools[pool]
                store.create_pool(pool, settings.rubric, settings.threshold)
                store.append([NewMemory(pool, pair.prompt, pair.answer) for pair in items])
            return {pool: list(store.iter(pool)) for pool in pairs}

    @contextmanager
    def searcher(self) -> Iterator[SearchAll]:
        """The searcher over what is published now; the encoder as configured before that."""
        with (
            PoolStore.open(self.config.url) as store,
            Searcher(store, self.config) as searcher,
        ):
            searcher.wait_ready(_SEARCH_SECONDS)
            yield SearchAll(searcher, store)


class SearchAll:
    """Many questions at once through a `Searcher`; ``generation`` is the one that answered."""

    def __init__(self, searcher: Searcher, store: PoolStore) -> None:
        self._searcher = searcher
        self._store = store
        self.generation = searcher.stats().generation

    def __call__(
        self, pool: str, questions: Sequence[str], k: int, *, copies: bool = False
    ) -> list[list[str]]:
        """The k best ids of each question.

        Unless ``copies``, a memory that is a copy of the question (equal prompt up to case and
        white space) is left out: a question is not answered with itself.
        """
        own: dict[str, set[str]] = {}
        if not copies:
            for memory in self._store.iter(pool):
                own.setdefault(normalise(memory.prompt), set()).add(memory.id)
        excluded = [own.get(normalise(question), set()) for question in questions]
        answers = asyncio.run(self._search(pool, questions, [k + len(e) for e in excluded]))
        if {answer.generation for answer in answers} - {self.generation}:
            raise RuntimeError("the generation was swapped during the measurement")
        return [
            [hit.id for hit in answer.hits if hit.id not in out][:k]
            for answer, out in zip(answers, excluded, strict=True)
        ]

    async def _search(
        self, pool: str, questions: Sequence[str], widths: Sequence[int]
    ) -> list[SearchAnswer]:
        return await asyncio.gather(
            *(
                self._searcher.asearch(pool, question, width, timeout=_SEARCH_SECONDS)
                for question, width in zip(questions, widths, strict=True)
            )
        )
