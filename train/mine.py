"""Step 5 of the loop: new memories become training examples.

    python train/mine.py --config FILE

mines every memory that came since the last round, into ``examples/<round>`` of the run folder. Run
again after an interruption, it finishes the round that was begun: finished shards are skipped, and
no likelihood is measured twice. What was deleted meanwhile is erased from all earlier examples.

Several processes mine one round with ``--round N --share I/K`` (I from 0): the first one plans, and
the one that finishes the round declares it whole.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from memshare.config import Config, ConfigError, add_config_arguments, load_config, positive
from memshare.files import DiskFull, RunLocked, full_disk_told, run_lock
from memshare.llm.base import LLMError
from memshare.llm.rubric import RubricError
from memshare.pool.errors import PoolError
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.retrieval.errors import EncoderError
from memshare.retrieval.manifest import GenerationError
from memshare.training.erasing import erase_deleted
from memshare.training.examples import is_whole, read_marker, round_dir
from memshare.training.journal import Span, read_spans
from memshare.training.labels import Share, check_labels, merge_caches, open_labeller
from memshare.training.mining import mine
from memshare.training.mining_plan import (
    PLAN,
    plan_round,
    planned_split,
    read_plan,
    split_memories,
)
from memshare.training.outcome import tell
from memshare.training.proposals import open_proposer
from memshare.training.rounds import last_begun, last_mined, open_spans
from memshare.training.shard import ExamplesError
from memshare.training.split import SplitError

EXPECTED = (
    DiskFull, EncoderError, ExamplesError, GenerationError, LLMError, PoolError, RubricError,
    RunLocked, SplitError,
)  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Mine training examples from new memories.")
    add_config_arguments(parser)
    parser.add_argument("--round", type=positive, help="default: the unfinished one, or the next")
    parser.add_argument("--iteration", type=positive, default=1, help="of the round (default: 1)")
    parser.add_argument("--proposer", metavar="FOLDER", help="encoder (default: what serves)")
    parser.add_argument("--share", type=share_of, metavar="I/K", help="this part of a round")
    for name, what in (("since", "after which"), ("until", "up to which")):
        parser.add_argument(
            f"--{name}-seq", action="append", default=[], metavar="[POOL=]SEQ",
            help=f"change {what} a pool is mined (default: all that is new; repeatable)",
        )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Mine one round; prints its figures as JSON and returns the exit code."""
    args = arguments().parse_args(argv)
    try:
        if args.share is not None and args.round is None:
            raise ConfigError("--share needs --round N: all shares must mine the same one")
        if args.iteration > 1 and (args.round is None or args.proposer is None):
            raise ConfigError("--iteration needs --round N and --proposer FOLDER")
        config = load_config(args.config, args.overrides)
        check_labels(config)
        since = positions(args.since_seq, config.served_pools)
        until = positions(args.until_seq, config.served_pools)
    except ConfigError as error:
        return tell(error)
    role = "mining" if args.share is None else f"mining-{args.share.name}"
    try:
        lock = run_lock(config.run.dir, role)
        with full_disk_told(), lock, PoolStore.open(config.url) as store:
            marker = asyncio.run(run(config, store, args, since, until))
    except EXPECTED as error:
        return tell(error)
    if marker is not None:
        print(json.dumps(marker, ensure_ascii=False))
    return 0


async def run(
    config: Config,
    store: PoolStore,
    args: argparse.Namespace,
    since: Mapping[str, int],
    until: Mapping[str, int],
) -> dict[str, Any] | None:
    """One round of mining, from the change log to its marker; None: other shares are not done."""
    share: Share | None = args.share
    pools, examples = config.served_pools, config.examples_dir
    with ExitStack() as opened, ExitStack() as planning:
        if share is not None:  # one plans: spans, split and proposer are the same for all
            planning.enter_context(run_lock(config.run.dir, "mining", wait=True))
        for pool in pools:
            store.create_pool(pool, config.pools[pool].rubric, config.pools[pool].threshold)

        # 1. What is new: the spans of the change log that no round has covered yet.
        last, done = last_mined(examples, pools)
        number = args.round or max(last_begun(examples), last + 1)
        folder = round_dir(examples, number, args.iteration)
        if is_whole(folder):
            log(f"round {number}: mined already, in {folder}")
            return read_marker(folder)
        begun = read_plan(folder) if (folder / PLAN).exists() else None
        if begun:
            planning.close()  # nobody waits for what each does by itself
        spans = dict(begun.spans) if begun else open_spans(store, done, pools)
        if not begun and args.iteration > 1:  # the round's own, which the first one has mined
            mined = read_spans(read_marker(round_dir(examples, number))["spans"])
            spans = {pool: span for pool, span in mined.items() if pool in pools}
        spans = {  # never beyond a log's end: later rounds would pass over what comes there
            pool: Span(since.get(pool, span.since), min(until.get(pool, span.until), span.until))
            for pool, span in spans.items()
        }

        # 2. Deleted memories leave all earlier examples; every memory learns whether it is held
        # out.
        rewritten = erase_deleted(store, examples, pools)
        if rewritten:
            log(f"deleted memories were erased from {rewritten} shard(s) of earlier examples")
        fates = planned_split(store, config) if begun else split_memories(store, config)

        # 3. BM25 and the serving retriever propose, the labeller measures, and each shard is
        # written when it is complete.
        named = begun.proposer if begun else args.proposer
        opening = open_proposer(config, named, args.proposer)
        proposing = opened.enter_context(opening)
        by = None if proposing is None else proposing.name
        plan = plan_round(store, config, number, spans, fates, folder, by)
        planning.close()
        async with open_labeller(config, store, share) as labeller:
            marker = await mine(store, config, plan, fates, labeller, folder, proposing, share)
    if marker is None:
        log(f"round {number}: this share is done, others are not")
        return None
    if share is not None:
        with run_lock(config.run.dir, "mining", wait=True):
            merge_caches(config)
    log(f"round {number}: {marker['examples']} examples in {folder}; left out: {plan.left_out}")
    return marker


def share_of(text: str) -> Share:
    """``I/K`` as a share."""
    index, _, of = text.partition("/")
    if not (index.isdecimal() and of.isdecimal() and int(index) < int(of)):
        raise argparse.ArgumentTypeError(f"{text!r}: I/K expected, with I from 0 to K - 1")
    return Share(int(index), int(of))


def positions(items: Sequence[str], pools: Sequence[str]) -> dict[str, int]:
    """``POOL=SEQ`` items as a dict; a bare SEQ means the only pool."""
    found: dict[str, int] = {}
    for item in items:
        pool, _, seq = item.rpartition("=")
        pool = pool or (pools[0] if len(pools) == 1 else "")
        if pool not in pools or not seq.isdecimal():
            raise ConfigError(f"{item!r}: POOL=SEQ expected, with a pool of {list(pools)}")
        found[pool] = int(seq)
    return found


if __name__ == "__main__":
    sys.exit(main())
