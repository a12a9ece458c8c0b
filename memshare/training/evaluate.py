"""Evaluation while training: does the encoder rank held-out queries' useful memories first?

The queries are held-out memories that were mined and labelled as training queries are (`mining`).
Each one's own judged candidates are ranked, and nothing else is (condensed lists: Sakai 2007,
"Alternatives to Bpref"). Nobody judged the rest of the pool: taking it for useless would count what
a better encoder newly finds against it, while the encoder that training starts from, which proposed
many of the candidates, has all of its own finds judged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from memshare.config import Config
from memshare.metrics.ir import METRICS, MORE_RECALL, ir_metrics, mean_metrics
from memshare.records import Example, normalise
from memshare.retrieval.encoder import SIDES, Encoder
from memshare.retrieval.gate import grades
from memshare.training.batching import deal
from memshare.training.examples import held_out_dir, read_examples
from memshare.training.gather import World
from memshare.training.relevance import mined_gains
from memshare.training.select import Selected, distinct_candidates
from memshare.training.shard import ExamplesError

EVALUATED = (*METRICS, *MORE_RECALL)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What is evaluated on; false where there is nothing.

    ``queries``: query id -> text. ``grades``: query id -> memory id -> grade 0 to 3 (`grades`), in
    the order of proposal. ``texts``: memory id -> text. ``without_relevant`` and ``trained`` count
    queries that were left out.
    """

    queries: Mapping[str, str] = field(default_factory=dict)
    grades: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    without_relevant: int = 0
    trained: int = 0

    @classmethod
    def of(cls, examples: Iterable[Example], gain: float, trained: Collection[str] = ()) -> HeldOut:
        """Judge by the gate's rule: a candidate is relevant if its gain is above ``gain``.

        Queries without a relevant candidate tell nothing and are left out; so are those that
        ``trained`` has, by id, as memories that were split otherwise when those were mined, or by
        what is asked (as `normalise` has it), as in data from elsewhere. Of a query that comes
        twice the later counts.
        """
        queries: dict[str, str] = {}
        graded: dict[str, dict[str, int]] = {}
        texts: dict[str, str] = {}
        known = set(trained)
        latest = {example.query_id: example for example in examples}
        fresh = [
            example
            for example in latest.values()
            if known.isdisjoint((example.query_id, normalise(example.query)))
        ]
        for example in fresh:
            candidates = distinct_candidates(example)
            found = grades(mined_gains(example, candidates), gain)
            if any(found):
                queries[example.query_id] = example.query
                ids = [candidate.id for candidate in candidates]
                graded[example.query_id] = dict(zip(ids, found, strict=True))
                texts |= {candidate.id: candidate.text for candidate in candidates}
        idle, old = len(fresh) - len(queries), len(latest) - len(fresh)
        return cls(queries, graded, texts, idle, old)

    def __bool__(self) -> bool:
        return bool(self.queries)

    def __str__(self) -> str:
        nothing = "" if self else "; warning: nothing is evaluated, and the last step is exported"
        return (
            f"{len(self.queries)} held-out queries with {len(self.texts)} memories to rank "
            f"({self.without_relevant} without a relevant one, {self.trained} trained on: left out)"
            + nothing
        )

    @property
    def digest(self) -> str | None:
        """Identifies queries, texts and grades; None where there is nothing."""
        if not self:
            return None
        content = repr((self.queries, self.grades, self.texts))
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def read_held_out(
    config: Config,
    given: Sequence[Path] | None,
    rounds: Sequence[Path],
    trained: Iterable[Selected],
) -> HeldOut:
    """Held-out examples in the folders ``given``, by default those that are beside ``rounds``.

    Nothing unless ``training.eval_every`` is set. Raises `ExamplesError` for a folder that is
    unfinished or damaged, and for folders ``given`` in vain.
    """
    if config.training.eval_every is None:
        if given:
            raise ExamplesError("held-out examples are of no use without training.eval_every")
        return HeldOut()
    folders = given or [path for path in map(held_out_dir, rounds) if path.exists()]
    seen = set[str]()
    for item in trained:
        seen |= {item.query_id, normalise(item.query)}
        seen |= {passage.id for passage in (*item.positives, *item.negatives)}
    mined = (example for folder in folders for example in read_examples(folder))
    return HeldOut.of(mined, config.relevant_above, seen)


def evaluate(held_out: HeldOut, encoder: Encoder, world: World) -> dict[str, float]:
    """Means of `EVALUATED` over the queries; equal on all processes, which share the texts.

    The model's train or eval mode and the random state are as before. Equally similar memories are
    ranked worst first, so that a collapsed encoder does not get the order of proposal for free.
    """
    queries = {id: ("query", encoder.query_prefix + t) for id, t in held_out.queries.items()}
    docs = {id: ("memory", encoder.memory_prefix + t) for id, t in held_out.texts.items()}
    texts = list(dict.fromkeys([*queries.values(), *docs.values()]))
    row = {text: i for i, text in enumerate(texts)}
    owners = deal(np.array([len(text) for _, text in texts]), world.size)
    mine = [texts[i] for i in owners[world.rank]]
    local = torch.zeros(len(mine), encoder.dim)
    for side in SIDES:
        at = [i for i, (kind, _) in enumerate(mine) if kind == side]
        local[at] = torch.from_numpy(encoder.encode([mine[i][1] for i in at], side=side))
    vectors = world.gather_rows(local.to(world.device), owners).cpu().numpy()
    runs = {}
    for id, text in queries.items():
        graded = held_out.grades[id]
        near = vectors[[row[docs[doc]] for doc in graded]] @ vectors[row[text]]
        order = sorted(zip(-near, graded.values(), graded, strict=True))
        runs[id] = [doc for _, _, doc in order]
    means = mean_metrics(ir_metrics(runs, held_out.grades, EVALUATED), EVALUATED)
    # Processor and BLAS may differ between processes, what they decide by it must not.
    figures = torch.tensor([means[name] for name in EVALUATED], dtype=torch.float64)
    figures = figures.to(world.device)
    world.broadcast([figures])
    return dict(zip(EVALUATED, figures.tolist(), strict=True))
