"""``index.faiss``: the indexes of a generation's pools, one after the other, in FAISS's format.

A pool's vectors are in its own index and nowhere else. With one pool it is a plain FAISS file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch  # noqa: F401  # before FAISS, as in `index`

# isort: split
import faiss

from memshare.retrieval.approximate import wrap
from memshare.retrieval.index import FlatIndex, IndexFault


def write_indexes(path: Path, indexes: Sequence[FlatIndex]) -> None:
    """Write the CPU forms; atomicity is the publisher's business."""
    with path.open("wb") as file:  # FAISS's own writer says nothing of an error in closing it
        writer = faiss.PyCallbackIOWriter(file.write)  # type: ignore[attr-defined]
        for index in indexes:
            faiss.write_index(index.cpu, writer)


def read_indexes(path: Path, rows: Sequence[int]) -> list[FlatIndex]:
    """Read what `write_indexes` wrote: indexes of so many ``rows`` each.

    Raises `IndexFault` for a damaged file, another kind of index, or another number of rows.
    """
    if not path.is_file():
        raise IndexFault(f"{path}: no such index file")
    indexes: list[FlatIndex] = []
    try:
        reader = faiss.FileIOReader(str(path))
        for expected in rows:
            indexes.append(wrap(faiss.read_index(reader)))
            if len(rows) > 1 and len(indexes) == 1 and len(indexes[0]) == sum(rows) != expected:
                return _split(indexes[0], rows)
    except RuntimeError as error:
        raise IndexFault(f"{path}: not a readable FAISS index ({error})") from error
    except IndexFault as error:
        raise IndexFault(f"{path}: {error}") from error
    found = [len(index) for index in indexes]
    if found != list(rows):
        raise IndexFault(f"{path}: its indexes hold {found} rows, not {list(rows)}")
    return indexes


def _split(whole: FlatIndex, rows: Sequence[int]) -> list[FlatIndex]:
    """The pools of a generation that an earlier version wrote, as one index of all rows."""
    stops = np.cumsum(rows)
    return [
        FlatIndex.build(whole.reconstruct(np.arange(stop - count, stop)))
        for count, stop in zip(rows, stops, strict=True)
    ]
