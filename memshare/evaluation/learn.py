"""Train an encoder on fixed pools, as one round of the loop would, within this process.

Mining, choice of positives, batches, loss and optimizer are the loop's own (memshare/training); no
checkpoints and no gate, since an experiment wants the encoder whatever came of it. A folder named
by content holds what was made: mining goes on at the first missing shard, and a finished encoder is
loaded instead of trained again.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memshare.config import Config, LLMConfig
from memshare.evaluation.cache import content_hash
from memshare.files import write_json
from memshare.llm.factory import llm_identity, model_identity
from memshare.llm.rubric import load_rubric
from memshare.pool.store import PoolStore
from memshare.progress import log, track
from memshare.records import Memory, NewMemory
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.encoder_folder import resolve_encoder
from memshare.training.batching import Batches
from memshare.training.examples import read_training, round_dir
from memshare.training.gather import World
from memshare.training.journal import Span
from memshare.training.labels import open_labeller
from memshare.training.lora import merge_adapters
from memshare.training.mining import mine
from memshare.training.mining_plan import plan_round, split_memories
from memshare.training.optimizer import lr_factor, make_optimizer, update
from memshare.training.proposals import open_proposer
from memshare.training.select import Selected, select
from memshare.training.step import ContrastiveStep
from memshare.training.towers import FrozenMemories, prepare

Pools = Mapping[str, Sequence[Memory]]


@dataclass(frozen=True, eq=False)
class Learned:
    """A trained encoder and what its making reported (seconds, examples, steps), by step."""

    encoder: Encoder
    report: Mapping[str, Any]


async def learn(config: Config, pools: Pools, folder: Path, iterations: int = 1) -> Learned:
    """Train `config.encoder` on ``pools`` by the settings of ``config``.

    ``folder`` holds all that is learned, and a cache of likelihoods that its sub-folders share.
    ``iterations``: how often candidates are mined, each time proposed by BM25 and the encoder that
    the time before has trained (Wang et al. 2023); each training starts from the encoder as it
    came. Where no example can be used it stays as it is. Raises what mining raises.
    """
    settings = next(iter(config.pools.values()))  # for a pool that has none of its own
    made = {name: config.pools.get(name, settings) for name in pools}
    home = folder / _name(config.model_copy(update={"pools": made}), pools)
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    home.mkdir(exist_ok=True)
    if not (home / "cache").is_symlink():
        (home / "cache").symlink_to(folder.resolve() / "cache", target_is_directory=True)
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": home}),
            "database_url": None,
            "pools": made,
            "retriever": config.retriever.model_copy(update={"pools": ()}),
        }
    )
    told = home / "report.json"
    report: dict[str, Any] = json.loads(told.read_text("utf-8")) if told.exists() else {}
    model = config.encoder
    with PoolStore.open(config.url, config.gateway.max_text_chars) as store:
        for pool, memories in pools.items():
            store.create_pool(pool, made[pool].rubric, made[pool].threshold)
            store.append([NewMemory(pool, m.prompt, m.answer, agent=m.agent) for m in memories])
        for number in range(1, iterations + 1):
            output = home / "encoders" / f"{number:06d}"
            if str(number) not in report:  # written last
                examples = round_dir(config.examples_dir, number)
                mined = await _mine(store, config, number, model.model, examples)
                trained = await asyncio.to_thread(_train, config, examples, output)
                report[str(number)] = {"mine": mined, "train": trained}
                write_json(told, report)
            model = model.model_copy(update={"model": str(output)})
    return Learned(Encoder.load(model), report[str(iterations)])


def _name(config: Config, pools: Pools) -> str:
    labels = config.mining.labels
    decides = ["encoder", "mining", "training", "split", "bm25", "agent"]
    llms: tuple[LLMConfig, ...] = () if labels in ("none", "given") else (config.scorer_llm,)
    if labels == "reward":
        decides.append("scorer")
        llms += (config.agent_llm,)
    settings = {section: getattr(config, section).model_dump(mode="json") for section in decides}
    if labels == "reward" and config.scorer.kind == "rubric":
        settings["rubrics"] = {
            name: load_rubric(made.rubric) for name, made in config.pools.items()
        }
    texts = {name: [(m.prompt, m.answer) for m in memories] for name, memories in pools.items()}
    models = [model_identity(resolve_encoder(config.encoder.model)), *map(llm_identity, llms)]
    return content_hash(settings, texts, models, config.run.seed)[:16]


async def _mine(
    store: PoolStore, config: Config, number: int, proposer: str, folder: Path
) -> dict[str, Any]:
    """Mine all memories; ``proposer``: the model whose vectors propose beside BM25."""
    fates = split_memories(store, config)
    spans = {pool: Span(0, store.last_seq(pool)) for pool in config.pools}
    with open_proposer(config, proposer if number > 1 else None) as found:
        by = None if found is None else found.name
        plan = plan_round(store, config, number, spans, fates, folder, by)
        async with open_labeller(config, store) as labeller:
            marker = await mine(store, config, plan, fates, labeller, folder, found)
            assert marker is not None  # it is so for a share of a round alone
            return marker


def _train(config: Config, examples: Path, output: Path) -> dict[str, Any]:
    """Train on the examples of one round and export the encoder. Raises `NonFinite`."""
    began = time.perf_counter()
    selection = select(read_training([examples]), config.training)
    if not selection.items:
        log(f"nothing to learn from: {selection}; the encoder stays as it is")
    encoder, report = train_encoder(config, selection.items)
    shutil.rmtree(output, ignore_errors=True)  # of a run that was killed while it saved
    encoder.save(output)
    return {**selection.counts(), **report, "seconds": time.perf_counter() - began}


def train_encoder(config: Config, items: Sequence[Selected]) -> tuple[Encoder, dict[str, Any]]:
    """`config.encoder`, trained by the steps of train/contrastive.py on one process.

    Also returns what became of it: steps done, those of them that had nothing to teach, and the
    last one's loss if there was one. Without ``items`` the encoder is as it came. Raises
    `NonFinite` where training diverges.
    """
    settings, seed = config.training, config.run.seed
    encoder = Encoder.load(config.encoder)
    report: dict[str, Any] = {"steps": 0, "skipped_steps": 0}
    if items:
        world = World(torch.device(encoder.device))
        prepare(encoder, settings, seed)
        batches = Batches(
            items, encoder, global_batch=settings.batch_size, seed=seed, settings=settings
        )
        gradient = ContrastiveStep(
            encoder, batches.table, settings, world, seed=seed,
            frozen=FrozenMemories.of(encoder, batches, world, settings),
        )  # fmt: skip
        optimizer = make_optimizer(encoder.model, settings)
        steps = batches.steps
        with batches.ahead() as batch_of:
            for step in track(range(steps), "training"):
                batch = batch_of(step)
                report["loss"] = gradient.backward(batch, step).loss
                factor = lr_factor(step, steps, settings.warmup_ratio, settings.schedule)
                norm = update(optimizer, settings.lr * factor, settings.max_grad_norm)
                gradient.check(norm, batch, step, last=step + 1 == steps)
                report["steps"] = step + 1
                report["skipped_steps"] += not batch.teaches
    merge_adapters(encoder)
    encoder.model.eval()
    return encoder, report
