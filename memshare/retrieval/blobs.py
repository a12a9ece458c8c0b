"""Writing the files of a generation, or linking those that its parent has already."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memshare.arrays import Floats
from memshare.config import IndexConfig
from memshare.files import fsync_tree, write_atomic, write_json
from memshare.progress import log
from memshare.retrieval.approximate import build_index, recall_at_10
from memshare.retrieval.card import CARD, model_card
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.index import FlatIndex
from memshare.retrieval.index_file import read_indexes, write_indexes
from memshare.retrieval.manifest import (
    ROW_FILES,
    GenerationError,
    Manifest,
    blob_digest,
    folder_name,
    in_order,
    read_manifest,
    refuse_pickles,
)

_SAME_VECTOR = 1e-5  # rounding between two runs of one encoder over one text
# Settings that decide what an index holds and finds; the others are about when, and whether.
_BUILDS = {
    "kind", "nlist", "nprobe", "links", "ef_construction", "ef_search", "approximate_from",
    "precision",
}  # fmt: skip
_CARD_FILE = f"encoder/{CARD}"  # each generation's own: it tells of the gate and of the pools


class PoorIndex(GenerationError):
    """An index finds less than ``retriever.index.recall_floor``; it says what to change."""


def write_files(
    home: Path,
    folder: Path,
    manifest: Manifest,
    encoder: Encoder,
    vectors: Floats,
    ids: Sequence[str],
    metrics: Mapping[str, Any],
    settings: IndexConfig,
) -> Manifest:
    """All files but the manifest, fsynced; raises OSError early where they can't fit.

    Returns ``manifest`` with what is known of the indexes. Raises `PoorIndex` where one finds less
    than ``settings.recall_floor``.
    """
    manifest = replace(manifest, index=settings.model_dump(include=_BUILDS))
    blob = np.array([item.encode() for item in ids] or [b""], dtype=np.bytes_)[: len(ids)]
    parent = _link_parent(home, folder, manifest, vectors, blob)
    has_encoder, has_rows = (folder / "encoder").exists(), (folder / "ids.npy").exists()
    needed = (0 if has_encoder else weight_bytes(encoder)) + (
        0 if has_rows else index_bytes(vectors.shape, settings) + blob.nbytes
    )
    if needed > free_bytes(home):  # known now rather than after minutes of writing
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if not has_encoder:
        encoder.save(folder / "encoder")
        refuse_pickles(folder)
    if not has_rows:
        np.save(folder / "ids.npy", blob, allow_pickle=False)
        indexes = _build(manifest, vectors, settings)
        recall = {pool: recall_at_10(index) for pool, index in indexes.items()}
        approximate = {pool: recall[pool] for pool in recall if indexes[pool].kind != "flat"}
        manifest = replace(manifest, recall_at_10=approximate)
        write_indexes(folder / "index.faiss", list(indexes.values()))
        del indexes
    elif parent is not None:
        manifest = replace(manifest, recall_at_10=parent.recall_at_10)
    _check_recall(manifest.recall_at_10, settings.recall_floor)
    write_atomic(folder / _CARD_FILE, model_card(encoder, metrics, manifest))
    write_json(folder / "metrics.json", dict(metrics))
    fsync_tree(folder)
    return manifest


def _build(manifest: Manifest, vectors: Floats, settings: IndexConfig) -> dict[str, FlatIndex]:
    """Each pool's index, in the order of their rows."""
    return {
        pool: build_index(vectors[start:stop], settings)
        for pool, (start, stop) in in_order(manifest.spans)
    }


def _check_recall(recall: Mapping[str, float], floor: float) -> None:
    """Raise `PoorIndex` where a pool's index finds less than ``floor``."""
    low = [f"{pool} {found:.3f}" for pool, found in recall.items() if found < floor]
    if low:
        raise PoorIndex(
            f"recall@10 against exact search is below retriever.index.recall_floor {floor:g}: "
            f"{', '.join(low)}. Raise retriever.index.nprobe (ivf) or ef_search, ef_construction "
            "and links (hnsw), lower recall_floor, or choose kind flat"
        )


def _link_parent(
    home: Path,
    folder: Path,
    new: Manifest,
    vectors: Floats,
    ids: npt.NDArray[np.bytes_],
) -> Manifest | None:
    """Hard-link what the parent has already: the rows, the encoder, both or nothing.

    Returns the parent's manifest if anything is linked.

    Only files that were just verified, or verified earlier by this process, are linked. A parent
    that is gone or damaged, or a file system without links, is no reason to fail: what is not
    linked is written.
    """
    if new.parent is None:
        return None
    source = home / folder_name(new.parent)
    try:
        old = read_manifest(source)
        if old.memory_fingerprint != new.memory_fingerprint:
            return None
        sound = {
            name for name, blob in old.files.items() if blob_digest(source / name) == blob.sha256
        }
        encoder_files = {name for name in old.files if name.startswith("encoder/")}
        wanted = set()
        if old.query_fingerprint == new.query_fingerprint and encoder_files <= sound:
            wanted |= encoder_files - {_CARD_FILE}
        same_kind = (old.index, old.spans) == (new.index, new.spans)
        if same_kind and sound >= ROW_FILES and _same_rows(source, old, vectors, ids):
            wanted |= ROW_FILES
        for name in sorted(wanted):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(source / name, folder / name)
        return old
    except (GenerationError, OSError) as error:
        log(f"{source}: nothing is linked from it: {error}")
        shutil.rmtree(folder / "encoder", ignore_errors=True)
        for name in ROW_FILES:
            (folder / name).unlink(missing_ok=True)
    return None


def _same_rows(
    source: Path,
    old: Manifest,
    vectors: Floats,
    ids: npt.NDArray[np.bytes_],
) -> bool:
    """Whether the parent's rows are these: the same ids, and vectors equal but for rounding."""
    theirs = np.load(source / "ids.npy", allow_pickle=False)
    if not np.array_equal(theirs, ids):
        return False
    spans = [span for _, span in in_order(old.spans)]
    indexes = read_indexes(source / "index.faiss", [stop - start for start, stop in spans])
    return all(
        index.dim == vectors.shape[1]
        and np.allclose(
            index.reconstruct(np.arange(stop - start)), vectors[start:stop], 0, _SAME_VECTOR
        )
        for index, (start, stop) in zip(indexes, spans, strict=True)
    )


def free_bytes(folder: Path) -> int:
    """Space left for files under ``folder``, which may not exist yet."""
    there = next(item for item in (folder, *folder.absolute().parents) if item.is_dir())
    return shutil.disk_usage(there).free


def index_bytes(shape: tuple[int, ...], settings: IndexConfig) -> int:
    """Size on disk, nearly, of indexes of ``shape`` (rows, dim) in all."""
    rows, dim = shape
    beside = {"flat": 0, "ivf": 16, "hnsw": 8 * settings.links + 16}[settings.kind]
    return rows * (dim * (2 if settings.precision == "float16" else 4) + beside)


def weight_bytes(encoder: Encoder) -> int:
    """Size of the encoder's weights on disk."""
    return sum(int(item.numel() * item.element_size()) for item in encoder.model.parameters())
