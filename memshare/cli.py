"""``memshare COMMAND ...``: hands each command to the room that does it.

Only the module of the command that was given is imported, so that help is quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from memshare import __version__
from memshare.config import ConfigError
from memshare.files import RunLocked

# command -> (module with add_parser(subparsers), one line of help)
COMMANDS = {
    "pool": ("memshare.pool.cli", "create, fill, read and export pools"),
    "keys": ("memshare.pool.keys_cli", "create, list and revoke the gateway's keys"),
    "mcp": ("memshare.client.mcp", "let agents join a pool over MCP"),
    "prune": ("memshare.pruning.cli", "make a pool smaller, by score, age, use, ..."),
    "bootstrap": ("memshare.bootstrap_cli", "fill a pool from a small seed set"),
    "eval": ("memshare.evaluation.cli", "run the paper's experiments and write their report"),
    "examples": ("memshare.training.cli", "labelled texts: to train on, and to evaluate"),
    "trainings": ("memshare.training.push", "push what a training made to the hub"),
    "generations": ("memshare.retrieval.cli", "list, verify, activate, unpin and push generations"),
    "slurm": ("memshare.slurm.cli", "render and submit jobs for a SLURM cluster"),
}


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser, with every command named and ``command``'s own arguments in it."""
    parser = argparse.ArgumentParser(
        prog="memshare", description="LLM agents share memories in pools that keep learning."
    )
    parser.add_argument("--version", action="version", version=f"memshare {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        if name == command:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 done in part or failed, 2 refused."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((item for item in arguments if not item.startswith("-")), None)
    args = build_parser(command).parse_args(arguments)
    try:
        code = int(args.func(args))
        print(end="", flush=True)  # here, so that what can't be written is no success
        return code
    except (ConfigError, RunLocked) as error:
        print(f"memshare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("memshare: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (such as `head`) has gone
        _give_up_writing()
        return 141
    except OSError as error:  # a full disk, a file where a folder is to be, ...
        print(f"memshare: {error}", file=sys.stderr)
        _give_up_writing()
        return 1


def _give_up_writing() -> None:
    """Keep Python from failing again on its last flush, where it would."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
