"""``memshare examples import|evaluate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from memshare.config import add_config_arguments, load_config, positive
from memshare.files import write_json


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``examples`` and its action."""
    parser = subparsers.add_parser("examples", help="labelled texts: to train on, and to evaluate")
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
    action.add_argument(
        "--bm25-negatives", type=positive, default=0, metavar="N",
        help="fill each query's negatives up to N with what BM25 finds for it among all texts",
    )  # fmt: skip
    action.set_defaults(func=_import)
    action = actions.add_parser(
        "evaluate",
        help="how well encoders rank them, and BM25",
        description="Rank a data set's texts for each of its queries, as the evaluation while "
        "training does.",
    )
    action.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="as import wrote it")
    action.add_argument("--encoder", action="append", help="folder or name; may be repeated")
    action.add_argument("--json", type=Path, metavar="FILE", help="the figures, too")
    add_config_arguments(action)
    action.set_defaults(func=_evaluate)


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
            args.source, args.folder, args.pool, args.split, args.subset, args.held_out,
            args.bm25_negatives,
        )  # fmt: skip
    except ExamplesError as error:
        print(f"memshare: {error}", file=sys.stderr)
        return 2
    beside = f", and {held_out} held out" if args.held_out else ""
    print(f"{count} examples in {args.folder}{beside}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    import torch

    from memshare.retrieval.encoder import Encoder
    from memshare.retrieval.errors import EncoderError
    from memshare.training.evaluate import HeldOut, evaluate, evaluate_bm25
    from memshare.training.examples import read_examples
    from memshare.training.gather import World
    from memshare.training.shard import ExamplesError

    try:
        examples = (example for folder in args.folders for example in read_examples(folder))
        judged = HeldOut.of(examples, config.relevant_above)
        if not judged:
            raise ExamplesError("no query there for which some texts are relevant and others not")
        print(judged)
        found = {"BM25": evaluate_bm25(judged, config.bm25)}
        _show("BM25", found["BM25"])
        for name in args.encoder or [config.encoder.model]:
            encoder = Encoder.load(config.encoder.model_copy(update={"model": name}))
            found[name] = evaluate(judged, encoder, World(torch.device(encoder.device)))
            _show(name, found[name])
    except (ExamplesError, EncoderError) as error:
        print(f"memshare: {error}", file=sys.stderr)
        return 2
    if args.json:
        write_json(args.json, {"queries": len(judged.queries), "texts": len(judged.texts), **found})
    return 0


def _show(name: str, figures: Mapping[str, float]) -> None:
    print(f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in figures.items()))
