"""How good an answer is, by the reference answer: the measures that experiments share.

BERTScore and ROUGE-L for what an English model can read; for text that it can't (`by_characters`),
character n-grams alone. Scores are kept by model, layer and texts, as answers are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from memshare.evaluation.cache import ResultCache, content_hash
from memshare.evaluation.data import Pair, by_characters
from memshare.llm.factory import model_identity
from memshare.metrics.bertscore import BertScorer
from memshare.metrics.chrf import chrf
from memshare.metrics.rouge import rouge_l
from memshare.retrieval.encoder_folder import resolve_encoder

BERTSCORES = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
F1 = BERTSCORES[2]
ROUGE_L = "rouge_l"
CHRF = "chrf"
QUALITY = (*BERTSCORES, ROUGE_L, CHRF)
Scores = dict[str, float]  # metric -> value of one answer


class Measures:
    """Scores answers; the BERTScore model is loaded when it is first needed."""

    def __init__(self, bertscore_model: str, cache: ResultCache) -> None:
        self._source = resolve_encoder(bertscore_model)
        self._identity = model_identity(self._source)
        self._cache = cache
        self._scorer: BertScorer | None = None
        self._lock = asyncio.Lock()  # one model; its tokenizer serves one thread at a time

    @property
    def bert(self) -> BertScorer:
        """The BERTScore model."""
        if self._scorer is None:
            self._scorer = BertScorer(self._source)
        return self._scorer

    async def datasets(
        self, answered: Sequence[tuple[Sequence[Pair], Sequence[str]]]
    ) -> list[list[Scores]]:
        """The scores of each answer to each of some datasets' tests; an empty answer scores 0.

        What BERTScore measures is measured together, in full batches.
        """
        english = [not by_characters(tests) for tests, _ in answered]
        pairs = [
            (answer, test.answer)
            for (tests, answers), wanted in zip(answered, english, strict=True)
            if wanted
            for test, answer in zip(tests, answers, strict=True)
        ]
        async with self._lock:
            scored = iter(await asyncio.to_thread(self._english, pairs))
        return [
            [
                next(scored) if wanted else {CHRF: chrf(answer, test.answer)}
                for test, answer in zip(tests, answers, strict=True)
            ]
            for (tests, answers), wanted in zip(answered, english, strict=True)
        ]

    def _english(self, pairs: Sequence[tuple[str, str]]) -> list[Scores]:
        bert = self.bert
        keys = [content_hash("quality", self._identity, bert.layer, *pair) for pair in pairs]
        found = [self._cache.get(key) for key in keys]
        missing = [i for i, row in enumerate(found) if row is None]
        scored = bert.score([pairs[i][0] for i in missing], [pairs[i][1] for i in missing])
        for i, score in zip(missing, scored, strict=True):
            found[i] = {**dict(zip(BERTSCORES, score, strict=True)), ROUGE_L: rouge_l(*pairs[i])}
            self._cache.put(keys[i], found[i])
        return found
