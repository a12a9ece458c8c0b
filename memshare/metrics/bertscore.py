"""BERTScore (Zhang et al. 2020), the paper's metric, through the bert-score package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from memshare.loading import using_transformers


class BertScore(NamedTuple):
    """Precision, recall and F1 in about [-1, 1] (cosines; no rescaling with a baseline)."""

    precision: float
    recall: float
    f1: float


_NOTHING = BertScore(0.0, 0.0, 0.0)


class BertScorer:
    """One loaded BERTScore model.

    ``model`` is a local folder or a hub name. The layer is the one bert-score tuned for that model
    (by the name's last part), or the last one of a model that it doesn't know. Scores are only
    comparable between runs with equal ``name`` and ``layer``, so reports carry both.
    """

    def __init__(self, model: str) -> None:
        from bert_score import BERTScorer
        from bert_score.utils import model2layers
        from transformers import AutoConfig

        tuned = {known.rsplit("/", 1)[-1]: layer for known, layer in model2layers.items()}
        self.name = Path(model).name
        self.layer: int = (
            tuned.get(self.name) or AutoConfig.from_pretrained(model).num_hidden_layers
        )
        with using_transformers():
            self._scorer = BERTScorer(
                model_type=model, num_layers=self.layer, use_fast_tokenizer=True
            )
        # A tokenizer that states no limit would let a long text overrun the position table.
        tokenizer, positions = self._scorer._tokenizer, self._scorer._model.config
        limit = getattr(positions, "max_position_embeddings", tokenizer.model_max_length)
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)

    def score(self, candidates: Sequence[str], references: Sequence[str]) -> list[BertScore]:
        """Score each candidate against its reference; an empty text on either side scores zero."""
        if len(candidates) != len(references):
            raise ValueError(f"{len(candidates)} candidates but {len(references)} references")
        filled = [
            i for i, (c, r) in enumerate(zip(candidates, references, strict=True))
            if c.strip() and r.strip()
        ]  # fmt: skip
        scores = [_NOTHING] * len(candidates)
        if filled:
            columns = self._scorer.score(
                [candidates[i] for i in filled], [references[i] for i in filled]
            )
            for i, precision, recall, f1 in zip(
                filled, *(c.tolist() for c in columns), strict=True
            ):
                scores[i] = BertScore(precision, recall, f1)
        return scores
