"""The manifest: what a generation on disk consists of, and how a reader knows that it is whole.

``manifest.json`` names every file of the generation with its size and SHA-256, and carries a digest
of itself. It is written last, so a generation without one is torn; a file that it does not name,
or that differs from what it says, makes the generation damaged. Damage is refused, never repaired.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memshare.files import sha256_file

MANIFEST = "manifest.json"
ROW_FILES = frozenset({"ids.npy", "index.faiss"})
METRIC = "inner_product"  # of unit vectors, so the cosine
_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".joblib"})
# Blobs hashed by this process. A link to one is the same inode and needs no second reading; a
# blob that was written to since has another mtime.
_verified: dict[tuple[int, int, int, int], str] = {}


class GenerationError(RuntimeError):
    """A generation can't be used; the message says which one and why."""


class NoGeneration(GenerationError):
    """There is no generation of this number (any more), or none at all."""


class DamagedGeneration(GenerationError):
    """A generation is torn or was tampered with; it must not serve."""


@dataclass(frozen=True, slots=True)
class Blob:
    """One file of a generation: hex SHA-256 and size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A generation's identity.

    ``positions``: the change log position of each pool that the vectors stand for; ``marks``: the
    change there (`memshare.retrieval.history`). ``spans``: the rows ``[start, stop)`` of
    ``ids.npy`` and ``index.faiss`` that belong to each pool; they tile all rows. ``best``: the
    number of the best generation so far by the gate, itself perhaps. ``origin``: the generation
    that brought this encoder, where this one only brings it new rows.
    ``created_at``: ISO 8601, UTC. ``index``: the settings (`IndexConfig`) that decide what is in
    ``index.faiss``; ``recall_at_10``: of each pool whose index is not exact, against exact search.
    """

    number: int
    retriever: str
    created_at: str
    parent: int | None
    best: int
    dimension: int
    metric: str
    query_fingerprint: str
    memory_fingerprint: str
    positions: dict[str, int]
    spans: dict[str, tuple[int, int]]
    files: dict[str, Blob]
    index: dict[str, Any] = field(default_factory=dict)
    recall_at_10: dict[str, float] = field(default_factory=dict)
    origin: int | None = None
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return max((stop for _, stop in self.spans.values()), default=0)

    def dump(self) -> str:
        """JSON text, the digest included."""
        tree = asdict(self)
        return json.dumps({**tree, "digest": _digest(tree)}, indent=2, ensure_ascii=False) + "\n"


def _digest(tree: Mapping[str, Any]) -> str:
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def folder_name(number: int) -> str:
    """The folder of generation ``number``: six digits at least, so that names sort by age."""
    return f"{number:06d}"


def read_manifest(folder: Path) -> Manifest:
    """Parse and check ``folder``'s manifest; its blobs are not read (see `verify`).

    Raises `NoGeneration` where the folder is absent and `DamagedGeneration` for a missing, torn,
    altered or inconsistent manifest.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        if not folder.is_dir():
            raise NoGeneration(f"{folder}: there is no such generation") from None
        raise DamagedGeneration(f"{folder}: {MANIFEST} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedGeneration(f"{folder}: {MANIFEST} can't be read: {error}") from error
    try:
        tree = json.loads(text)
        digest = tree.pop("digest")
        if digest != _digest(tree):
            raise ValueError("its digest does not match")
        tree["spans"] = {
            pool: (int(start), int(stop)) for pool, (start, stop) in tree["spans"].items()
        }
        tree["files"] = {name: Blob(**blob) for name, blob in tree["files"].items()}
        manifest = Manifest(**tree)
        if folder_name(manifest.number) != folder.name:
            raise ValueError(f"it belongs to generation {manifest.number}")
        check_spans(manifest.spans, manifest.rows)
        if manifest.metric != METRIC:
            raise ValueError(f"unknown metric {manifest.metric!r}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        told = "damaged, or of another version of memshare"  # which may have other fields
        raise DamagedGeneration(f"{folder}: {MANIFEST} is {told}: {error}") from error
    return manifest


def first_with(home: Path, number: int) -> int:
    """The generation that brought generation ``number``'s encoder; itself if it can't be read."""
    try:
        return read_manifest(home / folder_name(number)).origin or number
    except GenerationError:
        return number


def in_order(spans: Mapping[str, tuple[int, int]]) -> list[tuple[str, tuple[int, int]]]:
    """``spans`` in the order of their rows, which is that of the indexes in ``index.faiss``."""
    return sorted(spans.items(), key=lambda item: item[1])


def check_spans(spans: Mapping[str, tuple[int, int]], rows: int) -> None:
    """Raise ValueError unless ``spans`` tile ``rows`` rows without gap or overlap."""
    at = 0
    for pool, (start, stop) in in_order(spans):
        if start != at or stop < start:
            raise ValueError(f"the rows of pool {pool!r} are [{start}, {stop}) but {at} was due")
        at = stop
    if at != rows:
        raise ValueError(f"the pools' rows end at {at}, there are {rows}")


def blob_digest(path: Path, *, fresh: bool = False) -> str:
    """SHA-256 of a file; one that this process hashed before is not read again.

    ``fresh`` reads it in any case.
    """
    stat = path.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if fresh or key not in _verified:
        _verified[key] = sha256_file(path)
    return _verified[key]


def describe(folder: Path) -> dict[str, Blob]:
    """Every file under ``folder`` (but for the manifest) by its relative POSIX path."""
    return {
        name: Blob(blob_digest(path), path.stat().st_size)
        for name, path in sorted(_files(folder).items())
    }


def verify(
    folder: Path, manifest: Manifest, *, fresh: bool = False, unread: Collection[str] = ()
) -> None:
    """Check that ``folder`` holds exactly the files of its manifest, each with size and SHA-256.

    Of those named in ``unread``, which the caller is not going to use, the size alone.

    Raises `DamagedGeneration` naming everything that is wrong.
    """
    found = _files(folder)
    problems = [f"{name}: missing" for name in manifest.files if name not in found]
    for name, path in found.items():
        blob = manifest.files.get(name)
        if blob is None:
            problems.append(f"{name}: not in the manifest")
        elif path.suffix in _PICKLES:
            problems.append(f"{name}: a pickle, which could run code when loaded")
        elif path.is_symlink():
            problems.append(f"{name}: a link out of the generation")
        elif path.stat().st_size != blob.size:
            problems.append(f"{name}: {path.stat().st_size} bytes instead of {blob.size}")
        elif name not in unread and blob_digest(path, fresh=fresh) != blob.sha256:
            problems.append(f"{name}: its SHA-256 differs")
    if problems:
        raise DamagedGeneration(f"{folder}: damaged: {'; '.join(sorted(problems))}")


def refuse_pickles(folder: Path) -> None:
    """Raise ValueError where a file under ``folder`` would need pickle to be loaded."""
    bad = sorted(name for name, path in _files(folder).items() if path.suffix in _PICKLES)
    if bad:
        raise ValueError(f"pickled weights are not published: {', '.join(bad)}; save safetensors")


def _files(folder: Path) -> dict[str, Path]:
    return {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and path != folder / MANIFEST
    }
