"""Search speed: what does the searcher cost beside the FAISS index that it asks?

A million vectors (384 dimensions, unit length, loosely clustered, from the seed) are one pool. 128
client threads search it for the ten best, one question at a time and at once again, through the
worker thread that a gateway has: its queue, its micro-batches of up to 64, filters and tombstones,
the decision in float64, ids. Only the encoder is none: question i *is* vector i of a table. The
peer is the same FAISS index, called in a loop with the same questions in batches of 64, which
gives row numbers of float32 products. The two take turns. FAISS has the searcher's setting of when
to multiply matrices; ``faiss_default_qps`` is what it does with its own.

``qps_vs_faiss`` (goal: at least 0.9): questions a second, ours over FAISS's, flat index, mean of
the turns. Beside it the same with tombstones and filters, which FAISS is not asked for, for IVF
over the same vectors, and for HNSW over the first of them (its graph takes too long to build for a
million here), with recall@10 against exact search; and the memory that index and columns take per
vector, as the process's resident memory grew.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any, cast

import numpy as np
import psutil
from common import parser, write_claims

from memshare.arrays import Floats
from memshare.config import IndexConfig
from memshare.progress import log
from memshare.records import Memory, SearchAnswer
from memshare.retrieval.approximate import build_index
from memshare.retrieval.delta import Shard
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.filters import Filter, terms_of
from memshare.retrieval.serving import Query, Serving
from memshare.retrieval.worker import Worker

# isort: split
import faiss  # after torch, which the modules above have loaded

POOL, K, BATCH, CLIENTS, TURNS = "p", 10, 64, 128, 3
QUESTIONS = 2048
FAISS_DEFAULT = int(faiss.cvar.distance_compute_blas_threshold)  # before an index changes it
_BLOCK = 50_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """Vectors of the flat and IVF pools and of the HNSW pool; seconds a turn of flat, about."""

    rows: int
    graph_rows: int
    dim: int
    lists: int
    seconds: float


FULL, QUICK = Sizes(1_000_000, 30_000, 384, 1024, 10.0), Sizes(30_000, 5_000, 128, 128, 1.0)


def clustered(count: int, dim: int, seed: int, centres: Floats) -> Floats:
    """Unit vectors (count, dim) whose cosine with their centre is about 0.7."""
    rng = np.random.default_rng(seed)
    found = np.empty((count, dim), np.float32)
    for start in range(0, count, _BLOCK):
        block = found[start : start + _BLOCK]
        rng.standard_normal(out=block, dtype=np.float32)
        block /= np.float32(dim**0.5)
        block += centres[rng.integers(0, len(centres), len(block))]
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return found


class Table:
    """Stands where the encoder does: question "7" is the seventh vector."""

    def __init__(self, vectors: Floats) -> None:
        self.dim = vectors.shape[1]
        self._vectors = vectors

    def encode_queries(self, prompts: Sequence[str]) -> Floats:
        """The vectors that the prompts number."""
        return self._vectors[[int(prompt) for prompt in prompts]]


def memories(count: int) -> Iterator[Memory]:
    """A hundredth by ``ann`` about a rare topic, the others by ``bob``."""
    for i in range(count):
        rare = i % 100 == 0
        yield Memory(
            f"{i:09d}", POOL, "", "", None, "ann" if rare else "bob", None,
            "2026-01-01T00:00:00.000000Z", {"topic": "rare" if rare else "common"}, i + 1,
        )  # fmt: skip


class Bench:
    """One index, asked by FAISS's own call and through the worker."""

    def __init__(self, vectors: Floats, settings: IndexConfig, questions: Floats) -> None:
        process = psutil.Process()
        gc.collect()
        before = process.memory_info().rss
        began = time.perf_counter()
        self.index = build_index(vectors, settings)
        self.build_seconds = time.perf_counter() - began
        ids = np.array([f"{i:09d}".encode() for i in range(len(vectors))])
        self.shard = Shard(self.index.dim, self.index, ids, len(vectors))
        self.shard.load_columns(memories(len(vectors)))
        gc.collect()
        self.bytes_per_vector = (process.memory_info().rss - before) / len(vectors)
        self._questions = questions
        table = cast(Encoder, Table(questions))
        self._worker = Worker(BATCH, 0.003)
        self._worker.start()
        self._worker.swap(Serving(1, table, {POOL: self.shard}))

    def close(self) -> None:
        """Stop the worker."""
        self._worker.close()

    def faiss(self, batches: int, threshold: int | None = None) -> float:
        """Questions a second of the bare index; ``threshold``: a setting other than ours."""
        settings = faiss.cvar
        before = settings.distance_compute_blas_threshold
        settings.distance_compute_blas_threshold = threshold or before
        began = time.perf_counter()
        for batch in range(batches):
            start = batch * BATCH % QUESTIONS
            self.index.cpu.search(self._questions[start : start + BATCH], K)
        seconds = time.perf_counter() - began
        settings.distance_compute_blas_threshold = before
        return batches * BATCH / seconds

    def ours(self, batches: int, restrict: Filter | None = None) -> tuple[float, float]:
        """Questions a second through the worker, and the mean size of a batch."""
        each = batches * BATCH // CLIENTS
        before = self._worker.batches

        def client(number: int) -> None:
            for i in range(each):
                text = str((number * each + i) % QUESTIONS)
                answer = self._worker.submit(Query(POOL, text, K, restrict), 600).result()
                assert len(answer.hits) == K

        threads = [threading.Thread(target=client, args=(n,)) for n in range(CLIENTS)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
        return each * CLIENTS / seconds, each * CLIENTS / (self._worker.batches - before)

    def turns(self, seconds: float) -> dict[str, float]:
        """Both, in turns of about so many ``seconds``."""
        untuned = self.faiss(1, FAISS_DEFAULT)
        self.faiss(1)
        self.ours(2)
        batches = max(4, int(self.faiss(2) * seconds / BATCH) // 2 * 2)
        pairs = [(self.faiss(batches), self.ours(batches)) for _ in range(TURNS)]
        return {
            "faiss_default_qps": untuned,
            "faiss_qps": mean(bare for bare, _ in pairs),
            "qps": mean(own for _, (own, _) in pairs),
            "qps_vs_faiss": mean(own / bare for bare, (own, _) in pairs),
            "batch": mean(size for _, (_, size) in pairs),
            "build_seconds": self.build_seconds,
            "bytes_per_vector": self.bytes_per_vector,
        }

    def restricted(self, seconds: float, qps: float, restrict: Filter | None) -> float:
        """Questions a second with ``restrict``, or with the tombstones that there are."""
        return self.ours(max(2, int(qps * seconds / BATCH) // 2 * 2), restrict)[0]

    def recall(self, exact: Sequence[SearchAnswer]) -> float:
        """Share of the ten that exact search gives."""
        found = [self._worker.submit(Query(POOL, str(i), K), 600) for i in range(len(exact))]
        shares = [
            len({hit.id for hit in future.result().hits} & {hit.id for hit in truth.hits}) / K
            for future, truth in zip(found, exact, strict=True)
        ]
        return sum(shares) / len(shares)

    def answers(self, count: int) -> list[SearchAnswer]:
        """What the worker answers to the first ``count`` questions."""
        futures = [self._worker.submit(Query(POOL, str(i), K), 600) for i in range(count)]
        return [future.result() for future in futures]


def main() -> None:
    """Measure and report."""
    args = parser(__doc__).parse_args()
    sizes = QUICK if args.quick else FULL
    rng = np.random.default_rng(args.seed)
    centres = rng.standard_normal((max(10, sizes.rows // 200), sizes.dim), dtype=np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    vectors = clustered(sizes.rows, sizes.dim, args.seed + 1, centres)
    questions = clustered(QUESTIONS, sizes.dim, args.seed + 2, centres)
    sample = 128

    kinds: dict[str, dict[str, Any]] = {}
    flat = Bench(vectors, IndexConfig(), questions)
    kinds["flat"] = {"rows": sizes.rows, **flat.turns(sizes.seconds), "recall_at_10": 1.0}
    log(f"flat: {kinds['flat']}")
    qps, short = kinds["flat"]["qps"], sizes.seconds / 3
    common = Filter(terms=terms_of({"topic": "common"}))
    beside = {
        "qps_filter_agent_1_percent": flat.restricted(short, qps, Filter(agent="ann")),
        "qps_filter_metadata_99_percent": flat.restricted(short, qps, common),
    }
    exact = flat.answers(sample)
    gone = np.random.default_rng(args.seed).choice(sizes.rows, sizes.rows // 100, replace=False)
    flat.shard.reconcile({f"{i:09d}": None for i in gone.tolist()})
    beside["qps_tombstones_1_percent"] = flat.restricted(short, qps, None)
    log(f"flat: {beside}")
    flat.close()
    del flat

    near = {"approximate_from": 1, "nlist": sizes.lists}
    ivf = Bench(vectors, IndexConfig.model_validate({"kind": "ivf", **near}), questions)
    kinds["ivf"] = {"rows": sizes.rows, **ivf.turns(short)}
    kinds["ivf"]["recall_at_10"] = ivf.recall(exact)
    log(f"ivf: {kinds['ivf']}")
    ivf.close()
    del ivf

    part = vectors[: sizes.graph_rows].copy()
    del vectors
    graph = Bench(part, IndexConfig.model_validate({"kind": "hnsw", **near}), questions)
    kinds["hnsw"] = {"rows": sizes.graph_rows, **graph.turns(short)}
    truth = Bench(part, IndexConfig(), questions)
    kinds["hnsw"]["recall_at_10"] = graph.recall(truth.answers(sample))
    truth.close()
    graph.close()

    claims = {"qps_vs_faiss": kinds["flat"]["qps_vs_faiss"]}
    claims |= {"bytes_per_vector": kinds["flat"]["bytes_per_vector"]}
    write_claims(
        args, claims, sizes=asdict(sizes), kinds=kinds, flat_beside=beside,
        k=K, batch=BATCH, clients=CLIENTS, threads=_threads(),
        data="unit vectors around seeded centres; the encoder is a table of vectors",
    )  # fmt: skip


def _threads() -> int:
    """What FAISS may use."""
    return int(faiss.omp_get_max_threads())


if __name__ == "__main__":
    main()
