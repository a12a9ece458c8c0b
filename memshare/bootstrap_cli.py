"""``memshare bootstrap``: fill a pool from a small seed set."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memshare.config import ConfigError, add_config_arguments, load_config
from memshare.files import run_lock, write_json


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments; ``func`` runs it."""
    parser = subparsers.add_parser(
        "bootstrap",
        help="fill a pool from a small seed set",
        description="The agents write questions after the pool's seed memories, answer them with "
        "what they retrieve, and the scorer decides (see the section `bootstrap`).",
    )
    add_config_arguments(parser)
    parser.add_argument("--pool", help="the pool to fill (default: the configuration's only one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    parser.set_defaults(func=_main)


def _main(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    pool = args.pool or config.gateway.default_pool
    if pool is None and len(config.pools) == 1:
        (pool,) = config.pools
    if pool is None:
        raise ConfigError(f"--pool: name one of {', '.join(config.pools)}")
    # Heavy imports only now, so that help and configuration errors are quick.
    from memshare.bootstrap import BootstrapError, BootstrapReport, bootstrap
    from memshare.llm.base import LLMError
    from memshare.pool.errors import PoolError
    from memshare.retrieval.errors import EncoderError
    from memshare.sharing import open_shared

    # Whoever bootstraps a pool is no principal among others.
    alone = {name: p.model_copy(update={"max_principal_share": None})
             for name, p in config.pools.items()}  # fmt: skip
    free = config.model_copy(update={"pools": alone})

    async def run(name: str) -> BootstrapReport:
        async with open_shared(free) as shared:
            return await bootstrap(shared, name)

    try:
        with run_lock(config.run.dir, "bootstrap"):
            report = asyncio.run(run(pool))
    except (BootstrapError, PoolError, LLMError, EncoderError) as error:
        print(f"memshare bootstrap: {error}", file=sys.stderr)
        return 2
    told: dict[str, Any] = {**asdict(report), "seed": config.run.seed}
    print(json.dumps({**told, "stored": len(report.stored)}, indent=2, ensure_ascii=False))
    if args.json:  # last, as it may fail
        write_json(args.json, told)
    return 0
