"""The pocket LM's recipe: every number that decides what is trained, and a hash that names it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

# Whatever changes the trained weights: a change in any of these files makes a new LM.
_SOURCES = (
    "recipe.py", "words.py", "episodes.py", "language.py", "verse.py", "logic.py", "plans.py",
    "tokenizer.py", "fit.py",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """Shape of the model, what it reads, and for how long.

    ``look_back``, ``match``, ``copy``: strengths of the copying circuit that the weights start as,
    which compares tokens in the rotary dimensions that turn by less than ``slow`` radians a token
    (see `memshare.pocket.fit`). ``stages``: share of all steps, and the tokens a row may
    have. ``repeats``: share of tokens in repeated random sequences, first and last.
    ``batch_tokens`` counts padded tokens a step.
    """

    seed: int = 0
    vocab_size: int = 3072
    hidden_size: int = 256
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    mlp_size: int = 256
    rope_theta: float = 100_000_000.0
    max_positions: int = 4096
    init_std: float = 0.02
    embedding_std: float = 0.05
    look_back: float = 12.0
    match: float = 2.6
    copy: float = 0.5
    slow: float = 0.004
    steps: int = 650
    batch_tokens: int = 1536
    muon_lr: float = 0.006
    adam_lr: float = 0.002
    warmup_steps: int = 20
    decay: float = 0.6  # share of the steps over which the learning rate falls to zero
    stages: tuple[tuple[float, int], ...] = ((0.35, 160), (0.4, 400), (0.25, 1024))
    repeats: tuple[float, float] = (0.1, 0.05)
    unknown_weight: float = 0.1  # loss weight of answers that nothing before them shows
    long_answers: float = 0.08  # in the last stage

    def name(self) -> str:
        """Hex digits that change when the recipe or a source file of the training changes."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for source in _SOURCES:
            digest.update((Path(__file__).parent / source).read_bytes())
        return digest.hexdigest()[:16]
