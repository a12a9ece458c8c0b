"""Which examples make a step, which texts it needs, and which process encodes which of them.

A step's *global batch* is ``num_processes * training.batch_size`` queries of one pool (`order`).
Every process works out the whole batch for
itself, so that no text, size or mask has to be exchanged: only vectors are. Each distinct text of
the global batch is encoded once, by one process; texts are dealt by length, so that all processes
have equally many tokens, and padded to the longest of a micro-batch of equally long ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np

from memshare.arrays import Ints
from memshare.config import TrainingConfig
from memshare.retrieval.encoder import Encoder
from memshare.training.item_table import ItemTable
from memshare.training.order import Order
from memshare.training.prefetch import prefetched
from memshare.training.select import Selected
from memshare.training.step_batch import StepBatch, assemble
from memshare.training.token_table import TokenTable

_ROWS_AT_ONCE = 2**20

_SMALLEST = 1 / 8  # of batch_tokens: what keeps a device busy
_MUCH_SHORTER = 0.85  # of a micro-batch's longest text
_MUCH_UNREAD = 0.05  # of all tokens: some emoji and names are no trouble


class Batches:
    """Everything that the steps need: ``batch(step)`` for step 0, 1, ...; equal on every process.

    A training has ``steps`` of them.

    ``digest`` identifies items, order and seed; processes compare it before they start. The
    batches of an epoch are as even as the items allow, so that no tiny one is left over.
    """

    def __init__(
        self,
        items: Sequence[Selected],
        encoder: Encoder,
        *,
        global_batch: int,
        seed: int,
        settings: TrainingConfig | None = None,
    ) -> None:
        """``settings`` says how pools and principals share the batches, and what is drawn."""
        if not items:
            raise ValueError("no examples to make batches of")
        self.items = items
        settings = settings or TrainingConfig()
        self._prefixes = (encoder.query_prefix, encoder.memory_prefix)
        self._seed = seed
        self._drawn = settings.positives_per_step
        self._distils = settings.distill_weight > 0
        self._two_towers = encoder.two_towers
        shares = {
            "pool_temperature": settings.pool_temperature,
            "max_principal_share": settings.max_principal_share,
        }
        self._order = Order(items, global_batch=global_batch, seed=seed, **shares)
        self.steps_per_epoch = self._order.steps_per_epoch
        # 1.1 * 50 is 55.00000000000001 in floats, and no 56th step.
        asked = math.ceil(settings.epochs * self.steps_per_epoch - 1e-9)
        self.steps = settings.max_steps or asked
        self.table = TokenTable(self._texts(), encoder)
        how = (seed, global_batch, shares, self._drawn, self._prefixes)
        self._numbers = ItemTable()
        self.digest = self._read(repr(how))
        self.table.forget_texts()

    def counts(self) -> dict[str, int]:
        """For a report: of the texts, and what the cap on principals keeps out of an epoch."""
        table, out = self.table, self._order.left_out()
        return {"truncated": table.truncated, "unknown_tokens": table.unknown, "left_out": out}

    def __str__(self) -> str:
        cut, out = self.table.truncated, self._order.left_out()
        unread = self.table.unknown / max(1, int(self.table.lengths.sum()))
        many = "" if self.steps_per_epoch == 1 else "s"
        told = [f"{self.steps_per_epoch} step{many} an epoch"]
        if cut:
            told.append(f"{cut} texts have too many tokens and are cut off")
        if out:
            told.append(f"{out} examples left out of the first: over training.max_principal_share")
        if unread > _MUCH_UNREAD:
            told.append(
                f"warning: {unread:.0%} of the texts' tokens are unknown to this encoder, which "
                "can't learn from what it can't read; choose one for these languages"
            )
        return "; ".join(told)

    @property
    def doc_rows(self) -> Ints:
        """Rows of the token table that are any query's positives or negatives, in order."""
        docs = np.zeros(len(self.table.lengths), dtype=bool)
        passages = self._numbers.passages
        for start in range(0, len(passages), _ROWS_AT_ONCE):
            docs[passages["row"][start : start + _ROWS_AT_ONCE]] = True
        return np.flatnonzero(docs).astype(np.int64)

    def _texts(self) -> Iterator[tuple[str, str]]:
        query_prefix, memory_prefix = self._prefixes
        for item in self.items:
            yield query_prefix, item.query
            for passage in (*item.positives, *item.negatives):
                yield memory_prefix, passage.text

    def _read(self, how: str) -> str:
        """Put all items into the item table; returns the digest of them and ``how``."""
        query_prefix, memory_prefix = self._prefixes
        digest = hashlib.sha256(how.encode())
        for item in self.items:
            passages = (*item.positives, *item.negatives)
            rows = [self.table.row(memory_prefix, passage.text) for passage in passages]
            self._numbers.add(item, self.table.row(query_prefix, item.query), rows)
            told = [  # without a label as ever, so that a run goes on by a later version
                (p.id, p.text, p.answer, p.loglik, p.prompt, p.principal, *filter(None, [p.label]))
                for p in passages
            ]
            never = sorted(item.never_negative)
            who = (item.query_id, item.query, item.pool, item.principal)
            known = (*who, len(item.positives), told, never)
            digest.update(repr(known).encode("utf-8", "surrogatepass"))
        self._numbers.close()
        return digest.hexdigest()

    def batch(self, step: int) -> StepBatch:
        """The global batch of a step."""
        places = self._order.step(step)
        # A stream of its own: the order's must not depend on what is drawn here.
        rng = np.random.default_rng([self._seed, step, len(places)])
        drawn = [self._draw(positives, rng) for positives in self._numbers.positives(places)]
        how = {"distils": self._distils, "two_towers": self._two_towers}
        return assemble(self._numbers, places, drawn, **how)

    def learnable(self) -> bool:
        """Whether any step's batch has something to teach; the first one, as a rule, has."""
        return any(self.batch(step).teaches for step in range(self.steps))

    def ahead(self) -> AbstractContextManager[Callable[[int], StepBatch]]:
        """`batch`, with the next step's made in a thread meanwhile; to be used as a context."""
        return prefetched(self.batch, self.steps)

    def _draw(self, positives: Sequence[int], rng: np.random.Generator) -> Sequence[int]:
        """The positives that a query is trained on at this step."""
        if self._drawn is None or len(positives) <= self._drawn:
            return positives
        return tuple(positives[i] for i in rng.permutation(len(positives))[: self._drawn])


def deal(lengths: Ints, processes: int) -> list[Ints]:
    """Share texts (n,) out by length, longest first and back and forth: positions per process."""
    order = np.argsort(-lengths, kind="stable")
    turn = np.arange(len(order)) % (2 * processes)
    owner = np.where(turn < processes, turn, 2 * processes - 1 - turn)
    return [order[owner == process] for process in range(processes)]


def cut(lengths: Ints, batch_tokens: int) -> list[slice]:
    """Cut texts, longest first, into micro-batches of at most ``batch_tokens`` padded tokens.

    A text longer than that is alone. One that is much shorter than its micro-batch's longest starts
    a new one, if the one before is large enough to keep the device busy.
    """
    slices: list[slice] = []
    start = 0
    for end in range(1, len(lengths) + 1):
        width, rows = int(lengths[start]), end - start
        if (
            end == len(lengths)
            or (rows + 1) * width > batch_tokens
            or (rows * width >= batch_tokens * _SMALLEST and lengths[end] < width * _MUCH_SHORTER)
        ):
            slices.append(slice(start, end))
            start = end
    return slices


def cut_packed(lengths: Ints, batch_tokens: int) -> list[slice]:
    """Cut texts into micro-batches of at most ``batch_tokens`` tokens; a longer one is alone."""
    slices: list[slice] = []
    start = tokens = 0
    for end, length in enumerate(lengths.tolist()):
        if end > start and tokens + length > batch_tokens:
            slices.append(slice(start, end))
            start, tokens = end, 0
        tokens += length
    if len(lengths):
        slices.append(slice(start, len(lengths)))
    return slices
