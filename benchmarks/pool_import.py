"""Importing a JSONL file into a pool, against bare sqlite3 writing the same rows.

The peer reads the same file, parses each line and writes it by ``executemany`` in batches of the
same size and with the same durability (WAL, synchronous=FULL) into one table with a primary key. It
checks no text, finds no duplicates and keeps no log: what ours takes beyond it is their price.

Claims: ``import_vs_sqlite3``, our seconds over the peer's (lower is better; the median of three
rounds), and ``peak_rss_growth_bytes``, by how much the process's peak memory grows when a file is
imported that is four times as long as the one imported before it (flat: close to nothing). Seconds
stand beside the claims.
"""

from __future__ import annotations

import json
import random
import resource
import sqlite3
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

from common import parser, write_claims

from memshare.pool.ids import new_id
from memshare.pool.store import PoolStore
from memshare.pool.transfer import BATCH, import_memories

WORDS = [
    "river", "stone", "lantern", "orbit", "copper", "meadow", "signal", "harbour", "velvet",
    "thunder", "maple", "ledger",
]  # fmt: skip


def write_rows(path: Path, count: int, seed: int) -> None:
    """Write ``count`` distinct memories of about 400 characters each."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as handle:
        for number in range(count):
            row = {
                "pool": "main",
                "prompt": f"Question {number}: " + " ".join(draw.choices(WORDS, k=20)),
                "answer": " ".join(draw.choices(WORDS, k=40)),
                "score": draw.randint(0, 100),
                "agent": f"agent-{number % 7}",
                "metadata": {"topic": draw.choice(WORDS)},
            }
            handle.write(json.dumps(row) + "\n")


def ours(path: Path, database: Path) -> float:
    """Seconds that our import takes."""
    with PoolStore.open(f"sqlite:///{database}") as store:
        store.create_pool("main")
        start = time.perf_counter()
        report = import_memories(store, "main", path)
        seconds = time.perf_counter() - start
    assert report.bad == 0 and report.duplicates == 0
    return seconds


def bare(path: Path, database: Path) -> float:
    """Seconds that sqlite3 takes for the same rows."""
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(
        "CREATE TABLE memories (id TEXT PRIMARY KEY, pool TEXT, prompt TEXT, answer TEXT, "
        "score REAL, agent TEXT, metadata TEXT)"
    )
    start = time.perf_counter()
    with path.open("rb") as handle:
        while lines := list(islice(handle, BATCH)):
            connection.execute("BEGIN")
            connection.executemany(
                "INSERT INTO memories VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (new_id(), r["pool"], r["prompt"], r["answer"], r["score"], r["agent"],
                     json.dumps(r["metadata"]))
                    for r in map(json.loads, lines)
                ],
            )  # fmt: skip
            connection.execute("COMMIT")
    seconds = time.perf_counter() - start
    connection.close()
    return seconds


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure and report."""
    args = parser(__doc__).parse_args()
    rows, rounds = (10_000, 1) if args.quick else (100_000, 3)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_rows(root / "quarter.jsonl", rows // 4, args.seed)
        write_rows(root / "rows.jsonl", rows, args.seed)
        ours(root / "quarter.jsonl", root / "warm.db")
        before = peak_bytes()
        first = ours(root / "rows.jsonl", root / "ours-0.db")
        growth = peak_bytes() - before
        mine = [first]
        peer = [bare(root / "rows.jsonl", root / "bare-0.db")]
        for number in range(1, rounds):
            mine.append(ours(root / "rows.jsonl", root / f"ours-{number}.db"))
            peer.append(bare(root / "rows.jsonl", root / f"bare-{number}.db"))
    ratio = statistics.median(a / b for a, b in zip(mine, peer, strict=True))
    write_claims(
        args,
        {"import_vs_sqlite3": ratio, "peak_rss_growth_bytes": growth},
        rows=rows,
        seconds={"memshare": mine, "sqlite3": peer},
    )


if __name__ == "__main__":
    main()
