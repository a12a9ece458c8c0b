"""What the steps need of a training run's items, as numbers on disk, written once.

A step asks which texts an item has, which are rows of the token table, and which ids, keys, prompts
and answers are equal. To compare them 64 bits of a hash do (a *name*): two of the 10^5 names in a
large batch are equal by chance in one batch of some 10^9, and then one negative less counts.

The arrays are in files without a name, in ``TMPDIR``, mapped into memory: they are gone with the
process, and the system reads what a step needs and lets go of it again. Nothing grows in memory.
"""

from __future__ import annotations

import hashlib
import math
import struct
import tempfile
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from memshare.arrays import Ints
from memshare.retrieval.ragged import spans
from memshare.training.select import Selected

Records = npt.NDArray[Any]
NOBODY = 0  # the name of what has none

_PASSAGE = np.dtype([("row", "<i8"), ("id", "<u8"), ("key", "<u8"), ("label", "<u8"),
                     ("prompt", "<u8"), ("answer", "<u8"), ("loglik", "<f8")])  # fmt: skip
# The last three say where an item's parts begin; they end where the next one's do.
_ITEM = np.dtype([("row", "<i8"), ("prompt", "<u8"), ("answer", "<u8"), ("positives", "<i8"),
                  ("passages", "<i8"), ("never", "<i8"), ("query_id", "<i8")])  # fmt: skip
_PASSAGE_BYTES, _ITEM_BYTES = struct.Struct("<qQQQQQd"), struct.Struct("<qQQqqqq")


class ItemTable:
    """Items by place, once all of them are added and the table is `close`\\ d.

    ``passages`` are records of all items' passages, one item after the other, its positives first:
    ``row`` in the token table, the names ``id``, ``key``, ``label`` and ``prompt`` (`NOBODY` where
    they are not known) and ``answer``, and ``loglik``, NaN where there is none. An item's records
    have its query's ``row``, the names ``prompt`` and ``answer``, and how many ``positives`` it
    has.
    """

    def __init__(self) -> None:
        """Empty."""
        self._files = {part: _new_file() for part in ("items", "passages", "never", "query_ids")}
        self._written = dict.fromkeys(self._files, 0)

    def add(self, item: Selected, query: int, passages: Sequence[int]) -> None:
        """Add an item, with the rows of its query and of its positives and negatives."""
        self._begin(query, _name(item.prompt), _name(item.answer), len(item.positives))
        records = [
            _PASSAGE_BYTES.pack(
                row, _name(p.id), _name(p.key), NOBODY if p.label is None else _name(p.label),
                NOBODY if p.prompt is None else _name(p.prompt), _name(p.answer),
                math.nan if p.loglik is None else p.loglik,
            )
            for row, p in zip(passages, (*item.positives, *item.negatives), strict=True)
        ]  # fmt: skip
        never = sorted(map(_name, item.never_negative))
        self._write("passages", b"".join(records), len(records))
        self._write("never", struct.pack(f"<{len(never)}Q", *never), len(never))
        query_id = item.query_id.encode("utf-8", "surrogatepass")
        self._write("query_ids", query_id, len(query_id))

    def close(self) -> None:
        """Nothing is added from now on, and everything can be read."""
        self._begin(0, NOBODY, NOBODY, 0)  # where the last item's parts end
        self._items = self._read("items", _ITEM)
        self.passages = self._read("passages", _PASSAGE)
        self._never = self._read("never", np.dtype("<u8"))
        self._query_ids = self._read("query_ids", np.dtype("u1"))

    def items(self, places: Ints) -> Records:
        """Some items' records."""
        return self._items[places]

    def positives(self, places: Ints) -> list[range]:
        """Where in ``passages`` each one's positives are."""
        items = self._items[places]
        counts = zip(items["passages"].tolist(), items["positives"].tolist(), strict=True)
        return [range(start, start + count) for start, count in counts]

    def negatives(self, places: Ints) -> tuple[Ints, Ints]:
        """Where in ``passages`` they are, one item's after the other's, and whose each one is."""
        items = self._items[places]
        return spans(items["passages"] + items["positives"], self._items["passages"][places + 1])

    def never(self, places: Ints) -> tuple[npt.NDArray[np.uint64], Ints]:
        """Names of what must not be a negative: keys, ids, labels; and whose each one is."""
        starts = self._items["never"]
        at, whose = spans(starts[places], starts[places + 1])
        return self._never[at], whose

    def query_ids(self, places: Ints) -> tuple[str, ...]:
        """Of some items."""
        starts = self._items["query_id"]
        ends = zip(starts[places].tolist(), starts[places + 1].tolist(), strict=True)
        whole = (self._query_ids[start:end].tobytes() for start, end in ends)
        return tuple(text.decode("utf-8", "surrogatepass") for text in whole)

    def _begin(self, row: int, prompt: int, answer: int, positives: int) -> None:
        starts = (self._written[part] for part in ("passages", "never", "query_ids"))
        self._write("items", _ITEM_BYTES.pack(row, prompt, answer, positives, *starts), 1)

    def _write(self, part: str, data: bytes, count: int) -> None:
        self._files[part].write(data)
        self._written[part] += count

    def _read(self, part: str, dtype: np.dtype[Any]) -> Records:
        self._files[part].flush()
        if not self._written[part]:  # nothing can't be mapped
            return np.zeros(0, dtype)
        return np.asarray(np.memmap(self._files[part], dtype, "r", shape=(self._written[part],)))


def _name(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1  # 0 is `NOBODY`


def _new_file() -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="memshare-")
