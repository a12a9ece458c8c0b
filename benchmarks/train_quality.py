"""Training quality, side by side with sentence-transformers' trainer: same examples, same steps.

Both start from all-MiniLM-L6-v2 and get the same training queries, positives and hard negatives
(`train/mine.py` over a real pool), batch size, steps, learning rate and schedule, weight decay,
clipping, temperature and seed; dropout is off on both sides. Theirs is
``MultipleNegativesRankingLoss`` as its documentation advises: one row for each pair of a query and
a positive, with its hard negative, and ``BatchSamplers.NO_DUPLICATES``. Ours is the trainer as
configured: one of a query's positives drawn at each step, and its masks against false negatives.
Only queries with a hard negative take part. Seeds 0 to 2; the mean over them is claimed.

**banking77.** Pool: ten memories an intent; labels: the intent (``mining.labels: given``). All
3,080 test questions; a memory is relevant if it has the question's intent.

**literary, logic, plan.** The decontaminated pool of each domain of the paper, all of it mined
(``likelihood`` by the pocket LM), and as held-out memories the domain's test questions with their
reference answers, which stand in no pool (lvshi's left out: this encoder does not know most of its
characters). Relevance is judged as the gate judges it: whatever any retriever of any seed finds in
its first ten is shown to the pocket LM before the question; it is relevant if that makes the
reference answer likelier by more than ``gate.gain`` (0.05 nats per token) over no example. So all
that MRR@10 looks at is judged. Questions with nothing relevant are left out, and counted. What is
trained on is all that mining can use of the pool, lvshi too: ``unknown_tokens`` is the share of the
training queries' tokens that this encoder does not know. Where it is large, as in literary, both
trainers learn from texts that they can't read, and are judged on others. So there is
**literary_readable** as well: the same without lvshi in the pool. Little is left to train on.

Beside the two: ``random`` and ``bm25``; ``frozen``, the encoder as it came; and ``oracle``, the
judged memories by measured gain (on banking77 the intent itself), which ranks a relevant one first
by definition. Claims: ``mrr10_minus_sentence_transformers_<data set>`` and
``mrr10_minus_frozen_<data set>`` (goal: at least 0); 95 % paired bootstrap intervals over questions
(each one's mean over seeds) and every seed's difference stand beside them.

The settings are those of nine.py and banking77.py, whose steps and batch are cut to 40 of 32; none
was tuned here.
"""

from __future__ import annotations

import asyncio
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from banking77 import relevant, sample_pool
from common import ROOT, parser, write_claims
from datasets import Dataset
from pipeline import Work, build_pocket_lm, run_program
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from memshare.config import Config
from memshare.evaluation.data import Domain, Pair, by_characters, load_banking77, load_nine
from memshare.evaluation.decontaminate import decontaminate
from memshare.evaluation.learn import train_encoder
from memshare.evaluation.rankers import Ranker, bm25_ranker, dense_ranker, random_ranker
from memshare.metrics.ir import METRICS, ir_metrics, mean_metrics
from memshare.metrics.stats import paired_bootstrap
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.records import Memory
from memshare.retrieval.encoder import Encoder, resolve_encoder
from memshare.retrieval.gate import PerQuery, judge
from memshare.training.examples import read_training, round_dir
from memshare.training.relevance import HeldOutRelevance
from memshare.training.select import Selected, select

SEEDS = 3
DATA = ("banking77", "literary", "literary_readable", "logic", "plan")
TRAINED = ("ours", "sentence_transformers")
FLOORS = ("random", "bm25", "frozen")
BANKING: dict[str, Any] = {
    "encoder": {"model": "all-MiniLM-L6-v2", "max_length": 64, "device": "cpu"},
    "mining": {"labels": "given", "candidates": 8, "dense_candidates": 8},
    "training": {
        "positives": 8, "positives_per_step": 1, "hard_negatives": 1, "batch_size": 32,
        "max_steps": 40, "lr": 5e-5, "temperature": 0.05, "batch_tokens": 384, "dropout": False,
    },
    "split": {"held_out": 0.0},
    "wandb": {"mode": "disabled"},
}  # fmt: skip
NINE: dict[str, Any] = {
    **BANKING,
    "encoder": {**BANKING["encoder"], "max_length": 128},
    "mining": {"labels": "likelihood", "candidates": 8, "dense_candidates": 8},
    "training": {
        **BANKING["training"], "positives": 4, "batch_size": 16, "max_steps": None, "epochs": 2.5,
        "margin": 0.05, "batch_tokens": 512,
    },
}  # fmt: skip
Ranks = list[list[str]]  # of every question, best first
Metrics = dict[str, PerQuery]  # retriever -> question number -> metric


def mined(work: Work) -> list[Selected]:
    """Mine all of the pool as a user would; the training queries that both trainers can use."""
    program = str(ROOT / "train" / "mine.py")
    words = [sys.executable, program, "--config", str(work.file), "--round", "1"]
    run_program(words, work.folder / "logs" / "mine.log")
    examples = read_training([round_dir(work.config.examples_dir, 1)])
    return [item for item in select(examples, work.config.training).items if item.negatives]


def theirs(config: Config, items: Sequence[Selected], folder: Path) -> Encoder:
    """What sentence-transformers' trainer makes of the same examples, loaded as our encoder."""
    training = config.training
    rows = [(item.query, p.text, item.negatives[0].text) for item in items for p in item.positives]
    columns = zip(("anchor", "positive", "negative"), zip(*rows, strict=True), strict=True)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    name = resolve_encoder(config.encoder.model)
    model = SentenceTransformer(name, device="cpu", config_kwargs=off)
    model.max_seq_length = config.encoder.max_length
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=training.batch_size,
        max_steps=training.max_steps, learning_rate=training.lr, use_cpu=True,
        lr_scheduler_type=training.schedule, warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay, max_grad_norm=training.max_grad_norm,
        batch_sampler=BatchSamplers.NO_DUPLICATES, seed=config.run.seed, report_to="none",
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


def train_both(
    config: Config, items: Sequence[Selected], folder: Path
) -> tuple[dict[str, Encoder], dict[str, float]]:
    """Both trainers' encoders for the seed of ``config``, and their seconds."""
    seconds = {}
    began = time.perf_counter()
    encoders = {"ours": train_encoder(config, items)[0]}
    seconds["ours"] = time.perf_counter() - began
    began = time.perf_counter()
    encoders["sentence_transformers"] = theirs(config, items, folder)
    seconds["sentence_transformers"] = time.perf_counter() - began
    log(f"{folder.name}: " + ", ".join(f"{name} {took:.0f} s" for name, took in seconds.items()))
    return encoders, seconds


def unknown_tokens(config: Config, items: Sequence[Selected]) -> float:
    """The share of the training queries' tokens that the encoder does not know."""
    encoder = Encoder.load(config.encoder)
    rows = encoder.tokenize_to_ids([item.query for item in items])
    return sum(row.count(encoder.tokenizer.unk_token_id) for row in rows) / sum(map(len, rows))


def budget(work: Work, items: Sequence[Selected], seed: int) -> Config:
    """The configuration of ``work`` for a seed, with the number of steps that both trainers get."""
    training = work.config.training
    epoch = -(-len(items) // training.batch_size)
    steps = training.max_steps or math.ceil(training.epochs * epoch)
    return work.config.model_copy(
        update={
            "run": work.config.run.model_copy(update={"seed": seed}),
            "training": training.model_copy(update={"max_steps": steps}),
        }
    )


def floors(memories: Sequence[Memory], work: Work, seed: int) -> dict[str, Ranker]:
    """The retrievers that learn nothing."""
    return {
        "random": random_ranker(memories, seed),
        "bm25": bm25_ranker(memories, work.config.bm25),
        "frozen": dense_ranker(memories, Encoder.load(work.config.encoder)),
    }


def measure_banking(
    folder: Path, seed: int, intents: int | None, settings: Mapping[str, Any]
) -> tuple[Metrics, dict[str, Any]]:
    """One seed: its own pool, and each retriever's metrics by question."""
    train, test = load_banking77()
    pool, _ = sample_pool(train, seed, intents)
    known = {pair.answer for pair in pool}
    questions = [question for question in test if question.answer in known]
    work = Work(folder / f"banking77-{seed}", {**settings, "pools": {"bank": {}}})
    memories = work.fill({"bank": pool})["bank"]
    items = mined(work)
    encoders, seconds = train_both(budget(work, items, seed), items, work.folder)
    rankers = floors(memories, work, seed)
    rankers |= {name: dense_ranker(memories, encoder) for name, encoder in encoders.items()}
    qrels = {str(i): dict.fromkeys(ids, 1) for i, ids in enumerate(relevant(memories, questions))}
    prompts = [question.prompt for question in questions]
    metrics: Metrics = {
        name: ir_metrics(dict(zip(qrels, ranker(prompts, 10), strict=True)), qrels)
        for name, ranker in rankers.items()
    }
    metrics["oracle"] = ir_metrics({i: list(row) for i, row in qrels.items()}, qrels)
    told = {"seed": seed, "memories": len(memories), "training_queries": len(items),
            "questions": len(questions), "seconds": seconds}  # fmt: skip
    return metrics, told


def measure_domain(
    folder: Path, domain: Domain, seeds: Sequence[int], settings: Mapping[str, Any]
) -> tuple[list[Metrics], dict[str, Any]]:
    """All seeds on one domain's pool: each retriever's metrics by question, on one judgement."""
    work = Work(folder / domain.name, {**settings, "pools": {domain.name: {}}})
    memories = work.fill({domain.name: domain.pairs})[domain.name]
    tests = [test for group in domain.tests.values() if not by_characters(group) for test in group]
    prompts = [test.prompt for test in tests]
    items = mined(work)
    ranks: dict[str, Ranks] = {
        name: ranker(prompts, 10) for name, ranker in floors(memories, work, seeds[0]).items()
    }
    seconds = []
    for seed in seeds:
        encoders, took = train_both(budget(work, items, seed), items, work.folder / f"seed-{seed}")
        seconds.append(took)
        for name, encoder in encoders.items():
            ranks[f"{name} {seed}"] = dense_ranker(memories, encoder)(prompts, 10)
    gains = asyncio.run(judge_all(work, memories, tests, list(ranks.values())))
    ranks["oracle"] = [sorted(row, key=lambda id_: -row[id_])[:10] for row in gains]
    runs = {name: {str(i): row for i, row in enumerate(rows)} for name, rows in ranks.items()}
    judged = judge(runs, {str(i): row for i, row in enumerate(gains)}, work.config.gate.gain)
    rows: list[Metrics] = [
        {name: judged[f"{name} {seed}" if name in TRAINED else name]
         for name in (*FLOORS, *TRAINED, "oracle")}
        for seed in seeds
    ]  # fmt: skip
    told = {"memories": len(memories), "training_queries": len(items), "questions": len(tests),
            "unknown_tokens": unknown_tokens(work.config, items),
            "without_relevant": len(tests) - len(rows[0]["oracle"]),
            "judged": sum(map(len, gains)),
            "relevant_share": fmean(gain > work.config.gate.gain for row in gains
                                    for gain in row.values()),
            "seconds": seconds}  # fmt: skip
    return rows, told


async def judge_all(
    work: Work, memories: Sequence[Memory], tests: Sequence[Pair], ranks: Sequence[Ranks]
) -> list[dict[str, float]]:
    """Of each question, the gain of every memory that any retriever found."""
    by_id = {memory.id: memory for memory in memories}
    found = [
        list(dict.fromkeys(i for row in rows for i in row)) for rows in zip(*ranks, strict=True)
    ]
    with PoolStore.open(work.config.url) as store:
        relevance = HeldOutRelevance(work.config, store)
        questions = [
            Memory(
                f"test {i}", memories[0].pool, test.prompt, test.answer, None, None, None, "", {}, 0
            )
            for i, test in enumerate(tests)
        ]
        gains = await asyncio.gather(
            *(
                relevance(q, [by_id[i] for i in ids])
                for q, ids in zip(questions, found, strict=True)
            )
        )
    return [dict(zip(ids, row, strict=True)) for ids, row in zip(found, gains, strict=True)]


def compared(rows: Sequence[Metrics], seed: int) -> dict[str, dict[str, Any]]:
    """Ours minus each rival, MRR@10: the interval over questions, and each seed's difference."""

    def values(row: Metrics, name: str) -> list[float]:
        return [metrics["MRR@10"] for metrics in row[name].values()]

    def mean(name: str) -> list[float]:
        return [fmean(each) for each in zip(*(values(row, name) for row in rows), strict=True)]

    return {
        name: {
            **paired_bootstrap(mean("ours"), mean(name), seed=seed)._asdict(),
            "by_seed": [fmean(values(row, "ours")) - fmean(values(row, name)) for row in rows],
        }
        for name in ("sentence_transformers", "frozen")
    }


def readable(domain: Domain) -> Domain:
    """A domain without what is in Chinese, which this encoder can't read."""

    def kept(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
        return tuple(pair for pair in pairs if not by_characters((pair,)))

    tests = {name: group for name, group in domain.tests.items() if not by_characters(group)}
    return Domain(f"{domain.name}_readable", kept(domain.pool), kept(domain.problems), tests)


def few(domain: Domain) -> Domain:
    """A small part of a domain, for ``--quick``."""
    tests = {name: group[:4] for name, group in domain.tests.items()}
    return Domain(domain.name, domain.pool[:30], domain.problems[:6], tests)


def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("--data", nargs="+", choices=DATA, help="these alone")
    args = options.parse_args()
    wanted = args.data or (("banking77", "plan") if args.quick else DATA)
    seeds = range(args.seed, args.seed + (1 if args.quick else SEEDS))
    nine_domains = {name: decontaminate(domain) for name, domain in load_nine().items()}
    nine_domains["literary_readable"] = readable(nine_domains["literary"])
    domains = {name: nine_domains[name] for name in wanted if name in nine_domains}
    banking, nine, intents = BANKING, NINE, None
    if args.quick:
        steps = {"max_steps": 2, "batch_size": 8}
        banking = {**BANKING, "training": {**BANKING["training"], **steps}}
        nine = {**NINE, "training": {**NINE["training"], **steps}}
        domains, intents = {name: few(domain) for name, domain in domains.items()}, 4
    measured: dict[str, list[Metrics]] = {}
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lm = build_pocket_lm(folder)
        for name, domain in domains.items():
            measured[name], details[name] = measure_domain(folder, domain, seeds, nine)
        if "banking77" in wanted:
            done = [measure_banking(folder, seed, intents, banking) for seed in seeds]
            measured["banking77"], details["banking77"] = [m for m, _ in done], [d for _, d in done]
    claims: dict[str, float] = {}
    differences = {name: compared(rows, args.seed) for name, rows in measured.items()}
    for data, rivals in differences.items():
        for rival, difference in rivals.items():
            claims[f"mrr10_minus_{rival}_{data}"] = difference["mean"]
    names = (*FLOORS, *TRAINED, "oracle")
    write_claims(
        args,
        claims,
        data="banking77; the nine datasets' domain pools, decontaminated",
        model={"encoder": BANKING["encoder"]["model"], "scorer": lm["recipe"]},
        settings={"banking77": banking, "nine": nine},
        seeds=list(seeds),
        differences=differences,
        metrics={
            data: {
                name: {metric: [mean_metrics(row[name])[metric] for row in rows]
                       for metric in METRICS}
                for name in names
            }
            for data, rows in measured.items()
        },
        details=details,
    )  # fmt: skip


if __name__ == "__main__":
    main()
