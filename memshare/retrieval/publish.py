"""Publishing generations, moving CURRENT, and pinning it.

The order makes every crash harmless: all files under a temporary name, fsynced; the manifest last;
one rename; CURRENT last of all. Before the rename nothing is there, between the two a whole
generation that nobody serves yet (`complete` ends what was killed there), afterwards the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from memshare.arrays import Floats
from memshare.config import IndexConfig
from memshare.files import disk_full, fsync_dir, write_atomic
from memshare.progress import log
from memshare.retrieval.blobs import free_bytes, index_bytes, weight_bytes, write_files
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.generation import verify_generation
from memshare.retrieval.manifest import (
    MANIFEST,
    METRIC,
    GenerationError,
    Manifest,
    check_spans,
    describe,
    folder_name,
    read_manifest,
)
from memshare.retrieval.shelf import (
    discard,
    locked,
    numbers,
    prune,
    read_current,
    scratch,
    stage_current,
    write_current,
)

_SLACK = 1 << 20  # tokenizer, configuration and manifest, in bytes
_UNSAFE = "a crash of this machine may undo that"


class PublishError(GenerationError):
    """A generation could not be published; what was there before is untouched (see `publish`)."""


def publish(
    home: Path,
    *,
    encoder: Encoder,
    vectors: Floats,
    ids: Sequence[str],
    spans: Mapping[str, tuple[int, int]],
    positions: Mapping[str, int],
    metrics: Mapping[str, Any],
    parent: int | None,
    keep: int,
    best: int | None = None,
    built_by: str | None = None,
    index: IndexConfig | None = None,
    origin: int | None = None,
    marks: Mapping[str, str] | None = None,
) -> int:
    """Write a new generation and make it CURRENT, unless a pin says otherwise; returns its number.

    ``vectors`` (rows, dim) float32 unit rows and ``ids`` (rows) are grouped by pool as ``spans``
    say, at the change log ``positions``. ``built_by``: the memory fingerprint of the encoder that
    made the vectors; any other than ``encoder``'s is refused. ``best``: the best generation so far
    by the gate (0: the configured encoder), None if it is this one. Afterwards all but the newest
    ``keep``, CURRENT, the best and the leased ones are deleted. Files that equal the parent's are
    hard links to them. ``index``: the kind of index (None: flat). ``origin`` and ``marks``: as
    `Manifest` has them.

    Raises `PoorIndex` for an index below its recall floor, and `PublishError` for parts that do not
    belong together and where the files can't be written, a full disk among them; nothing but the
    old state is left then, unless CURRENT has moved and just that can't be made durable.
    """
    memory_fingerprint = encoder.memory_fingerprint()
    if built_by is not None and built_by != memory_fingerprint:
        raise PublishError("the vectors were made by another encoder; build them with this one")
    _check(encoder, vectors, ids, spans, positions)
    settings = index or IndexConfig()
    manifest = Manifest(
        number=0,  # this, best and files come later, the number under the lock
        retriever=home.name,
        created_at=datetime.now(UTC).isoformat(timespec="microseconds"),
        parent=parent,
        best=0,
        dimension=encoder.dim,
        metric=METRIC,
        query_fingerprint=encoder.query_fingerprint(),
        memory_fingerprint=memory_fingerprint,
        positions={pool: int(position) for pool, position in positions.items()},
        spans={pool: (int(start), int(stop)) for pool, (start, stop) in spans.items()},
        files={},
        origin=origin,
        marks=dict(marks or {}),
    )
    try:
        with scratch(home) as folder:
            manifest = write_files(home, folder, manifest, encoder, vectors, ids, metrics, settings)
            manifest = replace(manifest, files=describe(folder))
            with locked(home):
                held, pinned = read_current(home)
                number = max([*numbers(home), held or 0]) + 1
                manifest = replace(manifest, number=number, best=number if best is None else best)
                folder.chmod(0o755)  # the temporary one is private
                write_atomic(folder / MANIFEST, manifest.dump())  # and syncs the folder
                staged = None if pinned else stage_current(home, number, pinned=False)
                _rename(home, folder, number, staged)
                _prune(home, keep, manifest.best)
    except GenerationError:
        raise
    except Exception as error:  # tokenizers, safetensors and FAISS raise kinds of their own
        needed = index_bytes(vectors.shape, settings) + sum(map(len, ids)) + _SLACK
        raise _explain(home, error, weight_bytes(encoder) + needed) from error
    if pinned:
        _tell_of_pin(home, number, held)
    return number


def complete(home: Path, number: int, keep: int) -> None:
    """The end of a publish that was killed between its two renames: ``number`` becomes CURRENT.

    As a publisher would have done, unless a pin says otherwise, and old generations are pruned.
    Nothing changes where CURRENT is as far already. Every byte is verified first; raises
    `NoGeneration` or `DamagedGeneration`, and `PublishError` where CURRENT can't be written.
    """
    if (read_current(home)[0] or 0) >= number:
        return
    verify_generation(home, number)
    with locked(home):
        manifest = read_manifest(home / folder_name(number))  # it may have been pruned in between
        held, pinned = read_current(home)
        if (held or 0) >= number:
            return
        if pinned:
            _tell_of_pin(home, number, held)
            return
        _move(home, number, pinned=False)
        _prune(home, keep, manifest.best)
    log(f"{home.name}: publishing generation {number} was cut short; CURRENT is moved to it now")


def activate(home: Path, number: int) -> None:
    """Roll back or forward: move CURRENT to ``number`` and pin it there.

    Every byte is verified first; raises `NoGeneration` or `DamagedGeneration` and changes nothing,
    and `PublishError` where CURRENT can't be written, or not durably, as it says.
    """
    verify_generation(home, number)
    with locked(home):
        read_manifest(home / folder_name(number))  # it may have been pruned in between
        _move(home, number, pinned=True)


def unpin(home: Path) -> int | None:
    """Let publishers move CURRENT again; it stays where it is until the next publish.

    Returns the number that was pinned, None where nothing was. Raises `PublishError` where CURRENT
    can't be written, or not durably, as it says.
    """
    with locked(home):
        number, pinned = read_current(home)
        if number is None or not pinned:
            return None
        _move(home, number, pinned=False)
        return number


def _move(home: Path, number: int, *, pinned: bool) -> None:
    """Have CURRENT name a generation that is there; the caller holds the lock."""
    try:
        fsync_dir(home)  # its rename first: a publisher that was killed may not have come to it
        write_current(home, stage_current(home, number, pinned=pinned))
    except OSError as error:
        raise PublishError(f"{home}: CURRENT can't be moved to {number}: {error}") from error
    try:
        fsync_dir(home)
    except OSError as error:
        said = f"CURRENT is {number}, {'pinned' if pinned else 'not pinned'}"
        raise PublishError(f"{home}: {said}, but {_UNSAFE}: {error}") from error


def _check(
    encoder: Encoder,
    vectors: Floats,
    ids: Sequence[str],
    spans: Mapping[str, tuple[int, int]],
    positions: Mapping[str, int],
) -> None:
    """Refuse parts that do not belong together."""
    if vectors.shape != (len(ids), encoder.dim) or vectors.dtype != np.float32:
        raise PublishError(
            f"vectors are {vectors.dtype} {vectors.shape}; float32 {(len(ids), encoder.dim)} needed"
        )
    if len(ids) and not np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-3):
        raise PublishError("vectors must be finite unit rows")
    if len(set(ids)) != len(ids) or not all(item.isascii() and item for item in ids):
        raise PublishError("ids must be distinct, non-empty ASCII")
    if set(spans) != set(positions):
        raise PublishError(f"spans name {sorted(spans)}, positions {sorted(positions)}")
    try:
        check_spans(spans, len(ids))
    except ValueError as error:
        raise PublishError(str(error)) from error


def _rename(home: Path, folder: Path, number: int, staged: Path | None) -> None:
    """The two renames that make a generation exist and be CURRENT; ``staged`` None: pinned."""
    folder.rename(home / folder_name(number))
    try:
        fsync_dir(home)
        if staged is not None:
            write_current(home, staged)
            fsync_dir(home)
    except OSError as error:
        if read_current(home)[0] == number:  # readers may have it: CURRENT must not name nothing
            raise PublishError(
                f"{home}: generation {number} is CURRENT, but {_UNSAFE}: {error}"
            ) from error
        discard(home, number)  # all or nothing: a failed publish leaves no generation behind
        raise


def _tell_of_pin(home: Path, number: int, held: int | None) -> None:
    log(
        f"{home.name}: published generation {number}, but {held} is pinned and stays CURRENT; "
        "`memshare generations unpin` lets the next one through"
    )


def _prune(home: Path, keep: int, best: int) -> None:
    """Prune; a failure is logged and no more, since the publish itself is done and durable."""
    try:
        prune(home, keep, [best])
    except OSError as error:
        log(f"{home.name}: old generations could not be deleted: {error}")


def _explain(home: Path, error: Exception, needed: int) -> PublishError:
    free = free_bytes(home)
    full = disk_full(error)
    what = "the disk is full" if full else f"writing failed: {error}"
    return PublishError(
        f"{home}: nothing was published, {what}; about {needed} bytes are needed, {free} are free"
        + ("; free some space or lower retriever.keep" if full else "")
    )


def record_rejection(path: Path, metrics: Mapping[str, Any]) -> None:
    """Append what is known of a generation that was rejected to ``path``, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(metrics, ensure_ascii=False) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    fsync_dir(path.parent)
