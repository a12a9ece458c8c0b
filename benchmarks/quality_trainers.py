"""Our trainer and sentence-transformers' on the same examples, for as many steps.

Theirs is ``MultipleNegativesRankingLoss`` with one row for each pair of a query and a positive, and
as many hard negatives as ours has. Rows need equally many, so a query with fewer repeats its own.
It is trained twice: by ``BatchSamplers.NO_DUPLICATES``, as its documentation advises, and by the
trainer's default. The first leaves out rows that share a text with the batch, so that with several
hard negatives from a small pool its batches are smaller than asked for; the second's are whole, and
a text that two rows share is a negative of its own query in one of them. Ours is the trainer as
configured; it encodes a shared text once.
Batch size, steps, learning rate and schedule, weight decay, clipping, temperature and seed are the
same; dropout is off on both sides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from memshare.config import Config
from memshare.evaluation.learn import train_encoder
from memshare.progress import log
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.encoder_folder import resolve_encoder
from memshare.training.select import Selected

PEERS = {
    "sentence_transformers": BatchSamplers.NO_DUPLICATES,
    "sentence_transformers_default": BatchSamplers.BATCH_SAMPLER,
}
TRAINED = ("ours", *PEERS)


def budget(config: Config, items: Sequence[Selected], seed: int) -> Config:
    """``config`` for a seed, with the number of steps that both trainers get."""
    training = config.training
    epoch = -(-len(items) // training.batch_size)
    steps = training.max_steps or math.ceil(training.epochs * epoch)
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"seed": seed}),
            "training": training.model_copy(update={"max_steps": steps}),
        }
    )


def theirs(
    config: Config, items: Sequence[Selected], sampler: BatchSamplers, folder: Path
) -> Encoder:
    """What sentence-transformers' trainer makes of the same examples, loaded as our encoder."""
    training = config.training
    count = max(len(item.negatives) for item in items)
    rows = [
        (item.query, positive.text, *(n.text for n in islice(cycle(item.negatives), count)))
        for item in items
        for positive in item.positives
    ]
    names = ("anchor", "positive", *(f"negative_{place}" for place in range(1, count + 1)))
    columns = zip(names, zip(*rows, strict=True), strict=True)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    name = resolve_encoder(config.encoder.model)
    model = SentenceTransformer(name, device="cpu", config_kwargs=off)
    model.max_seq_length = config.encoder.max_length
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=training.batch_size,
        max_steps=training.max_steps, learning_rate=training.lr, use_cpu=True,
        lr_scheduler_type=training.schedule, warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay, max_grad_norm=training.max_grad_norm,
        batch_sampler=sampler, seed=config.run.seed, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    SentenceTransformerTrainer(
        model=model,
        args=arguments,
        loss=MultipleNegativesRankingLoss(model, scale=1 / training.temperature),
        train_dataset=Dataset.from_dict({name: list(texts) for name, texts in columns}),
    ).train()
    model.save(str(folder / "encoder"))
    where = {"model": str(folder / "encoder")}
    return Encoder.load(config.encoder.model_copy(update=where))


def train_all(
    config: Config, items: Sequence[Selected], seed: int, folder: Path
) -> tuple[dict[str, Encoder], dict[str, float]]:
    """Every trainer's encoder for a seed, and their seconds."""
    config = budget(config, items, seed)
    encoders, seconds = {}, {}
    for name in TRAINED:
        began = time.perf_counter()
        encoders[name] = (
            theirs(config, items, PEERS[name], folder / name)
            if name in PEERS
            else train_encoder(config, items)[0]
        )
        seconds[name] = time.perf_counter() - began
    log(f"{folder.name}: " + ", ".join(f"{name} {took:.0f} s" for name, took in seconds.items()))
    return encoders, seconds
