"""A publish that is killed at any step leaves the old or the new generation, whole; so does a full
disk, which leaves the old one and says what it would have needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memshare.retrieval.build import build_generation
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.generation import current, verify_generation
from memshare.retrieval.publish import PublishError, publish
from tests import disks
from tests.retrieving import fill, make_config, open_store, publish_now
from tests.tiny import tiny_encoder

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_at_every_step(tmp_path: Path) -> None:
    folders = [tiny_encoder(tmp_path / f"encoder-{seed}", seed=seed) for seed in range(2)]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("publish_steps.py")), tmp_path, *folders],
        capture_output=True, text=True, timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    steps, left = result["steps"], result["left"]
    assert len(steps) > 30
    # Old up to the rename that moves CURRENT, new from the step after it.
    move = next(i for i, step in enumerate(steps) if re.match(r"os.rename .*\.CURRENT\.", step))
    assert left == ["old"] * (move + 1) + ["new"] * (len(steps) - move - 1)
    assert 0 < move < len(steps) - 1
    check_order(steps, move)


def check_order(steps: list[str], move: int) -> None:
    """Every file is fsynced before the rename, the manifest after all the others."""
    rename = next(i for i, s in enumerate(steps) if re.match(r"os.rename .*/\.tmp-\w+$", s))
    synced = [s.split()[1] for s in steps[:rename] if s.startswith("fsync")]
    names = {Path(path).name for path in synced}
    assert {"model.safetensors", "tokenizer.json", "index.faiss", "ids.npy", "encoder"} <= names
    manifest = next(i for i, path in enumerate(synced) if ".manifest.json." in path)
    later = {Path(path).name for path in synced[manifest + 1 :]}
    assert all(name.startswith((".tmp-", ".CURRENT.")) for name in later), later
    assert rename < move
    assert any(s.startswith("fsync") and s.endswith("/main") for s in steps[rename:move])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB."""
    with disks.small_disk(tmp_path / "disk", "1536k") as folder:
        yield folder


def tree(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.name not in (".lock", ".leases") and path.parent.name != ".leases"
    }


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, foreseen: bool
) -> None:
    """More and more space is left, so that every write in turn is the one to fail.

    Not ``foreseen``: the disk fills up after the check that most of these cases would end at.
    """
    if not foreseen:
        monkeypatch.setattr("memshare.retrieval.blobs.free_bytes", lambda folder: 1 << 40)
    folders = [tiny_encoder(tmp_path / f"encoder-{seed}", seed=seed) for seed in range(2)]
    config = make_config(tmp_path / "run", folders[0])
    old, new = (Encoder.from_folder(folder, device="cpu") for folder in folders)
    home = small_disk / "generations" / "main"
    with open_store(config) as store:
        fill(store, "p", 50)
        built = build_generation(store, config, old)
        publish(home, encoder=old, parent=None, metrics={}, keep=3, **built.parts())
        rebuilt = build_generation(store, config, new)
    before = tree(home)
    page = os.sysconf("SC_PAGE_SIZE")
    ballast = small_disk / "ballast"
    causes: set[str] = set()
    fails = room = 0
    while True:
        ballast.write_bytes(b"")
        free = shutil.disk_usage(small_disk).free
        ballast.write_bytes(b"\0" * max(0, free - room))
        try:
            number = publish(home, encoder=new, parent=1, metrics={}, keep=3, **rebuilt.parts())
        except PublishError as error:
            said = r"the disk is full; about \d+ bytes are needed, \d+ are free"
            assert re.search(said, str(error)), error
            causes.add(type(error.__cause__).__name__)
            fails += 1
        else:
            break
        assert tree(home) == before
        assert current(home) == 1
        verify_generation(home, 1)
        room += page
    assert fails > 20, "the disk was hardly ever full"
    assert foreseen or len(causes) > 1, causes  # ours, and those of the libraries that write
    assert number == 2 == current(home)
    verify_generation(home, 2)


def test_a_full_disk_before_anything_was_published(tmp_path: Path, small_disk: Path) -> None:
    folder = tiny_encoder(tmp_path / "encoder")
    config = make_config(tmp_path / "run", folder)
    encoder = Encoder.from_folder(folder, device="cpu")
    disks.fill_up(small_disk)
    with open_store(config) as store:
        fill(store, "p", 5)
        built = build_generation(store, config, encoder)
        with pytest.raises(PublishError, match="the disk is full"):
            publish(
                small_disk / "generations" / "main", encoder=encoder, parent=None, metrics={},
                keep=3, **built.parts(),
            )  # fmt: skip
        assert publish_now(store, config, encoder) == 1  # elsewhere there is room
