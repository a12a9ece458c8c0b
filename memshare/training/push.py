"""``memshare trainings push``: a training's encoder to Hugging Face's hub, as a generation's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from memshare.retrieval.cli import add_push_arguments

if TYPE_CHECKING:  # it loads torch, and help is to be quick
    from memshare.retrieval.hub import Parcel


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``trainings`` and its action."""
    parser = subparsers.add_parser("trainings", help="push what a training made to the hub")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    action = actions.add_parser("push", help="put an encoder and its model card on the hub")
    action.add_argument("output", type=Path, metavar="DIR", help="train/contrastive.py's --output")
    add_push_arguments(action)
    action.set_defaults(func=_push)


def parcel(output: Path) -> Parcel:
    """The encoder that a training into ``output`` ended with. Raises `PushError`."""
    from memshare.retrieval.card import CARD
    from memshare.retrieval.hub import Parcel, PushError
    from memshare.training.outcome import read_result

    folder, result = output / "encoder", read_result(output)
    status = "it has no result.json" if result is None else result["status"]
    if status != "trained":
        raise PushError(f"{output}: no training has ended well there ({status})")
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    if CARD not in files:
        raise PushError(f"{folder}: no encoder with a model card")
    return Parcel(f"encoder of training {output.resolve().name}", folder, files)


def _push(args: argparse.Namespace) -> int:
    from memshare.retrieval.hub import PushError, deliver

    try:
        return deliver(parcel(args.output), args)
    except PushError as error:
        print(f"memshare: {error}", file=sys.stderr)
        return 2
