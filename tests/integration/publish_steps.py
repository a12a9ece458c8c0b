"""Program of `test_publish_crash`: publish, and die at one step of it, for every step.

A step is whatever changes the disk, or locks: opening for writing, rename, link, mkdir, unlink,
rmdir, chmod, fsync, flock. Each attempt runs in a forked child that exits like a killed process
just before step i, so no ``finally`` and no buffer flush runs. The parent then checks what is left.
Usage: publish_steps.py RUN_DIR ENCODER NEW_ENCODER; prints one JSON object.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from memshare.retrieval.build import Built, build_generation
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.generation import current, load, load_current, verify_generation
from memshare.retrieval.publish import publish
from tests.retrieving import fill, make_config, open_store, publish_now

KILLED = 86
EVENTS = {"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"}


class Steps:
    """Counts steps, keeps their names, and dies before step ``fatal``."""

    def __init__(self, fatal: int | None) -> None:
        self.fatal = fatal
        self.names: list[str] = []
        sys.addaudithook(self._audit)
        self._wrap(os, "fsync")
        self._wrap(fcntl, "flock")

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS:
            self._step(f"{event} {args[0]}")
        elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self._step(f"open {args[0]}")

    def _wrap(self, module: Any, name: str) -> None:
        real = getattr(module, name)

        def counted(fd: Any, *rest: Any) -> Any:
            number = fd if isinstance(fd, int) else fd.fileno()
            self._step(f"{name} {os.readlink(f'/proc/self/fd/{number}')}")
            return real(fd, *rest)

        setattr(module, name, counted)

    def _step(self, name: str) -> None:
        if len(self.names) == self.fatal:
            os._exit(KILLED)
        self.names.append(name)


def in_child(
    home: Path, encoder: Encoder, built: Built, fatal: int | None
) -> tuple[int, list[str]]:
    """Publish in a forked child; its exit code and, where it lived, its steps."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            steps = Steps(fatal)
            publish(home, encoder=encoder, parent=1, metrics={}, keep=1, **built.parts())
            names = list(steps.names)
            steps.fatal = None
            with os.fdopen(write, "w") as out:
                json.dump(names, out)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as source:
        text = source.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, json.loads(text) if text else []


def check(home: Path, old: Built, new: Built) -> str:
    """What is CURRENT now; anything but the whole old or the whole new one is an error."""
    generation = load_current(home, device="cpu")
    assert generation is not None
    built = {1: old, 2: new}[generation.number]
    assert generation.number == current(home), "CURRENT itself must load"
    assert [item.decode() for item in generation.ids["p"]] == built.ids
    rows = np.arange(len(built.ids))
    assert np.array_equal(generation.indexes["p"].reconstruct(rows), built.vectors)
    assert generation.manifest.memory_fingerprint == built.built_by
    generation.close()
    return "old" if generation.number == 1 else "new"


def main() -> None:
    """Count the steps, then die at each of them."""
    run_dir, encoder_folder, new_folder = map(Path, sys.argv[1:])
    config = make_config(run_dir / "run", encoder_folder)
    old_encoder = Encoder.from_folder(encoder_folder, device="cpu")
    new_encoder = Encoder.from_folder(new_folder, device="cpu")
    with open_store(config) as store:
        fill(store, "p", 20)
        old = build_generation(store, config, old_encoder)
        publish_now(store, config, old_encoder)
        fill(store, "p", 10, seed=1)
        new = build_generation(store, config, new_encoder)
    before = run_dir / "before"
    shutil.copytree(config.retriever_dir, before)

    def fresh(name: str) -> Path:
        home = run_dir / name / "main"
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(before, home)
        return home

    home = fresh("whole")
    code, names = in_child(home, new_encoder, new, None)
    assert code == 0 and check(home, old, new) == "new"
    left: list[str] = []
    for fatal in range(len(names)):
        home = fresh("torn")
        code, _ = in_child(home, new_encoder, new, fatal)
        assert code == KILLED, f"step {fatal} ({names[fatal]}): exit code {code}"
        left.append(check(home, old, new))
        # The next publish goes through, sweeps what was left, and is whole.
        number = publish(home, encoder=new_encoder, parent=1, metrics={}, keep=1, **new.parts())
        verify_generation(home, number)
        loaded = load(home, device="cpu")
        assert loaded.number == number
        loaded.close()
        entries = {item.name for item in home.iterdir()}
        assert entries == {"CURRENT", ".lock", ".leases", f"{number:06d}"}, entries
    print(json.dumps({"steps": names, "left": left}))


if __name__ == "__main__":
    main()
