"""Reading generations: which one is current, and loading one that is verified and leased."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memshare.progress import log
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.errors import EncoderError
from memshare.retrieval.gpu import GpuPlace
from memshare.retrieval.index import FlatIndex
from memshare.retrieval.index_file import read_indexes
from memshare.retrieval.manifest import (
    ROW_FILES,
    DamagedGeneration,
    GenerationError,
    Manifest,
    NoGeneration,
    folder_name,
    in_order,
    read_manifest,
    verify,
)
from memshare.retrieval.shelf import Lease, numbers, read_current

Ids = npt.NDArray[np.bytes_]
Stamp = tuple[int, int] | None


@dataclass(eq=False)
class Generation:
    """A loaded generation: what belongs together, and only together.

    ``indexes`` and ``ids`` hold each pool's rows on their own, so that no search over one pool can
    reach another's vectors. ``ids[pool]``: (rows,) fixed-width ASCII bytes. The lease keeps the
    folder on disk until `close`.
    """

    number: int
    manifest: Manifest
    encoder: Encoder
    indexes: dict[str, FlatIndex]
    ids: dict[str, Ids]
    folder: Path
    lease: Lease

    def close(self) -> None:
        """Give the lease back; the object must not be used afterwards."""
        self.lease.release()

    def __enter__(self) -> Generation:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()


def current(home: Path) -> int | None:
    """The number that CURRENT names, None before the first publish."""
    return read_current(home)[0]


def current_stamp(home: Path) -> Stamp:
    """Changes whenever CURRENT is written, even with the same number; None where it is missing."""
    try:
        stat = (home / "CURRENT").stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def generations(home: Path) -> list[Manifest]:
    """Manifests of the generations on disk, oldest first.

    Those without a readable one are left out; blobs are not read, see `verify_generation`.
    """
    found = []
    for number in numbers(home):
        try:
            found.append(read_manifest(home / folder_name(number)))
        except GenerationError:
            continue  # torn, or pruned since it was listed
    return found


def best(home: Path) -> int | None:
    """The best generation so far by the gate, as the newest generation names it."""
    manifests = generations(home)
    return manifests[-1].best if manifests else None


def verify_generation(home: Path, number: int) -> Manifest:
    """Read and check every byte of a generation; raises `DamagedGeneration` or `NoGeneration`."""
    with Lease(home, number):
        manifest = read_manifest(home / folder_name(number))
        verify(home / folder_name(number), manifest, fresh=True)
        return manifest


def load(
    home: Path,
    number: int | None = None,
    device: str = "auto",
    place: GpuPlace | None = None,
    *,
    rows: bool = True,
) -> Generation:
    """Load generation ``number`` (None: CURRENT) after verifying what is loaded of it.

    ``place``: where GPU copies of the indexes are made (None: nowhere). Without ``rows``,
    ``indexes`` and ``ids`` stay empty and their files unread: for who has the rows of this memory
    tower already. The caller closes it, which gives the lease back.

    Raises `NoGeneration` where there is none and `DamagedGeneration` where size, SHA-256, shapes or
    the encoder's fingerprints differ from the manifest.
    """
    while True:
        wanted = number if number is not None else read_current(home)[0]
        if wanted is None:
            raise NoGeneration(f"{home}: nothing was published yet")
        try:
            lease = Lease(home, wanted)
            break
        except NoGeneration:
            if number is not None or read_current(home)[0] == wanted:
                raise
            # CURRENT moved on, and its old generation was pruned, between the two lines above.
    try:
        folder = home / folder_name(wanted)
        manifest = read_manifest(folder)
        verify(folder, manifest, unread=() if rows else ROW_FILES)
        encoder = _load_encoder(folder, manifest, device)
        indexes, ids = _load_rows(folder, manifest, place) if rows else ({}, {})
    except BaseException:
        lease.release()
        raise
    return Generation(wanted, manifest, encoder, indexes, ids, folder, lease)


def load_current(
    home: Path, device: str = "auto", place: GpuPlace | None = None
) -> Generation | None:
    """Load CURRENT or, if it is damaged, the newest intact older one; says so in the log.

    None where nothing was published. Raises `DamagedGeneration` where no intact one is left.
    """
    wanted: int | None = None
    try:
        wanted, _ = read_current(home)
        if wanted is None:
            return None
        return load(home, None, device, place)
    except (DamagedGeneration, NoGeneration) as error:
        damage = error
    log(f"{damage}; looking for an intact older generation")
    for number in reversed(numbers(home)):
        if wanted is not None and number >= wanted:
            continue
        try:
            generation = load(home, number, device, place)
        except (DamagedGeneration, NoGeneration) as error:
            log(str(error))
            continue
        log(f"{home.name}: serving generation {number} instead")
        return generation
    raise DamagedGeneration(f"{home.name}: no intact generation is left ({damage})") from damage


def _load_encoder(folder: Path, manifest: Manifest, device: str) -> Encoder:
    try:
        encoder = Encoder.from_folder(folder / "encoder", device=device)
    except EncoderError as error:
        raise DamagedGeneration(f"{folder}: its encoder can't be loaded: {error}") from error
    if encoder.dim != manifest.dimension:
        raise DamagedGeneration(
            f"{folder}: the encoder has {encoder.dim} dimensions, the manifest {manifest.dimension}"
        )
    fingerprints = encoder.query_fingerprint(), encoder.memory_fingerprint()
    if fingerprints != (manifest.query_fingerprint, manifest.memory_fingerprint):
        raise DamagedGeneration(f"{folder}: the encoder is not the one that built the vectors")
    return encoder


def _load_rows(
    folder: Path, manifest: Manifest, place: GpuPlace | None
) -> tuple[dict[str, FlatIndex], dict[str, Ids]]:
    spans = dict(in_order(manifest.spans))
    try:
        all_ids: Ids = np.load(folder / "ids.npy", allow_pickle=False)
        rows = [stop - start for start, stop in spans.values()]
        found = read_indexes(folder / "index.faiss", rows)
    except (ValueError, OSError) as error:  # an IndexFault is a ValueError
        raise DamagedGeneration(f"{folder}: index or ids can't be read: {error}") from error
    if all_ids.shape != (manifest.rows,) or all_ids.dtype.kind != "S":
        raise DamagedGeneration(f"{folder}: ids.npy is {all_ids.dtype} {all_ids.shape}")
    if any(index.dim != manifest.dimension for index in found):
        raise DamagedGeneration(f"{folder}: index.faiss has not {manifest.dimension} dimensions")
    indexes = {pool: index.to_gpu(place) for pool, index in zip(spans, found, strict=True)}
    return indexes, {pool: all_ids[start:stop] for pool, (start, stop) in spans.items()}
