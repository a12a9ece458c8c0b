"""The token ids of all texts of a training run, made once and kept on disk.

They are in a file without a name, in ``TMPDIR``, mapped into memory: the system reads what a step
needs and lets go of it again.
"""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from memshare.arrays import Ints
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.ragged import Ragged, spans

_TOKENISE_AT_ONCE = 8192  # texts, or
_TOKENISE_CHARS = 4_000_000


class TokenTable:
    """Token ids of distinct prefixed texts, made once: a ragged array of int32 on disk.

    ``lengths`` (rows,) are in tokens. ``truncated`` counts the texts that were longer than the
    encoder's ``max_length``, ``unknown`` the tokens that stand for what its vocabulary lacks. The
    file has no name and is gone with the process; of a text only a hash stays in memory, and that
    until `forget_texts`.
    """

    def __init__(self, texts: Iterable[tuple[str, str]], encoder: Encoder) -> None:
        """``texts``: pairs of prefix and text, read once; copies are the same row."""
        self.truncated = self.unknown = 0
        self._encoder = encoder
        self._unknown_id = _unknown_id(encoder)
        self._file = tempfile.TemporaryFile(prefix="memshare-")  # noqa: SIM115  # kept open
        parts: dict[str, _Part] = {}  # by prefix
        for prefix, text in texts:
            part = parts.setdefault(prefix, _Part())
            if part.add(text):
                self._tokenise(prefix, part)
        for prefix, part in parts.items():
            self._tokenise(prefix, part)
        # Rows are numbered prefix by prefix, each in the order in which its texts came first.
        self._index: dict[str, tuple[int, dict[bytes, int]]] = {}
        rows = 0
        for prefix, part in parts.items():
            self._index[prefix] = (rows, part.index)
            rows += len(part.index)
        self.lengths: Ints = _joined([part.lengths for part in parts.values()])
        self._starts: Ints = _joined([part.starts for part in parts.values()])
        self._file.flush()
        count = int(self.lengths.sum())
        self._tokens: npt.NDArray[np.int32] = (
            np.memmap(self._file, np.int32, "r", shape=(count,)) if count else np.zeros(0, np.int32)
        )

    def row(self, prefix: str, text: str) -> int:
        """The row of a text that the table was made of."""
        base, index = self._index[prefix]
        return base + index[_text_hash(text)]

    def forget_texts(self) -> None:
        """Let go of the hashes, some 200 bytes a text: `row` finds nothing from now on."""
        self._index = {}

    def rows(self, which: Ints) -> Ragged:
        """The token ids of some rows, as `Encoder.collate` takes them."""
        starts, lengths = self._starts[which], self.lengths[which]
        at, _ = spans(starts, starts + lengths)
        return Ragged(self._tokens[at], lengths)

    def _tokenise(self, prefix: str, part: _Part) -> None:
        """Put the waiting texts of one prefix into the file."""
        block, part.waiting, part.chars = part.waiting, [], 0
        rows = Ragged.of(self._encoder.tokenize_to_ids(block, prefix))
        full = np.flatnonzero(rows.lengths >= self._encoder.max_length)
        self.truncated += _longer(self._encoder, [prefix + block[i] for i in full])
        self.unknown += int(np.count_nonzero(rows.ids == self._unknown_id))
        starts = self._file.tell() // 4 + rows.lengths.cumsum() - rows.lengths
        part.starts.extend(starts.tolist())
        part.lengths.extend(rows.lengths.tolist())
        self._file.write(rows.ids.astype(np.int32).tobytes())


class _Part:
    """The texts of one prefix: their hashes, and where their token ids are."""

    def __init__(self) -> None:
        self.index: dict[bytes, int] = {}
        self.starts, self.lengths = array("q"), array("q")
        self.waiting: list[str] = []
        self.chars = 0

    def add(self, text: str) -> bool:
        """Take a text unless it is here; whether enough are waiting to be tokenised."""
        name = _text_hash(text)
        if name in self.index:
            return False
        self.index[name] = len(self.index)
        self.waiting.append(text)
        self.chars += len(text)
        return len(self.waiting) == _TOKENISE_AT_ONCE or self.chars >= _TOKENISE_CHARS


def _text_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _joined(parts: Sequence[array[int]]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *(np.array(part, np.int64) for part in parts)])


def _unknown_id(encoder: Encoder) -> int:
    """The token for what is not in the vocabulary; -1 where there is none that only means that."""
    tokenizer = encoder.tokenizer
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    found = tokenizer.unk_token_id
    return -1 if found is None or found in others else int(found)  # GPT-2 ends texts with it


def _longer(encoder: Encoder, texts: list[str]) -> int:
    """How many of ``texts`` have more tokens than the encoder takes."""
    if not texts:
        return 0
    # `verbose` would warn of what is counted here.
    whole = encoder.tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]
    return sum(len(row) > encoder.max_length for row in whole)
