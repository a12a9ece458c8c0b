"""One timed run of our trainer, and one of sentence-transformers', on the same triplets.

The same weights, texts and loss: InfoNCE over in-batch and hard negatives, which
sentence-transformers calls MultipleNegativesRankingLoss. Dropout is off on both sides. Each is
given the whole job: tokenising, batching, forward, backward, optimizer.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from random_texts import random_text, selected, words_of
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
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.encoder_folder import resolve_encoder
from memshare.training.allocator import keep_freed_memory
from memshare.training.batching import Batches
from memshare.training.gather import World
from memshare.training.optimizer import make_optimizer, update
from memshare.training.select import Selected
from memshare.training.step import ContrastiveStep
from memshare.training.towers import prepare

LR = 2e-5
MAX_TOKENS = 256
Triplet = tuple[str, str, str]


@dataclass(frozen=True)
class Setup:
    """What is trained and where; ``attention`` is the peer's implementation in transformers."""

    model: str
    device: str = "cpu"
    bf16: bool = False
    attention: str = "sdpa"

    def encoder(self, **more: Any) -> Encoder:
        """Ours, with the weights as they came; ``more`` is `EncoderConfig`'s."""
        config = EncoderConfig(model=self.model, max_length=MAX_TOKENS, device=self.device, **more)
        return Encoder.load(config)

    def peer(self) -> SentenceTransformer:
        """The same in sentence-transformers, without dropout."""
        model = SentenceTransformer(
            resolve_encoder(self.model),
            device=self.device,
            config_kwargs={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            model_kwargs={"attn_implementation": self.attention},
        )
        model.max_seq_length = MAX_TOKENS
        return model

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision, where it is asked for."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, dtype=torch.bfloat16) if self.bf16 else nullcontext()


@dataclass(frozen=True)
class Run:
    """Seconds of a run and of its steps alone, real tokens, model FLOPs, the GPU's peak bytes."""

    seconds: float
    step_seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    peak_flops: float | None = None
    peak_bytes: int = 0


def triplets(encoder: Encoder, count: int, seed: int, middle: float) -> list[Triplet]:
    """Query, positive and hard negative, each a random text with ``middle`` words as the median."""
    draw, words = random.Random(seed), words_of(encoder)

    def text() -> str:
        return random_text(draw, words, middle, 4, MAX_TOKENS - 2)

    return [(text(), text(), text()) for _ in range(count)]


def _items(rows: Sequence[Triplet]) -> list[Selected]:
    return selected((query, positive, [negative]) for query, positive, negative in rows)


def ours_once(setup: Setup, rows: Sequence[Triplet], config: TrainingConfig) -> Run:
    """One epoch of ours, as train/contrastive.py runs it on one device."""
    encoder = setup.encoder()
    if encoder.device.type == "cpu":
        keep_freed_memory()  # as `launch` does: in this process nothing else may be measured
    prepare(encoder, config, seed=0)
    optimizer = make_optimizer(encoder.model, config)

    def engine(some: Sequence[Triplet]) -> tuple[Batches, ContrastiveStep]:
        size, world = config.batch_size, World(encoder.device)
        batches = Batches(_items(some), encoder, global_batch=size, seed=0, settings=config)
        table, autocast = batches.table, setup.autocast
        return batches, ContrastiveStep(encoder, table, config, world, seed=0, autocast=autocast)

    if config.compile:  # paid for once a training, however long it is
        batches, step = engine(rows[: config.batch_size])
        step.backward(batches.batch(0), 0)
        optimizer.zero_grad()
    _reset_peak(encoder.device)
    began = time.perf_counter()
    batches, step = engine(rows)
    ready = time.perf_counter()
    tokens, flops, peak = 0, 0.0, None
    with batches.ahead() as batch_of:
        for number in range(batches.steps):
            result = step.backward(batch_of(number), number)
            update(optimizer, LR, config.max_grad_norm)
            tokens, flops, peak = tokens + result.tokens, flops + result.flops, result.peak
    _wait(encoder.device)
    done = time.perf_counter()
    return Run(done - began, done - ready, tokens, flops, peak, _peak_bytes(encoder.device))


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds from the first step's begin to the end of training."""

    def __init__(self, device: torch.device) -> None:
        self.seconds, self._device = 0.0, device

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        _wait(self._device)
        self.seconds = time.perf_counter() - self.seconds


def theirs_once(
    setup: Setup, rows: Sequence[Triplet], batch: int, mini_batch: int | None = None
) -> Run:
    """One epoch by sentence-transformers' trainer; the cached loss where a ``mini_batch`` is."""
    model = setup.peer()
    loss = (
        MultipleNegativesRankingLoss(model)
        if mini_batch is None
        else CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch)
    )
    device = torch.device(setup.device)
    clock = _Clock(device)
    columns = zip(("anchor", "positive", "negative"), zip(*rows, strict=True), strict=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch, num_train_epochs=1,
            learning_rate=LR, use_cpu=device.type == "cpu", bf16=setup.bf16, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, loss=loss, callbacks=[clock],
            train_dataset=Dataset.from_dict({name: list(texts) for name, texts in columns}),
        )  # fmt: skip
        _reset_peak(device)
        trainer.train()
    return Run(clock.seconds, peak_bytes=_peak_bytes(device))


def gradient_difference(
    setup: Setup, rows: Sequence[Triplet], config: TrainingConfig
) -> tuple[float, float]:
    """Of one batch: the largest difference of any gradient, and of the loss."""
    model, encoder = setup.peer().train(), setup.encoder()
    features = [model.preprocess(list(texts)) for texts in zip(*rows, strict=True)]
    loss = MultipleNegativesRankingLoss(model)(features, torch.empty(0))
    loss.backward()
    theirs = _gradients(model[0].auto_model)
    batches = Batches(_items(rows), encoder, global_batch=len(rows), seed=0)
    step = ContrastiveStep(encoder, batches.table, config, World(encoder.device), seed=0)
    result = step.backward(batches.batch(0), 0)
    ours = _gradients(encoder.model)
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"other parameters are trained: {ours.keys() ^ theirs.keys()}")
    most = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    return most, abs(result.loss - float(loss.detach()))


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
