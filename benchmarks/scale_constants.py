"""What a memory costs apart from models: bytes and seconds of pool, BM25, examples, generation.

The constants that benchmarks/scale_plan.py multiplies, each measured on real parts of the system at
two sizes of one pool, one thread, so that it shows whether a cost grows with the memory or with the
pool. Memories are random words, log-normal around 55 tokens, as in benchmarks/scaling.py.

Claims: ``NAME`` per memory (or per query, per row: see the names) at the larger size, and
``NAME_growth``, the larger size's figure over the smaller one's: 1 where cost per unit is constant.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import faiss
import numpy as np
from common import parser, write_claims
from random_texts import words_of
from scaling_worker import MEMORY_TOKENS, MODEL, text

from memshare.config import BM25Config, EncoderConfig
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.records import Candidate, Example, NewMemory, answer_key
from memshare.retrieval.bm25 import BM25
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.index import FlatIndex
from memshare.retrieval.publish import publish
from memshare.retrieval.text import memory_text
from memshare.training.examples import write_shard
from memshare.training.select import text_key

T = TypeVar("T")
SIZES = (10_000, 40_000)
CANDIDATES = 24
QUERIES = 256
VECTOR_ROWS = 4  # vectors a memory's text is worth: search is measured over more rows


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what it gave."""
    began = time.perf_counter()
    made = call()
    return time.perf_counter() - began, made


def folder_bytes(folder: Path, *names: str) -> int:
    """Bytes of the files of these names anywhere in ``folder``; of all without names."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files if not names or path.name.startswith(names))


def measure(count: int, encoder: Encoder, folder: Path, seed: int) -> dict[str, float]:
    """The constants at one size of the pool."""
    draw, words = random.Random(seed), words_of(encoder)

    def half() -> str:
        return text(draw, words, MEMORY_TOKENS // 2)

    rows = [NewMemory("main", half(), half()) for _ in range(count)]
    with PoolStore.open(f"sqlite:///{folder / 'pool.db'}") as store:
        store.create_pool("main")
        append, _ = timed(
            lambda: [store.append(rows[start : start + 1000]) for start in range(0, count, 1000)]
        )
        read, memories = timed(lambda: list(store.iter("main")))
    pool_bytes = folder_bytes(folder, "pool.db")

    texts = [memory_text(item.prompt, item.answer) for item in memories]
    ids = [item.id for item in memories]
    fit, bm25 = timed(lambda: BM25(BM25Config()).fit(ids, texts))
    asked = draw.sample(memories, min(QUERIES, count))
    propose, _ = timed(lambda: bm25.top([item.prompt for item in asked], CANDIDATES))

    examples = [
        Example(
            item.id, item.prompt, item.answer, "main", None, 1, item.seq, "scorer", "likelihood",
            -3.0,
            tuple(
                Candidate(
                    ids[i], texts[i], rank, -2.5, answer_key(ids[i]), rank, text_key(ids[i])
                )
                for rank, i in enumerate(draw.sample(range(count), CANDIDATES))
            ),
        )
        for item in asked
    ]  # fmt: skip
    write_shard(folder / "examples.parquet", examples)

    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((count, encoder.dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    root = folder / "generations"
    publishing, _ = timed(
        lambda: publish(
            root / "main", encoder=encoder, vectors=vectors, ids=ids, spans={"main": (0, count)},
            positions={"main": count}, metrics={}, parent=None, keep=1,
        )
    )  # fmt: skip
    whole = folder_bytes(root)
    index = FlatIndex.build(np.tile(vectors, (VECTOR_ROWS, 1)))
    batch = vectors[generator.integers(count, size=32)]
    index.search(batch, 10)
    search = min(timed(lambda: index.search(batch, 10))[0] for _ in range(3)) / len(batch)
    log(f"{count} memories: pool {append:.1f} s, BM25 {fit:.1f} s, publish {publishing:.1f} s")
    return {
        "pool_bytes_per_memory": pool_bytes / count,
        "append_seconds_per_memory": append / count,
        "read_seconds_per_memory": read / count,
        "bm25_fit_seconds_per_memory": fit / count,
        "bm25_seconds_per_query_and_memory": propose / len(asked) / count,
        "example_bytes_per_query": folder_bytes(folder, "examples.parquet") / len(examples),
        "id_bytes_per_memory": folder_bytes(root, "ids") / count,
        "vector_bytes_per_dimension": folder_bytes(root, "index") / count / encoder.dim,
        "publish_seconds_per_byte": publishing / whole,
        "flat_seconds_per_query_row_and_dimension": search / len(index) / encoder.dim,
    }


def main() -> None:
    """Measure and report."""
    args = parser(__doc__).parse_args()
    faiss.omp_set_num_threads(1)
    sizes = tuple(size // 10 for size in SIZES) if args.quick else SIZES
    encoder = Encoder.load(EncoderConfig(model=MODEL, device="cpu"))
    found = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            found[size] = measure(size, encoder, Path(folder), args.seed)
    small, large = (found[size] for size in sizes)
    claims = dict(large)
    claims |= {f"{name}_growth": value / small[name] for name, value in large.items()}
    write_claims(
        args, claims, model={"encoder": MODEL, "dimensions": encoder.dim},
        settings={"memories": sizes, "candidates": CANDIDATES, "threads": 1},
    )  # fmt: skip


if __name__ == "__main__":
    main()
