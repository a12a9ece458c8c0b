"""A filled pool and two generations over it, made once, for benchmarks/swap_under_load.py."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import ROOT

from memshare.config import Config, load_config
from memshare.files import write_json
from memshare.pocket.world import World
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.records import NewMemory
from memshare.retrieval.build import build_generation
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.publish import publish

sys.path.append(str(ROOT))
from tests.swapping import Expected
from tests.tiny import tiny_encoder

POOL, RETRIEVER = "world", "main"
GENERATIONS = (1, 2)


def texts(first_world: int) -> Iterator[tuple[str, str]]:
    """Prompts and answers without end, all different."""
    seen: set[tuple[str, str]] = set()
    for seed in itertools.count(first_world):
        for task in World(seed).tasks():
            if (pair := (task.prompt, task.answer)) not in seen:
                seen.add(pair)
                yield pair


class Prepared:
    """A folder with a filled pool and two generations over it."""

    def __init__(self, folder: Path, memories: int, dim: int) -> None:
        self.folder = folder
        self._encoders = {n: folder / f"encoder-{n}" for n in GENERATIONS}
        self._marker = folder / "prepared.json"
        if not self._marker.exists():
            self._make(memories, dim)
            write_json(self._marker, {"memories": memories, "dim": dim})

    def config(self, run: str, **sections: Any) -> Path:
        """A gateway's configuration file, its run folder ``run`` within this one."""
        llm = {"backend": "openai", "model": "none", "url": "http://127.0.0.1:9", "retries": 0}
        tree = {
            "run": {"dir": str(self.folder / run), "generations": str(self.folder / "generations")},
            "database_url": f"sqlite:///{self.folder / 'pool.db'}",
            "pools": {POOL: {}},
            "encoder": {"model": str(self._encoders[1]), "device": "cpu"},
            "retriever": {"name": RETRIEVER, "gpu": "off"},
            "agent_llm": llm,
            "scorer_llm": llm,
            **sections,
        }
        (self.folder / run).mkdir(exist_ok=True)
        (self.folder / run / "gateway.json").unlink(missing_ok=True)
        path = self.folder / run / "config.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    def copy_to(self, database: str) -> None:
        """The memories, under the same ids and at the same positions, in another database."""
        with PoolStore.open(database) as target:
            target.create_pool(POOL)
            target.append(
                [
                    NewMemory(POOL, prompt, answer, id=id)
                    for id, prompt, answer in self.memories()[: self.steady]
                ]
            )

    def memories(self) -> list[tuple[str, str, str]]:
        """Id, prompt and answer, in order: first what was there before any load."""
        with PoolStore.open(load_config(self.config("check")).url) as store:
            return [(memory.id, memory.prompt, memory.answer) for memory in store.iter(POOL)]

    @property
    def steady(self) -> int:
        """How many memories were there before any load."""
        return len(np.load(self.folder / "vectors-1.npy", mmap_mode="r"))

    def expected(
        self, questions: Sequence[str], written: Sequence[tuple[str, str, str]]
    ) -> dict[int, Expected]:
        """What each generation gives for ``questions``: by its encoder, from the texts.

        ``written``: memories that came in the other database.
        """
        everything = [*self.memories(), *written]
        columns = {id: column for column, (id, _, _) in enumerate(everything)}
        models = {}
        for number in GENERATIONS:
            encoder = Encoder.from_folder(self._encoders[number], device="cpu")
            pairs = [(prompt, answer) for _, prompt, answer in everything[self.steady :]]
            late = encoder.encode_memories(pairs)
            vectors = np.concatenate([np.load(self.folder / f"vectors-{number}.npy"), late])
            similarities = encoder.encode_queries(questions) @ vectors.T
            models[number] = Expected(similarities, columns, self.steady)
        return models

    def crossed(self, questions: Sequence[str]) -> dict[int, Expected]:
        """As `expected`, of queries by one generation's encoder in the other one's vectors."""
        ids = [id for id, _, _ in self.memories()[: self.steady]]
        columns = {id: column for column, id in enumerate(ids)}
        models = {}
        for number, other in (GENERATIONS, GENERATIONS[::-1]):
            encoder = Encoder.from_folder(self._encoders[number], device="cpu")
            vectors = np.load(self.folder / f"vectors-{other}.npy")
            similarities = encoder.encode_queries(questions) @ vectors.T
            models[number] = Expected(similarities, columns, len(ids))
        return models

    def _make(self, memories: int, dim: int) -> None:
        for number in GENERATIONS:
            tiny_encoder(self._encoders[number], seed=number, dim=dim)
        config: Config = load_config(self.config("prepare"))
        with PoolStore.open(config.url) as store:
            store.create_pool(POOL)
            log(f"writing {memories} memories")
            pairs = itertools.islice(texts(0), memories)
            store.append([NewMemory(POOL, prompt, answer) for prompt, answer in pairs])
            for number in GENERATIONS:
                encoder = Encoder.from_folder(self._encoders[number], device="cpu")
                built = build_generation(store, config, encoder)
                np.save(self.folder / f"vectors-{number}.npy", built.vectors)
                publish(
                    config.retriever_dir, encoder=encoder, parent=None, metrics={},
                    keep=len(GENERATIONS), **built.parts(),
                )  # fmt: skip
