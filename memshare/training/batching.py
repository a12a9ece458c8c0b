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
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memshare.config import TrainingConfig
from memshare.retrieval.encoder import Encoder
from memshare.training.order import Ints, Order
from memshare.training.select import Passage, Selected
from memshare.training.token_table import TokenTable

_SMALLEST = 1 / 8  # of batch_tokens: what keeps a device busy
_MUCH_SHORTER = 0.85  # of a micro-batch's longest text


@dataclass(frozen=True)
class StepBatch:
    """One step's global batch: g queries, m distinct docs, n = m + distinct queries texts.

    ``texts`` (n,) are rows of the token table, docs first. ``rows`` (g,) says where in ``texts``
    each query stands. ``positives`` (p, 2) are pairs of query and doc, ordered by query;
    ``logliks`` (l, 3) are query, doc and the score that an LM gave to the pair, ordered likewise.

    What is no negative depends on the prompt alone: queries with equal ones pull and push the same
    vector. ``prompts`` (g,) numbers them. ``masked`` (k, 2) are pairs of prompt and doc. With
    numbers for the answers, too, ``doc_answers`` (m,) has each doc's, and ``answers`` (a, 2) are
    pairs of prompt and answer: whatever doc gives that answer is no negative either.
    """

    query_ids: tuple[str, ...]
    texts: Ints
    docs: int
    rows: Ints
    prompts: Ints
    positives: Ints
    masked: Ints
    logliks: npt.NDArray[np.float64]
    answers: Ints
    doc_answers: Ints

    def masks(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positive and valid masks (stop - start, m) of some queries, as `info_nce_rows` wants."""
        positive = _paired(np.arange(start, stop), self.positives, self.docs, device)
        asked, row = np.unique(self.prompts[start:stop], return_inverse=True)
        known = _paired(asked, self.answers, int(self.doc_answers.max()) + 1, device)
        given = torch.from_numpy(self.doc_answers).to(device)
        masked = known.gather(1, given.expand(len(asked), -1))
        masked |= _paired(asked, self.masked, self.docs, device)
        return positive, positive | ~masked.index_select(0, torch.from_numpy(row).to(device))

    def measured(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Log-likelihoods (stop - start, m) of some queries, as `distillation_rows` wants them."""
        table = torch.full((stop - start, self.docs), math.nan)
        low, high = np.searchsorted(self.logliks[:, 0], (start, stop))
        found = torch.from_numpy(self.logliks[low:high])
        table[found[:, 0].long() - start, found[:, 1].long()] = found[:, 2].float()
        return table.to(device)


def _paired(firsts: Ints, pairs: Ints, columns: int, device: torch.device) -> Tensor:
    """A mask (f, columns) of what ``pairs`` (k, 2) pair each of the sorted ``firsts`` (f,) with."""
    first, second = pairs[np.isin(pairs[:, 0], firsts)].T
    at = np.stack([np.searchsorted(firsts, first), second])
    mask = torch.zeros(len(firsts), columns, dtype=torch.bool, device=device)
    mask[tuple(torch.from_numpy(at).to(device))] = True
    return mask


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
        shares = {
            "pool_temperature": settings.pool_temperature,
            "max_principal_share": settings.max_principal_share,
        }
        self._order = Order(items, global_batch=global_batch, seed=seed, **shares)
        self.steps_per_epoch = self._order.steps_per_epoch
        self.steps = settings.max_steps or math.ceil(settings.epochs * self.steps_per_epoch)
        self.table = TokenTable(self._texts(), encoder)
        how = (seed, global_batch, shares, self._drawn, self._prefixes)
        self.digest = self._digest(repr(how))

    def counts(self) -> dict[str, int]:
        """For a report: texts cut off, and what the cap on principals keeps out of an epoch."""
        return {"truncated": self.table.truncated, "left_out": self._order.left_out()}

    def __str__(self) -> str:
        cut, out = self.table.truncated, self._order.left_out()
        many = "" if self.steps_per_epoch == 1 else "s"
        told = [f"{self.steps_per_epoch} step{many} an epoch"]
        if cut:
            told.append(f"{cut} texts have too many tokens and are cut off")
        if out:
            told.append(f"{out} examples left out of the first: over training.max_principal_share")
        return "; ".join(told)

    @property
    def doc_rows(self) -> Ints:
        """Rows of the token table that are any query's positives or negatives, in order."""
        docs = np.zeros(len(self.table.lengths), dtype=bool)
        for item in self.items:
            for passage in (*item.positives, *item.negatives):
                docs[self.table.row(self._prefixes[1], passage.text)] = True
        return np.flatnonzero(docs).astype(np.int64)

    def _texts(self) -> Iterator[tuple[str, str]]:
        query_prefix, memory_prefix = self._prefixes
        for item in self.items:
            yield query_prefix, item.query
            for passage in (*item.positives, *item.negatives):
                yield memory_prefix, passage.text

    def _digest(self, how: str) -> str:
        digest = hashlib.sha256(how.encode())
        for item in self.items:
            passages = [
                (p.id, p.text, p.answer, p.loglik, p.prompt, p.principal)
                for p in (*item.positives, *item.negatives)
            ]
            never = sorted(item.never_negative)
            who = (item.query_id, item.query, item.pool, item.principal)
            known = (*who, len(item.positives), passages, never)
            digest.update(repr(known).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def batch(self, step: int) -> StepBatch:
        """The global batch of a step."""
        items = [self.items[i] for i in self._order.step(step)]
        # A stream of its own: the order's must not depend on what is drawn here.
        rng = np.random.default_rng([self._seed, step, len(items)])
        return self._assemble(items, [self._draw(item.positives, rng) for item in items])

    def _draw(
        self, positives: tuple[Passage, ...], rng: np.random.Generator
    ) -> tuple[Passage, ...]:
        """The positives that a query is trained on at this step."""
        if self._drawn is None or len(positives) <= self._drawn:
            return positives
        return tuple(positives[i] for i in rng.permutation(len(positives))[: self._drawn])

    def _assemble(
        self, items: Sequence[Selected], drawn: Sequence[tuple[Passage, ...]]
    ) -> StepBatch:
        query_prefix, memory_prefix = self._prefixes
        docs: dict[int, int] = {}  # row of the token table -> column
        queries: dict[int, int] = {}
        columns: dict[str, set[int]] = defaultdict(set)  # text key or id -> columns
        prompted: dict[str | None, set[int]] = defaultdict(set)  # prompt key -> columns
        asking: dict[str, list[int]] = defaultdict(list)  # prompt key -> rows
        numbers: dict[str, int] = {}  # answer key -> number
        doc_answers: list[int] = []
        positives: list[tuple[int, int]] = []
        logliks: list[tuple[float, float, float]] = []
        rows: list[int] = []
        for row, item in enumerate(items):
            at = self.table.row(query_prefix, item.query)
            rows.append(queries.setdefault(at, len(queries)))
            asking[item.prompt].append(row)
            for passage in (*drawn[row], *item.negatives):
                at = self.table.row(memory_prefix, passage.text)
                column = docs.setdefault(at, len(docs))
                if column == len(doc_answers):
                    doc_answers.append(numbers.setdefault(passage.answer, len(numbers)))
                columns[passage.key].add(column)
                columns[passage.id].add(column)
                prompted[passage.prompt].add(column)
                if passage in drawn[row]:
                    positives.append((row, column))
                if passage.loglik is not None:
                    logliks.append((row, column, passage.loglik))
        prompts = np.zeros(len(items), dtype=np.int64)
        masked: list[tuple[int, int]] = []
        answers: list[tuple[int, int]] = []
        for number, (prompt, equal) in enumerate(asking.items()):
            prompts[equal] = number
            never = {key for row in equal for key in items[row].never_negative}
            hit = prompted.get(prompt, set()).union(*(columns.get(key, ()) for key in never))
            masked.extend((number, column) for column in sorted(hit))
            known = {p.answer for row in equal for p in items[row].positives}
            known |= {items[row].answer for row in equal}
            answers.extend((number, numbers[key]) for key in known & numbers.keys())
        return StepBatch(
            query_ids=tuple(item.query_id for item in items),
            texts=np.array([*docs, *queries], dtype=np.int64),
            docs=len(docs),
            rows=np.array(rows, dtype=np.int64) + len(docs),
            prompts=prompts,
            positives=np.array(positives, dtype=np.int64).reshape(-1, 2),
            masked=np.array(masked, dtype=np.int64).reshape(-1, 2),
            logliks=np.array(logliks, dtype=np.float64).reshape(-1, 3),
            answers=np.array(answers, dtype=np.int64).reshape(-1, 2),
            doc_answers=np.array(doc_answers, dtype=np.int64),
        )


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
