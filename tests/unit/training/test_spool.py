"""Sequences on disk, and what a training run's data takes of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memshare.records import Example
from memshare.retrieval.text import memory_text
from memshare.training.examples import shard_path, write_marker, write_shard
from memshare.training.spool import Spool
from tests.tiny import tiny_encoder
from tests.training_data import candidate, example

CHARS = 16_000  # of a text
TEXTS = 4  # of an example: its query, a positive, two hard negatives
MOST_BYTES = 4_096  # kept in memory of an example, texts and all

# Writes, for each folder, the anonymous memory of the process once its examples are ready to train
# on. What the C library keeps for reuse is given back first.
MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
from memshare.config import EncoderConfig, TrainingConfig
from memshare.retrieval.encoder import Encoder
from memshare.training.batching import Batches
from memshare.training.examples import read_training
from memshare.training.select import select

def kept():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

config = TrainingConfig(hard_negatives=2)
encoder = Encoder.load(EncoderConfig(model=sys.argv[1], max_length=32, device="cpu"))
found, alive = [], []
for folder in sys.argv[2:]:
    before = kept()
    items = select(read_training([Path(folder)]), config).items
    alive.append(Batches(items, encoder, global_batch=8, seed=0))
    alive[-1].batch(3)
    found.append((len(items), kept() - before))
print(json.dumps(found))
"""


def test_rows_keep_their_place_and_are_gone_with_the_spool() -> None:
    spool = Spool[dict[str, int]](lambda row: [row], lambda line: line[0])
    assert [spool.append({"n": n}) for n in range(5)] == [0, 1, 2, 3, 4]
    assert len(spool) == 5 and list(spool) == [{"n": n} for n in range(5)]
    assert spool.append({"n": 5}) == 5  # reading and writing take turns
    assert spool[5] == spool[-1] == {"n": 5} and spool[1:3] == [{"n": 1}, {"n": 2}]
    spool.arrange([4, 0])
    assert list(spool) == [{"n": 4}, {"n": 0}] and len(spool) == 2
    with pytest.raises(IndexError):
        spool[2]


def long_examples(count: int) -> Iterator[Example]:
    for i in range(count):
        rows = [
            candidate(f"{i}-{rank}", memory_text(f"{i} {rank} " + CHARS * "x", "a"),
                      -1.0 - rank, f"a {i} {rank}", rank)
            for rank in range(TEXTS - 1)
        ]  # fmt: skip
        yield example(f"q{i}", query=f"{i} " + CHARS * "y", candidates=tuple(rows))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what a process takes")
def test_texts_do_not_stay_in_memory(tmp_path: Path) -> None:
    folders = []
    for count in (50, 200, 250):
        folder = tmp_path / str(count)
        folder.mkdir()
        made = list(long_examples(count))
        for shard in range(count // 50):
            write_shard(shard_path(folder, shard), made[50 * shard : 50 * shard + 50])
        write_marker(folder, {"shards": count // 50})
        folders.append(str(folder))
    encoder = str(tiny_encoder(tmp_path / "tiny"))
    alone = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1",
             "ARROW_DEFAULT_MEMORY_POOL": "system", "TMPDIR": str(tmp_path)}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, encoder, *folders],
        capture_output=True, text=True, check=True, env={**os.environ, **alone},
    )  # fmt: skip
    _, *found = json.loads(done.stdout.splitlines()[-1])
    # The first one pays for what every further one uses again.
    assert [count for count, _ in found] == [200, 250]
    assert max(grown / count for count, grown in found) < MOST_BYTES < CHARS * TEXTS / 7, found
    assert not list(tmp_path.glob("memshare-*"))  # what is on disk has no name
