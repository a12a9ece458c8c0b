"""``memshare generations list|verify|activate|unpin|push``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memshare.config import Config, add_config_arguments, load_config
from memshare.retrieval.manifest import GenerationError

Action = Callable[[Config, argparse.Namespace], int]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``generations`` and its actions."""
    parser = subparsers.add_parser(
        "generations", help="list, verify, activate, unpin and push a retriever's generations"
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = _action(actions, "list", _list, "the generations on disk, oldest first")
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    check = _action(actions, "verify", _verify, "read every byte; exit code 1: one is damaged")
    check.add_argument("number", type=int, nargs="?", help="default: all of them")
    activate = _action(actions, "activate", _activate, "roll back or forward, and pin CURRENT")
    activate.add_argument("number", type=int)
    _action(actions, "unpin", _unpin, "let the next publish move CURRENT again")
    push = _action(actions, "push", _push, "put an encoder and its model card on the hub")
    push.add_argument("name", metavar="NAME", help="the retriever's name")
    add_push_arguments(push)
    push.add_argument("--number", type=int, help="which generation (default: CURRENT)")


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """What `memshare.retrieval.hub.deliver` asks for."""
    parser.add_argument("repo", metavar="REPO", help="on the hub: ORG/MODEL")
    parser.add_argument("--private", action="store_true", help="of a repository that is made now")
    parser.add_argument("--dry-run", action="store_true", help="show card and files, send nothing")


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    action: Action,
    summary: str,
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=summary)
    add_config_arguments(parser)
    parser.set_defaults(func=lambda args: _run(action, args))
    return parser


def _run(action: Action, args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    try:
        return action(config, args)
    except GenerationError as error:
        print(f"memshare: {error}", file=sys.stderr)
        return 2


def _list(config: Config, args: argparse.Namespace) -> int:
    from memshare.retrieval.manifest import DamagedGeneration, folder_name, read_manifest
    from memshare.retrieval.shelf import numbers, read_current

    home = config.retriever_dir
    current, pinned, damage = None, False, None
    try:
        current, pinned = read_current(home)
    except DamagedGeneration as error:
        damage = error  # which asks to activate one of those that are listed
    for number in numbers(home):
        folder = home / folder_name(number)
        row: dict[str, Any] = {"generation": number, "current": number == current}
        row["pinned"] = row["current"] and pinned
        try:
            manifest = read_manifest(folder)
        except GenerationError as error:
            row["error"] = str(error)
        else:
            row |= {
                "created_at": manifest.created_at,
                "parent": manifest.parent,
                "best": manifest.best,
                "origin": manifest.origin,
                "memories": manifest.rows,
                "positions": manifest.positions,
                "gate": _gate(folder),
            }
        print(json.dumps(row, ensure_ascii=False) if args.json else _line(row))
    if damage is not None:
        raise damage
    return 0


def _gate(folder: Path) -> Any:
    try:
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8")).get("gate")
    except (OSError, ValueError, AttributeError):
        return None  # `verify` is the one that complains


def _line(row: dict[str, Any]) -> str:
    mark = "* pinned" if row["pinned"] else "*" if row["current"] else ""
    if "error" in row:
        return f"{row['generation']:6d} {mark:9s} {row['error']}"
    gate = f"  gate: {row['gate'].get('reason')}" if row["gate"] else ""
    judged = f"  the encoder of {row['origin']}, newer index" if row["origin"] else gate
    at = ", ".join(f"{pool} at {seq}" for pool, seq in row["positions"].items())
    return (
        f"{row['generation']:6d} {mark:9s} {row['created_at']}  {row['memories']} memories ({at})"
        f"{judged}"
    )


def _verify(config: Config, args: argparse.Namespace) -> int:
    from memshare.retrieval.generation import verify_generation
    from memshare.retrieval.manifest import DamagedGeneration
    from memshare.retrieval.shelf import numbers

    home = config.retriever_dir
    damaged = 0
    for number in [args.number] if args.number is not None else numbers(home):
        try:
            manifest = verify_generation(home, number)
        except DamagedGeneration as error:
            damaged += 1
            print(error)
        else:
            print(f"generation {number}: {len(manifest.files)} files, whole")
    return 1 if damaged else 0


def _activate(config: Config, args: argparse.Namespace) -> int:
    from memshare.retrieval.publish import activate

    activate(config.retriever_dir, args.number)
    print(f"generation {args.number} is CURRENT and pinned; `memshare generations unpin` undoes it")
    return 0


def _unpin(config: Config, args: argparse.Namespace) -> int:
    from memshare.retrieval.publish import unpin

    number = unpin(config.retriever_dir)
    if number is None:
        print("nothing is pinned")
    else:
        print(f"generation {number} is no longer pinned; the next publish moves CURRENT")
    return 0


def _push(config: Config, args: argparse.Namespace) -> int:
    from memshare.retrieval import hub

    with hub.parcel(config.generations_dir / args.name, args.number) as found:
        return hub.deliver(found, args)
