"""``memshare prune``."""

from __future__ import annotations

import argparse
import sys

from memshare.config import add_config_arguments, load_config

SHIPPED = (
    "age", "feedback", "leave-one-out", "near-duplicates", "score", "use", "usefulness",
)  # fmt: skip


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``prune``."""
    parser = subparsers.add_parser(
        "prune",
        help="make a pool smaller",
        description="Erase memories for good, in a policy's order, until a cap is met.",
    )
    parser.add_argument("--pool", required=True)
    parser.add_argument("--policy", required=True, help=f"{', '.join(SHIPPED)}, or a plug-in's")
    parser.add_argument("--cap", type=int, required=True, help="memories to be left")
    parser.add_argument("--dry-run", action="store_true", help="print the ids, delete nothing")
    parser.add_argument("--url", help="database (default: the config's)")
    add_config_arguments(parser)
    parser.set_defaults(func=_prune)


def _prune(args: argparse.Namespace) -> int:
    # Here, since they load torch, and help needs none of it.
    from memshare.pool.errors import PoolError
    from memshare.pool.patience import scrub_or_tell
    from memshare.pool.store import PoolStore
    from memshare.pruning.prune import PruneError, prune
    from memshare.retrieval.errors import EncoderError
    from memshare.retrieval.manifest import GenerationError
    from memshare.training.shard import ExamplesError

    config = load_config(args.config, args.overrides)
    try:
        with PoolStore.open(args.url or config.url, must_exist=True) as store:
            report = prune(store, config, args.pool, args.policy, args.cap, dry_run=args.dry_run)
            if not args.dry_run:
                scrub_or_tell(store)
    except (PoolError, PruneError, GenerationError, EncoderError, ExamplesError) as error:
        print(f"memshare prune: {error}", file=sys.stderr)
        return 2
    for id in report.ids:
        print(id)
    done = "would be deleted" if report.dry_run else "deleted"
    print(f"{len(report.ids)} of {report.before} memories {done}", file=sys.stderr)
    return 0
