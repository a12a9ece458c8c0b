"""A drifting stream: is new material learned, and is old material kept?

The memories of the pocket world's three domains arrive one domain after the other in one pool.
After each domain one round of ``train/continual.py`` trains the serving encoder on (real path:
likelihoods of the pocket LM, ``accelerate launch train/contrastive.py``, index). At the end the
encoder of every generation ranks the whole pool for held-out questions of every domain; a memory is
relevant if it shows the question's hidden rule, which only the world knows. Generation 0 is the
encoder as it came.

Two arms: ``replay``, where half as many earlier memories are mined again beside the new ones
(``mining.replay`` 0.5, the default), and ``no_replay``. Claims for both: ``new_mrr10_gain_<arm>``,
MRR@10 on a domain's questions after its round minus before it, mean over the domains; and
``old_mrr10_change_<arm>``, after the last round minus after its own, mean over the earlier domains
(below 0 is forgetting), with the ``_low`` and ``_high`` ends of its 95 % bootstrap interval over
questions. ``--plots DIR`` draws MRR@10 by generation, light and dark.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from common import parser, write_claims
from pipeline import Work, build_pocket_lm

from memshare.evaluation.arms import retrieval
from memshare.evaluation.data import Pair
from memshare.evaluation.rankers import bm25_ranker, dense_ranker
from memshare.evaluation.report import Plot, Series, draw_themes
from memshare.metrics.stats import bootstrap_mean
from memshare.pocket.world import Task, World
from memshare.records import Memory
from memshare.retrieval.encoder import Encoder

POOL = "stream"
ARMS = {"replay": 0.5, "no_replay": 0.0}
SIZES = (160, 80)  # memories and held-out questions of a domain
SETTINGS: dict[str, Any] = {
    "pools": {POOL: {}},
    "encoder": {"model": "all-MiniLM-L6-v2", "max_length": 128},
    "mining": {"labels": "likelihood", "candidates": 4, "dense_candidates": 4},
    "training": {
        "positives": 1, "hard_negatives": 1, "batch_size": 16, "max_steps": 24, "lr": 7e-5,
        "margin": 0.1, "batch_tokens": 512, "dropout": False,
    },
    "gate": {"margin": 1.0, "max_queries": 40},  # every generation is published, and measured
    "retriever": {"keep": 10},
    "wandb": {"mode": "disabled"},
}  # fmt: skip
Scores = dict[str, dict[str, list[float]]]  # retriever -> domain -> MRR@10 by question


def domains(seed: int, memories: int, tests: int) -> dict[str, tuple[list[Task], list[Task]]]:
    """Of each domain the memories of its phase, and questions that one of them helps to answer."""
    found: dict[str, tuple[list[Task], list[Task]]] = {}
    for task in World(seed).tasks():  # in a mixed order
        phase, held_out = found.setdefault(task.domain, ([], []))
        if len(phase) < memories:
            phase.append(task)
        elif len(held_out) < tests and any(task.key == other.key for other in phase):
            held_out.append(task)
    return found


def run_arm(
    folder: Path, phases: Sequence[Sequence[Task]], settings: dict[str, Any]
) -> tuple[Work, list[dict[str, Any]]]:
    """All phases of one arm; its run folder, and what the programs reported of each round."""
    work = Work(folder, settings)
    reports = []
    for phase in phases:
        work.fill({POOL: [Pair(task.prompt, task.answer) for task in phase]})
        reports.append(work.learn())
    return work, reports


def scores(work: Work, material: dict[str, tuple[list[Task], list[Task]]]) -> Scores:
    """MRR@10 of BM25 and of every generation's encoder over the whole pool."""
    memories: list[Memory] = work.fill({POOL: []})[POOL]
    key_of = {task.prompt: task.key for phase, _ in material.values() for task in phase}
    by_key: dict[str, set[str]] = {}
    for memory in memories:
        by_key.setdefault(key_of[memory.prompt], set()).add(memory.id)
    encoders = {"0": Encoder.load(work.config.encoder)}
    home = work.config.retriever_dir
    for path in sorted(home.glob("[0-9]*/encoder")):
        encoders[str(int(path.parent.name))] = Encoder.from_folder(path)
    rankers = {name: dense_ranker(memories, encoder) for name, encoder in encoders.items()}
    found: Scores = {}
    for domain, (_, tests) in material.items():
        relevant = [by_key[task.key] for task in tests]
        questions = [task.prompt for task in tests]
        for name, rows in retrieval(
            {"bm25": bm25_ranker(memories), **rankers}, questions, relevant
        ).items():
            found.setdefault(name, {})[domain] = [row["MRR@10"] for row in rows.values()]
    return found


def claims(arm: str, found: Scores, names: Sequence[str], seed: int) -> dict[str, float]:
    """An arm's headline figures; generation n is the one after the n-th of ``names``."""
    mean = {name: {d: fmean(v) for d, v in row.items()} for name, row in found.items()}
    gains = [mean[str(n + 1)][d] - mean[str(n)][d] for n, d in enumerate(names)]
    last = str(len(names))
    changes = [
        after - before
        for n, domain in enumerate(names[:-1])
        for after, before in zip(found[last][domain], found[str(n + 1)][domain], strict=True)
    ]
    change = bootstrap_mean(changes, seed=seed)
    return {
        f"new_mrr10_gain_{arm}": fmean(gains),
        f"old_mrr10_change_{arm}": change.mean,
        f"old_mrr10_change_{arm}_low": change.low,
        f"old_mrr10_change_{arm}_high": change.high,
    }


def picture(found: dict[str, Scores], names: Sequence[str]) -> Plot:
    """MRR@10 on each domain's questions by generation, both arms."""
    ticks = [str(n) for n in range(len(names) + 1)]
    series = [
        Series(f"{domain}, {arm.replace('_', ' ')}", [fmean(rows[t][domain]) for t in ticks])
        for arm, rows in found.items()
        for domain in names
    ]
    labels = ["0 (as it came)", *(f"{n} ({name})" for n, name in enumerate(names, 1))]
    return Plot("drift", "A drifting stream: old material is kept", "lines", labels, series,
                "generation (trained on)", "MRR@10 on held-out questions")  # fmt: skip


def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("--plots", type=Path, metavar="DIR", help="draw the figures (PNG)")
    args = options.parse_args()
    material = domains(args.seed, *((12, 6) if args.quick else SIZES))
    if args.quick:
        material = dict(list(material.items())[:2])
    names = list(material)
    arms = dict(list(ARMS.items())[:1]) if args.quick else ARMS
    training = {**SETTINGS["training"], **({"max_steps": 2} if args.quick else {})}
    found: dict[str, Scores] = {}
    programs: dict[str, Any] = {}
    claimed: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        lm = build_pocket_lm(Path(temporary))
        for arm, replay in arms.items():
            settings = {
                **SETTINGS,
                "run": {"seed": args.seed},
                "mining": {**SETTINGS["mining"], "replay": replay},
                "training": training,
            }
            phases = [material[name][0] for name in names]
            work, programs[arm] = run_arm(Path(temporary) / arm, phases, settings)
            found[arm] = scores(work, material)
            claimed |= claims(arm, found[arm], names, args.seed)
    if args.plots is not None:
        args.plots.mkdir(parents=True, exist_ok=True)
        draw_themes(picture(found, names), args.plots)
    write_claims(
        args,
        claimed,
        data="pocket world, one domain after the other",
        model={"encoder": SETTINGS["encoder"]["model"], "scorer": lm["recipe"]},
        settings=SETTINGS,
        domains=names,
        questions={name: len(tests) for name, (_, tests) in material.items()},
        mrr10={arm: {name: {d: fmean(v) for d, v in row.items()} for name, row in rows.items()}
               for arm, rows in found.items()},
        programs=programs,
    )  # fmt: skip


if __name__ == "__main__":
    main()
