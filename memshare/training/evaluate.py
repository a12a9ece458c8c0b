"""Evaluation while training: does the encoder rank held-out queries' useful memories first?

Held-out memories that were mined and labelled as training queries are (`mining`) rank their own
judged candidates, and nothing else (condensed lists: Sakai 2007, "Alternatives to Bpref"). Nobody
judged the rest of the pool: taking it for useless would count what a better encoder newly finds
against it, while the encoder that training starts from, which proposed many of the candidates, has
all of its own finds judged.

The queries of a data set (`imported`) come with what answers them, and often with nothing else.
They rank all of its held-out texts, of which those that they don't name are not relevant, as in any
test collection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from memshare.arrays import Floats
from memshare.config import BM25Config, Config
from memshare.metrics.ir import METRICS, MORE_RECALL, ir_metrics, mean_metrics
from memshare.records import Example, normalise
from memshare.retrieval.bm25 import BM25
from memshare.retrieval.encoder import SIDES, Encoder
from memshare.retrieval.gate import grades
from memshare.training.batching import deal
from memshare.training.examples import held_out_dir, read_examples
from memshare.training.gather import World
from memshare.training.relevance import mined_gains
from memshare.training.select import Selected, distinct_candidates, text_key
from memshare.training.shard import ExamplesError

EVALUATED = (*METRICS, *MORE_RECALL)
DEPTH = 10  # the last rank that they look at
BLOCK = 256  # queries whose similarities to all texts of a data set are in memory at a time


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What is evaluated on; false where there is nothing.

    ``queries``: query id -> text. ``grades``: query id -> memory id -> grade 0 to 3 (`grades`).
    ``texts``: memory id -> text; a data set's have their keys (`text_key`) for ids, so that copies
    are one. ``ranked``: queries, and the ids of what each of them ranks. ``indifferent`` and
    ``trained`` count queries that were left out.
    """

    queries: Mapping[str, str] = field(default_factory=dict)
    grades: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    ranked: Sequence[tuple[Sequence[str], Sequence[str]]] = ()
    indifferent: int = 0
    trained: int = 0

    @classmethod
    def of(cls, examples: Iterable[Example], gain: float, trained: Collection[str] = ()) -> HeldOut:
        """Judge by the gate's rule: a candidate is relevant if its gain is above ``gain``.

        Queries to which all that they rank is equally relevant tell nothing and are left out; so
        are those that ``trained`` has, by id, as memories that were split otherwise when those were
        mined, or, as in data from elsewhere, by what is asked (as `normalise` has it) or by a pair
        that is also there the other way round (`_turned`). Of a memory that is a query twice the
        later counts; rows of a data set that ask the same are one query.
        """
        known = set(trained)
        latest = {example.query_id: example for example in examples}
        fresh = [
            example
            for example in latest.values()
            if known.isdisjoint((example.query_id, normalise(example.query), *_pairs(example)))
        ]
        groups: dict[str, list[Example]] = {}
        for example in fresh:
            name = f"set {example.pool}" if example.exhaustive else f"query {example.query_id}"
            groups.setdefault(name, []).append(example)
        queries: dict[str, str] = {}
        graded: dict[str, dict[str, int]] = {}
        texts: dict[str, str] = {}
        ranked = []
        indifferent = 0
        for group in groups.values():
            asked, judged, docs = _judged(group, gain)
            telling = [id for id in asked if _tells(asked[id], judged[id], docs)]
            indifferent += len(asked) - len(telling)
            if telling:
                queries |= {id: asked[id] for id in telling}
                graded |= {id: judged[id] for id in telling}
                texts |= docs
                ranked.append((telling, list(docs)))
        return cls(queries, graded, texts, ranked, indifferent, len(latest) - len(fresh))

    def __bool__(self) -> bool:
        return bool(self.queries)

    def __str__(self) -> str:
        nothing = "" if self else "; warning: nothing is evaluated, and the last step is exported"
        return (
            f"{len(self.queries)} held-out queries with {len(self.texts)} memories to rank "
            f"({self.indifferent} to which all of theirs are alike, {self.trained} trained on: "
            f"left out){nothing}"
        )

    @property
    def digest(self) -> str | None:
        """Identifies queries, texts and grades; None where there is nothing."""
        if not self:
            return None
        content = repr((self.queries, self.grades, self.texts))
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _judged(
    group: Sequence[Example], gain: float
) -> tuple[dict[str, str], dict[str, dict[str, int]], dict[str, str]]:
    """Queries, grades and texts, as `HeldOut` has them, of those that rank the same memories."""
    queries: dict[str, str] = {}
    graded: dict[str, dict[str, int]] = {}
    texts: dict[str, str] = {}
    first: dict[str, str] = {}
    for example in group:
        id = first.setdefault(normalise(example.query), example.query_id)
        queries.setdefault(id, example.query)
        known = graded.setdefault(id, {})
        candidates = distinct_candidates(example)
        found = grades(mined_gains(example, candidates), gain)
        for candidate, grade in zip(candidates, found, strict=True):
            doc = text_key(candidate.text) if example.exhaustive else candidate.id
            known[doc] = max(grade, known.get(doc, 0))
            texts.setdefault(doc, candidate.text)
    return queries, graded, texts


def _turned(query: str, text: str) -> str:
    """Names the pair of ``text`` as a query and ``query`` as its answer, both by their keys."""
    return f"{text} {query}"


def _pairs(example: Example) -> Iterator[str]:
    """A data set's query with each text that answers it: of paraphrases either may ask."""
    if example.exhaustive:
        asked = text_key(example.query)
        for one in example.candidates:
            if one.loglik is not None and one.loglik >= 0.0:
                yield f"{asked} {text_key(one.text)}"


def _tells(query: str, graded: Mapping[str, int], ranked: Collection[str]) -> bool:
    """Whether not all that a query ranks is equally relevant to it; it does not rank itself."""
    own = text_key(query)
    others = len(ranked) - len(graded) - (own in ranked and own not in graded)
    return len({*graded.values(), *([0] if others else [])}) > 1


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
        seen |= {_turned(item.prompt, passage.key) for passage in item.positives}
    mined = (example for folder in folders for example in read_examples(folder))
    return HeldOut.of(mined, config.relevant_above, seen)


def evaluate(held_out: HeldOut, encoder: Encoder, world: World) -> dict[str, float]:
    """Means of `EVALUATED` over the queries; equal on all processes, which share the texts.

    The model's train or eval mode and the random state are as before.
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
    runs: dict[str, list[str]] = {}
    for asking, ranked in held_out.ranked:
        near = vectors[[row[docs[id]] for id in ranked]]
        for low in range(0, len(asking), BLOCK):
            asked = asking[low : low + BLOCK]
            similar = vectors[[row[queries[id]] for id in asked]] @ near.T
            for id, each in zip(asked, similar, strict=True):
                runs[id] = _best(each, ranked, held_out.grades[id])
    means = _means(held_out, runs)
    # Processor and BLAS may differ between processes, what they decide by it must not.
    figures = torch.tensor([means[name] for name in EVALUATED], dtype=torch.float64)
    figures = figures.to(world.device)
    world.broadcast([figures])
    return dict(zip(EVALUATED, figures.tolist(), strict=True))


def evaluate_bm25(held_out: HeldOut, config: BM25Config) -> dict[str, float]:
    """The same of BM25, which nobody trains."""
    runs: dict[str, list[str]] = {}
    for asked, ranked in held_out.ranked:
        index = BM25(config).fit(ranked, [held_out.texts[id] for id in ranked])
        found = index.top([held_out.queries[id] for id in asked], DEPTH + 1)
        runs |= {id: [doc for doc, _ in each] for id, each in zip(asked, found, strict=True)}
    return _means(held_out, runs)


def _means(held_out: HeldOut, runs: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """``runs``: query id -> ids, best first, `DEPTH` and one, since a text does not find itself."""
    others = {
        id: [doc for doc in found if doc != text_key(held_out.queries[id])][:DEPTH]
        for id, found in runs.items()
    }
    return mean_metrics(ir_metrics(others, held_out.grades, EVALUATED), EVALUATED)


def _best(similar: Floats, ranked: Sequence[str], graded: Mapping[str, int]) -> list[str]:
    """The ids of the most similar of ``ranked``, best first: `DEPTH` of them and one.

    Equally similar ones are ranked worst first, so that a collapsed encoder does not get the order
    of proposal for free.
    """
    least = -np.inf
    if len(ranked) > DEPTH + 1:
        least = np.partition(similar, -DEPTH - 1)[-DEPTH - 1]
    places = np.flatnonzero(similar >= least).tolist()
    order = sorted((-similar[i], graded.get(ranked[i], 0), ranked[i]) for i in places)
    return [doc for *_, doc in order[: DEPTH + 1]]
