"""``memshare eval EXPERIMENT|all|compare``."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from memshare.config import Config, add_config_arguments, load_config
from memshare.files import run_lock, write_json

# As `experiment.EXPERIMENTS`, which a test compares: help must not import torch.
SUMMARIES = {
    "shots": "zero to three shots on every dataset, retrieved and random",
    "growth": "quality as the pool grows, the retriever frozen and retrained",
    "pools": "a pool for each domain against one for all",
    "retriever": "random, BM25, frozen, trained, fused, and an oracle",
    "sharing": "own memories against everyone's, diverse against homogeneous",
    "threshold": "what each scorer lets in at which threshold, and what it is worth",
    "bootstrap": "questions the agents wrote themselves against real ones",
    "pruning": "which memories to let go of, down to a part of the pool, and what is lost",
    "labels": "what teaches the retriever, how many candidates and negatives",
    "cost": "tokens, seconds and GPU seconds by stage",
}
ALL = "all"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``eval`` and its experiments."""
    parser = subparsers.add_parser(
        "eval", help="run the paper's experiments, and those that it left open"
    )
    actions = parser.add_subparsers(dest="experiment", metavar="EXPERIMENT", required=True)
    for name, summary in (*SUMMARIES.items(), (ALL, "all of them, and one report")):
        action = actions.add_parser(name, help=summary)
        add_config_arguments(action)
        action.add_argument("--out", type=Path, help="where to write (default: run.dir/eval)")
        action.add_argument("--quick", action="store_true", help="a few of everything: no findings")
        action.add_argument(
            "--dry-run", action="store_true", help="show configuration and data, ask nobody"
        )
        chosen = tuple(SUMMARIES) if name == ALL else (name,)
        action.set_defaults(func=lambda args, chosen=chosen: _run(chosen, args))
    action = actions.add_parser("compare", help="two runs side by side, question by question")
    action.add_argument("first", type=Path)
    action.add_argument("second", type=Path)
    action.add_argument("--json", type=Path, metavar="FILE", help="write the differences there")
    action.add_argument("--seed", type=int, default=0)
    action.set_defaults(func=_compare)


def _run(names: Sequence[str], args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    out: Path = args.out or config.run.dir / "eval"
    # Heavy imports only now, so that help and configuration errors are quick.
    from memshare.evaluation.lab import shrink
    from memshare.llm.base import LLMError
    from memshare.llm.rubric import RubricError
    from memshare.retrieval.errors import EncoderError
    from memshare.training.shard import ExamplesError

    if args.quick:
        config = shrink(config)
    try:
        if args.dry_run:
            print(plan(config, names))
            return 0
        with run_lock(config.run.dir, "eval"):
            return asyncio.run(_experiments(names, config, out, args.quick))
    except (LLMError, EncoderError, ExamplesError, RubricError, OSError, ValueError) as error:
        print(f"memshare eval: {error}", file=sys.stderr)
        return 2


async def _experiments(names: Sequence[str], config: Config, out: Path, quick: bool) -> int:
    """Run each; one that fails does not stop the others. Returns the exit code."""
    from memshare.bootstrap import BootstrapError
    from memshare.evaluation.experiment import load_experiment, run_experiment
    from memshare.evaluation.lab import open_lab
    from memshare.evaluation.pages import section, write_page
    from memshare.evaluation.report import print_tables
    from memshare.llm.base import LLMError
    from memshare.progress import log
    from memshare.training.step_result import NonFinite

    failed: dict[str, str] = {}
    async with open_lab(config, out) as lab:
        for name in names:
            try:
                record = await run_experiment(load_experiment(name), lab, quick=quick)
            except (BootstrapError, LLMError, NonFinite) as error:
                log(f"{name} failed: {error}")
                failed[name] = str(error)
            else:
                if len(names) == 1:
                    print_tables(section(record).tables)
            page = write_page(out, failed, (name,))  # after each: a kill leaves what is done
    log(f"report: {page}")
    return 1 if failed else 0


def plan(config: Config, names: Sequence[str]) -> str:
    """What would be asked, as YAML: experiments, data with its leaks, and the configuration."""
    from memshare.evaluation.decontaminate import decontaminate_all, leak_report
    from memshare.evaluation.material import load_data

    data: dict[str, Any] = {}
    published = load_data(config)
    cleaned = decontaminate_all(published)
    for name, domain in published.items():
        clean = cleaned[name]
        data[name] = {
            "memories": {"published": len(domain.pairs), "decontaminated": len(clean.pairs)},
            "tests": {dataset: len(tests) for dataset, tests in clean.tests.items()},
            "leaks": [asdict(leaks) for leaks in leak_report(domain)],
        }
    tree = {"experiments": list(names), "data": data, "config": config.model_dump(mode="json")}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _compare(args: argparse.Namespace) -> int:
    from memshare.evaluation.compare import NothingToCompare, compare, record, tables
    from memshare.evaluation.report import print_tables

    try:
        found = compare(args.first, args.second, seed=args.seed)
    except NothingToCompare as error:
        print(f"memshare eval: {error}", file=sys.stderr)
        return 2
    print_tables(tables(found))
    if args.json:
        write_json(args.json, record(found))
    return 0
