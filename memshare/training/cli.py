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
        '[...], "neg": [...]} or the columns anchor, positive, negative, negative_1, ...; or a '
        "folder of BEIR's: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv.",
    )
    action.add_argument("file", type=Path, metavar="FILE")
    action.add_argument("folder", type=Path, metavar="DIR", help="for train/contrastive.py")
    action.add_argument("--pool", default="imported", help="the data set's name")
    action.add_argument("--split", default="train", help="of BEIR's judgements (default: train)")
    action.set_defaults(func=_import)


def _import(args: argparse.Namespace) -> int:
    from memshare.training.imported import import_examples
    from memshare.training.shard import ExamplesError

    try:
        count = import_examples(args.file, args.folder, args.pool, args.split)
    except ExamplesError as error:
        print(f"memshare: {error}", file=sys.stderr)
        return 2
    print(f"{count} examples in {args.folder}")
    return 0
