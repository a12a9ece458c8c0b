"""Writing the files of a generation, or linking those that its parent has already."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memshare.files import fsync_dir, write_atomic, write_json
from memshare.progress import log
from memshare.retrieval.card import CARD, model_card
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.index import FlatIndex
from memshare.retrieval.manifest import (
    ROW_FILES,
    GenerationError,
    Manifest,
    blob_digest,
    folder_name,
    read_manifest,
    refuse_pickles,
)

_SAME_VECTOR = 1e-5  # rounding between two runs of one encoder over one text
_CARD_FILE = f"encoder/{CARD}"  # each generation's own: it tells of the gate and of the pools


def write_files(
    home: Path,
    folder: Path,
    manifest: Manifest,
    encoder: Encoder,
    vectors: npt.NDArray[np.float32],
    ids: Sequence[str],
    metrics: Mapping[str, Any],
) -> None:
    """All files but the manifest, fsynced; raises OSError early where they can't fit."""
    blob = np.array([item.encode() for item in ids] or [b""], dtype=np.bytes_)[: len(ids)]
    _link_parent(home, folder, manifest, vectors, blob)
    has_encoder, has_rows = (folder / "encoder").exists(), (folder / "ids.npy").exists()
    needed = (0 if has_encoder else weight_bytes(encoder)) + (
        0 if has_rows else vectors.nbytes + blob.nbytes
    )
    if needed > free_bytes(home):  # known now rather than after minutes of writing
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if not has_encoder:
        encoder.save(folder / "encoder")
        refuse_pickles(folder)
    if not has_rows:
        np.save(folder / "ids.npy", blob, allow_pickle=False)
        FlatIndex.build(vectors).save(folder / "index.faiss")
    write_atomic(folder / _CARD_FILE, model_card(encoder, metrics, manifest))
    for path in [item for item in folder.rglob("*") if item.is_file()]:
        _fsync(path)
    write_json(folder / "metrics.json", dict(metrics))
    for path in [item for item in folder.rglob("*") if item.is_dir()]:
        fsync_dir(path)


def _link_parent(
    home: Path,
    folder: Path,
    new: Manifest,
    vectors: npt.NDArray[np.float32],
    ids: npt.NDArray[np.bytes_],
) -> None:
    """Hard-link what the parent has already: the rows, the encoder, both or nothing.

    Only files that were just verified, or verified earlier by this process, are linked. A parent
    that is gone or damaged, or a file system without links, is no reason to fail: what is not
    linked is written.
    """
    if new.parent is None:
        return
    source = home / folder_name(new.parent)
    try:
        old = read_manifest(source)
        if old.memory_fingerprint != new.memory_fingerprint:
            return
        sound = {
            name for name, blob in old.files.items() if blob_digest(source / name) == blob.sha256
        }
        encoder_files = {name for name in old.files if name.startswith("encoder/")}
        wanted = set()
        if old.query_fingerprint == new.query_fingerprint and encoder_files <= sound:
            wanted |= encoder_files - {_CARD_FILE}
        if sound >= ROW_FILES and _same_rows(source, vectors, ids):
            wanted |= ROW_FILES
        for name in sorted(wanted):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(source / name, folder / name)
    except (GenerationError, OSError) as error:
        log(f"{source}: nothing is linked from it: {error}")
        shutil.rmtree(folder / "encoder", ignore_errors=True)
        for name in ROW_FILES:
            (folder / name).unlink(missing_ok=True)


def _same_rows(source: Path, vectors: npt.NDArray[np.float32], ids: npt.NDArray[np.bytes_]) -> bool:
    """Whether the parent's rows are these: the same ids, and vectors equal but for rounding."""
    theirs = np.load(source / "ids.npy", allow_pickle=False)
    if not np.array_equal(theirs, ids):
        return False
    index = FlatIndex.load(source / "index.faiss")
    old = index.reconstruct(np.arange(len(ids)))
    return old.shape == vectors.shape and bool(np.allclose(old, vectors, rtol=0, atol=_SAME_VECTOR))


def free_bytes(folder: Path) -> int:
    """Space left for files under ``folder``, which may not exist yet."""
    there = next(item for item in (folder, *folder.absolute().parents) if item.is_dir())
    return shutil.disk_usage(there).free


def weight_bytes(encoder: Encoder) -> int:
    """Size of the encoder's weights on disk."""
    return sum(int(item.numel() * item.element_size()) for item in encoder.model.parameters())


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
