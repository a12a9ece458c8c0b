"""``memshare examples import``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``examples`` and its action."""
    parser = subparsers.add_parser("examples", help="make training examples of labelled texts")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    action = actions.add_parser(
        "import",
        help="from queries with texts that answer them",
        description='JSON lines, CSV, TSV (these also .gz) or Parquet, with {"query": ..., "pos": '
        '[...], "neg": [...]} or the columns anchor, positive, negative, negative_1, ...; a data '
        "set that has them; or a folder of BEIR's: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv.",
    )
    action.add_argument("source", metavar="SOURCE", help="a file, a folder, or a hub's data set")
    action.add_argument("folder", type=Path, metavar="DIR", help="for train/contrastive.py")
    action.add_argument("--pool", default="imported", help="the data set's name")
    action.add_argument("--split", default="train", help="of a data set, or of BEIR's judgements")
    action.add_argument("--subset", help="of a data set, where it has several")
    action.add_argument(
        "--held-out", type=_share, default=0.0, metavar="SHARE",
        help="of the queries, put aside in DIR/held_out: training.eval_every evaluates on them",
    )  # fmt: skip
    action.set_defaults(func=_import)


def _share(text: str) -> float:
    share = float(text)
    if not 0.0 <= share < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to less than 1")
    return share


def _import(args: argparse.Namespace) -> int:
    from memshare.training.imported import import_examples
    from memshare.training.shard import ExamplesError

    try:
        count, held_out = import_examples(
            args.source, args.folder, args.pool, args.split, args.subset, args.held_out
        )
    except ExamplesError as error:
        print(f"memshare: {error}", file=sys.stderr)
        return 2
    beside = f", and {held_out} held out" if args.held_out else ""
    print(f"{count} examples in {args.folder}{beside}")
    return 0
