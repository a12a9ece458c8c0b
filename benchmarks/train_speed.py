"""Training speed, side by side with sentence-transformers' trainer.

Both train all-MiniLM-L6-v2 on the same triplets (query, positive, hard negative; lengths log-normal
around 55 tokens, up to 256) with the same loss: InfoNCE over in-batch and hard negatives, which
sentence-transformers calls MultipleNegativesRankingLoss. Dropout is off on both sides, and loss and
gradients are first shown to be equal. Its cached form is measured too, and the faster of its two
counts. Each side is given the whole job: tokenising, batching, forward, backward, optimizer.

Runs of both alternate within one process, and a figure is the ratio of the medians, since machines
are shared and noisy. Claims: ``speedup_b16`` and ``speedup_b64``, our real (non-padding) tokens a
second over theirs at that batch size; ``gradcache_overhead``, the time of our step with every
micro-batch encoded twice over that with all graphs kept; ``max_gradient_difference``, absolute.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from common import parser, write_claims
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from transformers import TrainerCallback

from memshare.config import EncoderConfig, TrainingConfig
from memshare.progress import log
from memshare.retrieval.encoder import Encoder, resolve_encoder
from memshare.training.batching import Batches
from memshare.training.gather import World
from memshare.training.optimizer import make_optimizer, update
from memshare.training.select import Passage, Selected, text_key
from memshare.training.step import ContrastiveStep

MODEL = "all-MiniLM-L6-v2"
MAX_TOKENS = 256
LR = 2e-5
STEPS = {16: 4, 64: 2}  # of one timed run
BLOCKS = 3  # timed runs of each side
BATCH_TOKENS = 512  # ours: what stays in a core's cache
Triplet = tuple[str, str, str]


def triplets(encoder: Encoder, count: int, seed: int, middle: float) -> list[Triplet]:
    """Random words that are one token each, in texts of log-normal length."""
    draw = random.Random(seed)
    words = [word for word in encoder.tokenizer.get_vocab() if word.isalpha() and word.isascii()]
    words.sort()

    def text() -> str:
        length = round(draw.lognormvariate(0.0, 0.6) * middle)
        return " ".join(draw.choices(words, k=min(max(length, 4), MAX_TOKENS - 2)))

    return [(text(), text(), text()) for _ in range(count)]


def selected(rows: Sequence[Triplet]) -> list[Selected]:
    """Triplets as the trainer's own items."""

    def passage(text: str, name: str) -> Passage:
        return Passage(name, text, text_key(text), name)

    return [
        Selected(
            query_id=str(i), query=query, pool="main", principal=None, round=1, answer=f"own {i}",
            positives=(passage(positive, f"positive {i}"),),
            negatives=(passage(negative, f"negative {i}"),), never_negative=frozenset(),
        )
        for i, (query, positive, negative) in enumerate(rows)
    ]  # fmt: skip


def settings(batch: int, **changes: Any) -> TrainingConfig:
    """Ours: all graphs kept unless told otherwise."""
    base = {"batch_size": batch, "dropout": False, "lr": LR, "batch_tokens": BATCH_TOKENS,
            "graph_tokens": 10**9}  # fmt: skip
    return TrainingConfig(**{**base, **changes})


def fresh() -> Encoder:
    """Our encoder with the published weights."""
    return Encoder.load(EncoderConfig(model=MODEL, max_length=MAX_TOKENS, device="cpu"))


def peer() -> SentenceTransformer:
    """The same weights in sentence-transformers, without dropout."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = SentenceTransformer(resolve_encoder(MODEL), device="cpu", config_kwargs=off)
    model.max_seq_length = MAX_TOKENS
    return model


def ours_once(rows: Sequence[Triplet], config: TrainingConfig) -> tuple[float, int]:
    """Seconds of one epoch, and its real tokens."""
    encoder = fresh()
    optimizer = make_optimizer(encoder.model, config)
    began = time.perf_counter()
    batches = Batches(selected(rows), encoder, global_batch=config.batch_size, seed=0)
    step = ContrastiveStep(encoder, batches.table, config, World(torch.device("cpu")), seed=0)
    tokens = 0
    for number in range(batches.steps_per_epoch):
        tokens += step.backward(batches.batch(number), number).tokens
        update(optimizer, LR, config.max_grad_norm)
    return time.perf_counter() - began, tokens


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds from the first step's begin to the end of training."""

    def __init__(self) -> None:
        """Not started."""
        self.seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self.seconds = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self.seconds


def theirs_once(rows: Sequence[Triplet], batch: int, *, cached: bool) -> float:
    """Seconds of one epoch by sentence-transformers' trainer."""
    model = peer()
    loss = (
        CachedMultipleNegativesRankingLoss(model, mini_batch_size=min(batch, 32))
        if cached
        else MultipleNegativesRankingLoss(model)
    )
    clock = Clock()
    columns = zip(("anchor", "positive", "negative"), zip(*rows, strict=True), strict=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch, num_train_epochs=1,
            learning_rate=LR, use_cpu=True, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, loss=loss, callbacks=[clock],
            train_dataset=Dataset.from_dict({name: list(texts) for name, texts in columns}),
        )  # fmt: skip
        trainer.train()
    return clock.seconds


def gradient_difference(rows: Sequence[Triplet]) -> tuple[float, float]:
    """Of one batch: the largest difference of any gradient, and of the loss."""
    model, encoder = peer().train(), fresh()
    features = [model.tokenize(list(texts)) for texts in zip(*rows, strict=True)]
    loss = MultipleNegativesRankingLoss(model)(features, torch.empty(0))
    loss.backward()
    theirs = {
        name: parameter.grad
        for name, parameter in model[0].auto_model.named_parameters()
        if parameter.grad is not None
    }
    config = settings(len(rows))
    batches = Batches(selected(rows), encoder, global_batch=len(rows), seed=0)
    step = ContrastiveStep(encoder, batches.table, config, World(torch.device("cpu")), seed=0)
    result = step.backward(batches.batch(0), 0)
    ours = {
        name: parameter.grad
        for name, parameter in encoder.model.named_parameters()
        if parameter.grad is not None
    }
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"other parameters are trained: {ours.keys() ^ theirs.keys()}")
    most = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    return most, abs(result.loss - float(loss.detach()))


def main() -> None:
    """Measure and report."""
    args = parser(__doc__).parse_args()
    middle = 20.0 if args.quick else 55.0
    batches = {16: 1} if args.quick else STEPS
    encoder = fresh()
    gradient, loss = gradient_difference(triplets(encoder, 16, args.seed, middle))
    log(f"same batch: gradients differ by {gradient:.1e}, losses by {loss:.1e}")
    claims = {"max_gradient_difference": gradient}
    details: dict[str, Any] = {"loss_difference": loss}
    for batch, steps in batches.items():
        rows = triplets(encoder, batch * steps, args.seed + batch, middle)
        seconds: dict[str, list[float]] = {name: [] for name in ("ours", "twice", "st", "cached")}
        tokens = 0
        for block in range((1 if args.quick else BLOCKS) + 1):  # the first warms up
            took, tokens = ours_once(rows, settings(batch))
            found = {
                "ours": took,
                "twice": ours_once(rows, settings(batch, graph_tokens=0))[0],
                "st": theirs_once(rows, batch, cached=False),
                "cached": theirs_once(rows, batch, cached=True),
            }
            log(f"batch {batch}: " + ", ".join(f"{k} {v:.1f} s" for k, v in found.items()))
            if block:
                for name, value in found.items():
                    seconds[name].append(value)
        middles = {name: median(values) for name, values in seconds.items()}
        fastest = min(middles["st"], middles["cached"])
        claims[f"speedup_b{batch}"] = fastest / middles["ours"]
        claims["gradcache_overhead"] = middles["twice"] / middles["ours"]
        details[f"batch_{batch}"] = {"steps": steps, "tokens": tokens, "seconds": seconds}
    write_claims(
        args,
        claims,
        data=f"random words, {middle:g} tokens in the middle, at most {MAX_TOKENS}",
        model={"encoder": MODEL},
        settings={"batch_tokens": BATCH_TOKENS, "threads": torch.get_num_threads(), "lr": LR},
        **details,
    )


if __name__ == "__main__":
    main()
