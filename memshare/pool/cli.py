"""``memshare pool create|add|import|export|list|show|review|hold|release|delete|stats``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import Any, get_args

from memshare.config import Config, add_config_arguments, load_config
from memshare.pool.errors import InvalidMemory, PoolError, TransferError
from memshare.pool.ids import id_of
from memshare.pool.mapping import parse_mapping
from memshare.pool.patience import scrub_or_tell
from memshare.pool.stats import PoolStats
from memshare.pool.store import PoolStore
from memshare.pool.transfer import Format, export_jsonl, import_memories, write_jsonl
from memshare.records import Memory, NewMemory

Action = Callable[[PoolStore, Config, argparse.Namespace], int]

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # all but a line's end


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``pool`` and its actions."""
    pool = subparsers.add_parser("pool", help="create, fill, read and export pools")
    actions = pool.add_subparsers(dest="action", metavar="ACTION", required=True)

    create = _action(actions, "create", _create, "create a pool, or change its settings")
    create.add_argument("--rubric", help="name of a rubric, or a file (new pools: general)")
    create.add_argument("--threshold", type=float, help="score that admits (new pools: 80)")

    add = _action(actions, "add", _add, "add one memory")
    add.add_argument("--prompt", required=True)
    add.add_argument("--answer", required=True)
    add.add_argument("--score", type=float, help="0 to 100")
    add.add_argument("--agent")
    add.add_argument("--model")
    add.add_argument("--metadata", default="{}", metavar="JSON")

    load = _action(actions, "import", _import, "import memories; exit code 1: some rows are bad",
                   pool_help="target; without it each row names its own")  # fmt: skip
    load.add_argument("source", help="a JSONL or CSV file, or a data set: hub name or folder")
    load.add_argument("--format", choices=get_args(Format), default="auto")
    load.add_argument("--map", action="append", default=[], metavar="FIELD=COLUMN,...",
                      help="columns of foreign rows, e.g. prompt=text,answer=category")  # fmt: skip
    load.add_argument("--split", default="train", help="of a data set (default: train)")
    load.add_argument("--subset", help="of a data set, where it has several")
    load.add_argument("--strict", action="store_true",
                      help="check every row first and write nothing if one is bad")  # fmt: skip

    export = _action(actions, "export", _export, "write a pool as JSONL, held memories left out")
    export.add_argument("file", nargs="?", default="-", help="default: standard output")

    show_list = _action(actions, "list", _list, "list memories, oldest first")
    show_list.add_argument("--limit", type=int, default=20)
    show_list.add_argument("--cursor", help="as printed by the page before")
    show_list.add_argument("--held", action="store_true", help="held memories too")
    show_list.add_argument("--json", action="store_true", help="one JSON object a line")

    show = _action(actions, "show", _show, "print whole memories", pool=False)
    show.add_argument("ids", nargs="+", type=id_of, metavar="ID")

    review = _action(actions, "review", _review, "list the memories on hold, with the reasons")
    review.add_argument("--json", action="store_true", help="one JSON object a line")

    hold = _action(actions, "hold", _hold, "take memories out of retrieval and training",
                   pool=False)  # fmt: skip
    hold.add_argument("ids", nargs="+", type=id_of, metavar="ID")
    hold.add_argument("--reason", help="for who reviews them")

    release = _action(actions, "release", _release, "end the hold on memories", pool=False)
    release.add_argument("ids", nargs="+", type=id_of, metavar="ID")

    delete = _action(actions, "delete", _delete, "erase memories for good", pool=False)
    delete.add_argument("ids", nargs="+", type=id_of, metavar="ID")

    stats = _action(actions, "stats", _stats, "counts, scores and decisions",
                    pool_help="default: every pool")  # fmt: skip
    stats.add_argument("--json", action="store_true")


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    action: Action,
    summary: str,
    pool: bool = True,
    pool_help: str | None = None,
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=summary, description=summary.capitalize() + ".")
    if pool:
        parser.add_argument("--pool", required=pool_help is None, help=pool_help)
    parser.add_argument("--url", help="database, e.g. sqlite:///pool.db (default: the config's)")
    add_config_arguments(parser)
    parser.set_defaults(func=_run, run=action)
    return parser


def _run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    # A pool that the configuration file names is made when something is first put into it. Nothing
    # else makes a database: a misspelt URL must not leave an empty one behind.
    writes = args.action in ("create", "add", "import")
    configured = writes and args.config is not None and args.pool in config.pools
    try:
        with PoolStore.open(
            args.url or config.url,
            config.gateway.max_text_chars,
            must_exist=not (configured or args.action == "create"),
        ) as store:
            if configured:
                settings = config.pools[args.pool]
                store.create_pool(args.pool, settings.rubric, settings.threshold)
            action: Action = args.run
            return action(store, config, args)
    except (PoolError, InvalidMemory, TransferError) as error:
        print(f"memshare pool {args.action}: {error}", file=sys.stderr)
        return 2


def _create(store: PoolStore, _config: Config, args: argparse.Namespace) -> int:
    store.create_pool(args.pool)
    info = store.set_pool(args.pool, args.rubric, args.threshold)
    print(f"{info.name}: rubric {info.rubric}, threshold {info.threshold:g}")
    return 0


def _add(store: PoolStore, _config: Config, args: argparse.Namespace) -> int:
    try:
        metadata = json.loads(args.metadata)
    except (ValueError, RecursionError) as error:
        raise InvalidMemory("metadata", f"is no JSON: {error}") from None
    memory = NewMemory(
        args.pool, args.prompt, args.answer, args.score, args.agent, args.model, None, metadata
    )
    (result,) = store.append([memory])
    print(f"{result.id} {result.status}")
    return 0


def _import(store: PoolStore, _config: Config, args: argparse.Namespace) -> int:
    report = import_memories(
        store,
        args.pool,
        args.source,
        args.format,
        parse_mapping(args.map),
        args.strict,
        split=args.split,
        subset=args.subset,
        on_error=lambda error: print(error, file=sys.stderr),
        show_progress=True,
    )
    print(f"stored {report.stored}, duplicates {report.duplicates}, bad rows {report.bad}")
    if report.bad and args.strict:
        print("nothing was written (--strict)", file=sys.stderr)
    return 1 if report.bad else 0


def _export(store: PoolStore, _config: Config, args: argparse.Namespace) -> int:
    if args.file == "-":
        if isinstance(sys.stdout, TextIOWrapper):  # JSON is UTF-8 in any locale
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        count = write_jsonl((memory.wire() for memory in store.iter(args.pool)), sys.stdout)
        sys.stdout.flush()  # before it is said to be done
    else:
        count = export_jsonl(store, args.pool, Path(args.file))
    print(f"exported {count}", file=sys.stderr)
    return 0


def _list(store: PoolStore, _config: Config, args: argparse.Namespace) -> int:
    page, cursor = store.list(args.pool, args.cursor, args.limit, held=None if args.held else False)
    for memory in page:
        _print(json.dumps(_full(memory), ensure_ascii=False) if args.json else _line(memory))
    if cursor is not None:
        print(f"more: --cursor {cursor}", file=sys.stderr)
    return 0


def _print(text: str) -> None:
    """Print what strangers wrote, but as JSON's escapes what would steer the terminal."""
    print(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def _folded(text: str) -> str:
    return " ".join(text.split())


def _line(memory: Memory) -> str:
    score = "-" if memory.score is None else f"{memory.score:g}"
    prompt = _folded(memory.prompt)
    prompt = prompt if len(prompt) <= 60 else prompt[:59] + "…"
    return f"{memory.id}  {memory.seq:>6}  {score:>5}  {'held  ' if memory.held else ''}{prompt}"


def _full(memory: Memory) -> dict[str, Any]:
    hold = {"held": memory.held, "hold_reason": memory.hold_reason}
    return {**memory.wire(), "seq": memory.seq, **hold}


def _show(store: PoolStore, _config: Config, args: argparse.Namespace) -> int:
    found = store.get_many(args.ids)
    for id in args.ids:
        if id in found:
            _print(json.dumps(_full(found[id]), ensure_ascii=False, indent=2))
    return _missing("show", [id for id in args.ids if id not in found])


def _review(store: PoolStore, _config: Config, args: argparse.Namespace) -> int:
    cursor = None
    while True:
        page, cursor = store.list(args.pool, cursor, 1000, held=True)
        for memory in page:
            if args.json:
                _print(json.dumps(_full(memory), ensure_ascii=False))
            else:
                who, why = memory.agent or "unknown", memory.hold_reason or "no reason given"
                _print(f"{_line(memory)}\n    {_folded(who)}: {_folded(why)}")
        if cursor is None:
            return 0


def _hold(store: PoolStore, _config: Config, args: argparse.Namespace) -> int:
    return _each("hold", args.ids, lambda id: store.hold(id, args.reason), "on hold", "free ")


def _release(store: PoolStore, _config: Config, args: argparse.Namespace) -> int:
    return _each("release", args.ids, store.release, "released", "held ")


def _delete(store: PoolStore, _config: Config, args: argparse.Namespace) -> int:
    code = _each("delete", args.ids, store.delete, "deleted")
    scrub_or_tell(store)
    return code


def _each(action: str, ids: list[str], do: Callable[[str], bool], done: str, what: str = "") -> int:
    missing = []
    for id in ids:
        if do(id):
            print(f"{id} {done}")
        else:
            missing.append(id)
    return _missing(action, missing, what)


def _missing(action: str, ids: list[str], what: str = "") -> int:
    if ids:
        print(f"memshare pool {action}: no {what}memory {', '.join(ids)}", file=sys.stderr)
    return 2 if ids else 0


def _stats(store: PoolStore, _config: Config, args: argparse.Namespace) -> int:
    names = [args.pool] if args.pool else [info.name for info in store.pools()]
    for name in names:
        stats = store.stats(name)
        if args.json:
            _print(json.dumps(asdict(stats), ensure_ascii=False))
        else:
            _print(_summary(stats))
    return 0


def _summary(stats: PoolStats) -> str:
    pool, scores = stats.pool, stats.scores
    lines = [
        f"{pool.name}: rubric {pool.rubric}, threshold {pool.threshold:g}, "
        f"position {pool.last_seq}",
        f"  memories {stats.memories} ({stats.held} held), deleted {stats.deleted}",
    ]
    if scores.count:
        lines.append(
            f"  scores {scores.count}: mean {scores.mean:.1f}, "
            f"from {scores.min:g} to {scores.max:g}"
        )
    for title, counts in (("agents", stats.by_agent), ("decisions", stats.decisions)):
        if counts:
            shown = (f"{_folded(name) or '(unknown)'} {count}" for name, count in counts.items())
            lines.append(f"  {title}: {', '.join(shown)}")
    return "\n".join(lines)
