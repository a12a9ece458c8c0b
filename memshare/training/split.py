"""Which memories train the encoder and which are held out to judge it.

A memory's fate is decided once, when it arrives, from what arrived before it:

1. no near-duplicate among the earlier prompts: the hash of its own prompt decides;
2. near-duplicates of one fate: it joins them, so a cluster shares the fate of its earliest memory;
3. near-duplicates of both fates: it bridges two clusters and belongs to neither ("none").

So a train prompt and a held-out prompt are never near-duplicates, and later memories change no
earlier fate. Near-duplicate means a Jaccard similarity of word 3-gram sets of at least
``split.near_duplicate``. Pairs are found by the prefix filter (Bayardo et al., "Scaling Up All
Pairs Similarity Search", WWW 2007): two sets that are similar enough share one of their few rarest
grams; each pair found is then verified exactly. Rule 2 needs one neighbour of each fate, not all of
them, so that large clusters stay cheap.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from memshare.config import SplitConfig
from memshare.files import write_json
from memshare.progress import log
from memshare.records import normalise
from memshare.retrieval.text import tokenize

Fate = Literal["train", "held_out", "none"]
_SIDES: tuple[Fate, Fate] = ("train", "held_out")
_EPSILON = 1e-9  # 0.8 * 5 is 4.000000000000001 in floats elsewhere: never lose a pair to rounding


class _Prompted(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def prompt(self) -> str: ...


class SplitError(RuntimeError):
    """The split on record can't be read."""


def _hash(text: str) -> int:
    """64 bits of a stable hash, as an unsigned integer."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def grams(prompt: str, size: int = 3) -> array[int]:
    """Sorted distinct hashes of a prompt's word n-grams.

    A prompt of fewer than ``size`` words is one gram of all its words; one without any word is a
    gram of its normalised text. Chinese, kana and hangul count by the tokens of `tokenize`.
    """
    words = tokenize(normalise(prompt))  # so that what counts as equal elsewhere is equal here
    if len(words) < size:
        return array("Q", [_hash("\x1f".join(words) if words else "\x1e" + normalise(prompt))])
    spans = zip(*(words[start:] for start in range(size)), strict=False)
    return array("Q", sorted({_hash("\x1f".join(span)) for span in spans}))


def jaccard(left: Iterable[int], right: Iterable[int]) -> float:
    """Size of the intersection over the size of the union of two sets."""
    a, b = set(left), set(right)
    return len(a & b) / len(a | b)


class Similar:
    """Sets of `grams`, and whether one of them is similar to another."""

    def __init__(self) -> None:
        """Empty."""
        self._sets: list[array[int]] = []
        self._postings: dict[int, list[int]] = defaultdict(list)

    def add(self, gram_set: array[int], prefix: Iterable[int] | None = None) -> None:
        """Add a set; ``prefix``: those of its grams that it is found by (None: all)."""
        for gram in gram_set if prefix is None else prefix:
            self._postings[gram].append(len(self._sets))
        self._sets.append(gram_set)

    def near(
        self, gram_set: array[int], threshold: float, prefix: Iterable[int] | None = None
    ) -> bool:
        """Whether some set here is at least ``threshold`` similar, and shares a gram.

        ``prefix``: those of the grams that it is looked for by (None: all).
        """
        own, size, seen = set(gram_set), len(gram_set), set[int]()
        shortest, longest = size * threshold - _EPSILON, size / max(threshold, _EPSILON) + _EPSILON
        for gram in gram_set if prefix is None else prefix:
            for row in self._postings.get(gram, ()):
                if row in seen:
                    continue
                seen.add(row)
                other = self._sets[row]
                if shortest <= len(other) <= longest:
                    common = len(own.intersection(other))
                    if common + _EPSILON >= threshold * (size + len(other) - common):
                        return True
        return False


def _own_fate(prompt: str, held_out: float) -> Fate:
    return "held_out" if _hash("split\x1f" + normalise(prompt)) < held_out * 2**64 else "train"


def assign(
    memories: Iterable[_Prompted],
    config: SplitConfig,
    known: Mapping[str, Fate] | None = None,
) -> dict[str, Fate]:
    """The fate of every memory, by id; ``memories`` come in the order in which they arrived.

    Fates in ``known`` stand as they are (they were decided before some other memory was deleted, or
    before another pool got an earlier row) and are reckoned with first.
    """
    known = known or {}
    rows = [
        (memory.id, grams(memory.prompt), _own_fate(memory.prompt, config.held_out))
        for memory in memories
    ]
    frequency = Counter(gram for _, gram_set, _ in rows for gram in gram_set)
    sides = {side: Similar() for side in _SIDES}
    decided: dict[bytes, Fate] = {}  # by gram set: equal prompts need no search
    indexed: set[tuple[bytes, Fate]] = set()
    fates: dict[str, Fate] = {}
    # False sorts before True, and the sort is stable: known ones first, the rest as they arrived.
    for memory_id, gram_set, own_fate in sorted(rows, key=lambda row: row[0] not in known):
        key = gram_set.tobytes()
        fate = known.get(memory_id) or decided.get(key)
        if fate is None or (fate != "none" and (key, fate) not in indexed):
            keep = len(gram_set) - math.ceil(config.near_duplicate * len(gram_set) - _EPSILON) + 1
            prefix = sorted(gram_set, key=lambda gram: (frequency[gram], gram))[: max(keep, 1)]
            if fate is None:
                near = [s for s in _SIDES if sides[s].near(gram_set, config.near_duplicate, prefix)]
                fate = own_fate if not near else near[0] if len(near) == 1 else "none"
            if fate != "none":
                sides[fate].add(gram_set, prefix)
                indexed.add((key, fate))
        if decided.setdefault(key, fate) != fate:  # known fates disagree: more copies join neither
            decided[key] = "none"
        fates[memory_id] = fate
    return fates


def kept_split(
    path: Path,
    memories: Iterable[_Prompted],
    config: SplitConfig,
    elsewhere: Callable[[list[str]], Iterable[_Prompted]] = lambda ids: (),
) -> dict[str, Fate]:
    """`assign`, with fates remembered in the JSON file ``path`` from one call to the next.

    Deleting a cluster's earliest memory would otherwise move the rest of it, and other settings
    would judge by what has been trained on: they hold for memories that come after them.
    ``elsewhere`` finds those that are not among ``memories`` this time but live, by their ids: they
    keep their fates for when they come back. Raises `SplitError` if the file is damaged.
    """
    settings = config.model_dump()
    known, before = recorded_split(path)
    if before not in (None, settings):
        log(
            f"{path}: split settings changed, for memories that come from now on: those known have "
            "been trained on, or judged by. Delete the file to split all anew"
        )
    fates = assign(_with_absent(memories, known, elsewhere), config, known)
    if before != settings or fates != known:
        write_json(path, {"settings": settings, "fates": fates})
    return fates


def _with_absent(
    memories: Iterable[_Prompted],
    known: Mapping[str, Fate],
    elsewhere: Callable[[list[str]], Iterable[_Prompted]],
) -> Iterator[_Prompted]:
    """``memories``, then those of the ``known`` ones that are not among them."""
    absent = dict.fromkeys(known)
    for memory in memories:
        absent.pop(memory.id, None)
        yield memory
    yield from elsewhere(list(absent))


def recorded_split(path: Path) -> tuple[dict[str, Fate], dict[str, Any] | None]:
    """What `kept_split` left in ``path``: fates, and the settings of then; neither without a file.

    Raises `SplitError` if the file is damaged.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record["fates"], record["settings"]
    except FileNotFoundError:
        return {}, None
    except (ValueError, KeyError, TypeError) as error:
        raise SplitError(
            f"{path}: the split on record is damaged ({error}); delete the file to split anew"
        ) from error
