"""``memshare keys create|list|revoke``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from memshare.config import add_config_arguments, load_config
from memshare.pool.errors import InvalidMemory, PoolError
from memshare.pool.ids import id_of
from memshare.pool.keys import EVERY_POOL, Key, KeyRing
from memshare.pool.store import PoolStore

Action = Callable[[KeyRing, PoolStore, argparse.Namespace], int]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``keys`` and its actions."""
    keys = subparsers.add_parser("keys", help="create, list and revoke the gateway's keys")
    actions = keys.add_subparsers(dest="action", metavar="ACTION", required=True)

    create = _action(actions, "create", _create, "create a key and print it, once")
    create.add_argument("principal", help="who holds it: the agent of what it writes")
    create.add_argument("--right", action="append", default=[], metavar="POOL=RIGHT,...",
                        help="read, write or admin on a pool, or on * (repeatable)")  # fmt: skip
    create.add_argument("--requests-per-minute", type=int, help="default: the configuration's")
    create.add_argument("--max-body-bytes", type=int, help="default: the configuration's")

    show = _action(actions, "list", _list, "list keys, without their secrets")
    show.add_argument("--json", action="store_true", help="one JSON object a line")

    revoke = _action(actions, "revoke", _revoke, "end keys; gateways refuse them within seconds")
    revoke.add_argument("ids", nargs="+", type=id_of, metavar="ID",
                        help="as `memshare keys list` shows it")  # fmt: skip


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    action: Action,
    summary: str,
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=summary, description=summary.capitalize() + ".")
    parser.add_argument("--url", help="database, e.g. sqlite:///pool.db (default: the config's)")
    add_config_arguments(parser)
    parser.set_defaults(func=_run, run=action)
    return parser


def _run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    # Only `create` with a configuration, as a gateway that starts, may make a new database.
    must_exist = args.action != "create" or args.config is None
    try:
        with PoolStore.open(args.url or config.url, must_exist=must_exist) as store:
            action: Action = args.run
            return action(KeyRing(store.database), store, args)
    except (PoolError, InvalidMemory) as error:
        print(f"memshare keys {args.action}: {error}", file=sys.stderr)
        return 2


def _create(ring: KeyRing, store: PoolStore, args: argparse.Namespace) -> int:
    rights: dict[str, Any] = {}
    for item in args.right:
        pool, equals, granted = item.rpartition("=")
        if not equals:
            raise PoolError(f"--right {item}: expected POOL=RIGHT,...")
        rights.setdefault(pool, set()).update(granted.split(","))
    key, secret = ring.create(args.principal, rights, args.requests_per_minute, args.max_body_bytes)
    print(secret)
    print(f"key {key.id} of {key.principal}: keep it, it is not shown again", file=sys.stderr)
    for pool in set(key.rights) - {info.name for info in store.pools()} - {EVERY_POOL}:
        print(f"note: there is no pool {pool!r} yet", file=sys.stderr)
    return 0


def _list(ring: KeyRing, _store: PoolStore, args: argparse.Namespace) -> int:
    for key in ring.list():
        print(json.dumps(asdict(key), ensure_ascii=False) if args.json else _line(key))
    return 0


def _line(key: Key) -> str:
    rights = " ".join(f"{pool}={','.join(granted)}" for pool, granted in key.rights.items())
    ended = f"  revoked {key.revoked_at}" if key.revoked_at else ""
    return f"{key.id}  {key.created_at[:19]}Z  {key.principal}  {rights}{ended}"


def _revoke(ring: KeyRing, _store: PoolStore, args: argparse.Namespace) -> int:
    missing = [id for id in args.ids if not ring.revoke(id)]
    for id in args.ids:
        if id not in missing:
            print(f"{id} revoked")
    if missing:
        print(f"memshare keys revoke: no living key {', '.join(missing)}", file=sys.stderr)
    return 2 if missing else 0
