"""Weak scaling of training and of encoding a pool: 1, 2 and 4 processes with as much work each.

Groups of 1, 2 and 4 processes, started by ``accelerate launch`` and kept, take turns within one
run, so that a shared machine's moods meet all of them. Every process has one thread, the single one
too. A group's efficiency is its rate over as many times the rate of one process: real tokens a
second in whole training steps (all-MiniLM-L6-v2, forward, backward, gradients summed over gloo,
AdamW), or memories a second from the store to the rows of a generation.

Two more processes that know nothing of each other run side by side as well: what they lose is the
machine's doing (memory bandwidth, clock), not ours. ``train_parts`` then says where a step of two
processes goes: computing, waiting for the other one (uneven shares), moving data.

Claims: ``train_efficiency_N`` and ``encode_efficiency_N`` for N = 2 and 4, and
``train_unconnected_2``, ``encode_unconnected_2``. N processes on fewer cores than N can't exceed
cores / N: four on two cores at most 0.5.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any

from common import ROOT, parser, write_claims

from memshare.config import ContinualConfig
from memshare.files import write_json
from memshare.progress import log
from memshare.training.child import accelerate_command

SIZES = (1, 2, 4)
BLOCKS = 4
QUERIES, MEMORIES = 16, 400  # a process: of one step, of a pool
READY_SECONDS = 300.0


class Group:
    """A launched group of processes, which works when it is its turn."""

    def __init__(self, folder: Path, processes: int, queries: int, memories: int, seed: int):
        """Start it; its first turn waits until it is ready."""
        folder.mkdir()
        self.folder, self.turns = folder, 0
        command = accelerate_command(ContinualConfig(num_processes=processes))
        command += ["--num_cpu_threads_per_process", "1"]
        command += [str(ROOT / "benchmarks" / "scaling_worker.py"), str(folder)]
        command += ["--queries", str(queries), "--memories", str(memories), "--seed", str(seed)]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment = {**os.environ, **threads, "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = str(ROOT)
        self.log_file = folder / "log"
        with self.log_file.open("wb") as output:
            self.child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            )

    def begin(self, what: str, count: int = 1) -> None:
        """Let it work; `finish` waits for it."""
        write_json(self.folder / f"turn-{self.turns}.json", {"what": what, "count": count})

    def finish(self) -> dict[str, Any]:
        """What the turn gave."""
        path = self.folder / f"done-{self.turns}.json"
        deadline = time.monotonic() + READY_SECONDS
        while not path.exists():
            if self.child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a group failed:\n{self.log_file.read_text()[-3000:]}")
            time.sleep(0.02)
        self.turns += 1
        done: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return done

    def close(self) -> None:
        """End it."""
        self.begin("end")
        try:
            self.child.wait(30)
        except subprocess.TimeoutExpired:
            self.child.terminate()
            self.child.wait()


def rate(done: dict[str, Any]) -> float:
    """Tokens or memories a second."""
    return float(done["units"]) / float(done["seconds"])


def main() -> None:
    """Measure and report."""
    args = parser(__doc__).parse_args()
    queries, memories, blocks = (4, 40, 1) if args.quick else (QUERIES, MEMORIES, BLOCKS)
    sizes = SIZES[:2] if args.quick else SIZES
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def start(name: str, processes: int) -> Group:
            group = Group(base / name, processes, queries, memories, args.seed)
            stack.callback(group.close)
            return group

        groups = {size: start(str(size), size) for size in sizes}
        apart = [groups[1], start("other", 1)]
        for group in (*groups.values(), apart[1]):  # warms up, one after the other
            group.begin("train")
            group.finish()
        rates: dict[str, dict[str, list[float]]] = {"train": {}, "encode": {}}
        for block in range(blocks):
            for what, found in rates.items():
                for size, group in groups.items():
                    group.begin(what)
                    found.setdefault(str(size), []).append(rate(group.finish()) / size)
                for group in apart:
                    group.begin(what)
                found.setdefault("unconnected_2", []).append(
                    mean([rate(group.finish()) for group in apart])
                )
                shown = ", ".join(f"{name}: {each[-1]:.1f}" for name, each in found.items())
                log(f"block {block + 1} of {blocks}, {what}, a second and process: {shown}")
        groups[2].begin("watch", 1 if args.quick else 5)
        watched = groups[2].finish()

    claims = {}
    for what, found in rates.items():
        alone = median(found["1"])
        for name, each in list(found.items())[1:]:
            key = name if name.startswith("un") else f"efficiency_{name}"
            claims[f"{what}_{key}"] = median(each) / alone
    moved, waited = mean(watched["move_seconds"]), mean(watched["wait_seconds"])
    parts = {
        "computing": 1.0 - (moved + waited) / watched["seconds"],
        "waiting": waited / watched["seconds"],
        "moving": moved / watched["seconds"],
    }
    write_claims(
        args, claims, model={"encoder": "all-MiniLM-L6-v2"},
        settings={"threads_a_process": 1, "queries": queries, "memories": memories,
                  "backend": "gloo over loopback"},
        train_parts={"processes": 2, **parts}, rates_a_process=rates,
    )  # fmt: skip


if __name__ == "__main__":
    main()
