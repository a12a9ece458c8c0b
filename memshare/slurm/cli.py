"""``memshare slurm render|submit|ports``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from memshare.config import Config, ConfigError, add_config_arguments, load_config, positive
from memshare.slurm.render import JOBS, check, load_site, render


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``slurm`` and its actions."""
    parser = subparsers.add_parser("slurm", help="render and submit the jobs of slurm/")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, summary in (
        ("render", "print the resolved script of a job; submits nothing"),
        ("submit", "hand it to sbatch, and print the job's number"),
    ):
        action = actions.add_parser(name, help=summary)
        add_config_arguments(action)
        action.add_argument("--site", type=Path, required=True, help="the cluster's facts (YAML)")
        action.add_argument("--nodes", type=positive, default=1, metavar="N")
        action.add_argument(
            "--array", type=positive, metavar="N", help="tasks of mine (default: 8)"
        )
        action.add_argument(
            "--sbatch", action="append", default=[], metavar="--OPTION[=VALUE]",
            help="one more option of sbatch, as --sbatch=--exclusive (repeatable)",
        )  # fmt: skip
        if name == "submit":
            action.add_argument("--dry-run", action="store_true", help="render only")
        action.add_argument("job", choices=JOBS)
        action.add_argument(
            "arguments", nargs=argparse.REMAINDER, metavar="...", help="the program's arguments"
        )
        action.set_defaults(func=_run)
    ports = actions.add_parser("ports", help="options that put local LLM servers on free ports")
    add_config_arguments(ports)
    ports.set_defaults(func=_ports)


def _ports(args: argparse.Namespace) -> int:
    """One word a line, for the scripts of slurm/."""
    from memshare.llm.plan import on_free_ports

    for override in on_free_ports(load_config(args.config, args.overrides)):
        print("--set", override, sep="\n")
    return 0


def _next_round(config: Config) -> int:
    """The round that train/mine.py would mine; named now, so that all tasks mine the same one."""
    from memshare.training.rounds import last_begun, last_mined

    return max(last_begun(config.examples_dir), last_mined(config.examples_dir, ())[0] + 1)


def _run(args: argparse.Namespace) -> int:
    if args.config is None:
        raise ConfigError("--config FILE is needed: the job reads it, too")
    if args.array is not None and args.job != "mine":
        raise ConfigError(f"--array is for mine; {args.job} is one job")
    tasks = args.array or 8
    options = [f"--array=0-{tasks - 1}"] if args.job == "mine" else [f"--nodes={args.nodes}"]
    site = load_site(args.site)
    config = load_config(args.config, args.overrides)
    check(args.job, config, args.arguments, args.nodes, tasks)
    settings = [word for item in args.overrides for word in ("--set", item)]
    arguments = ["--config", str(args.config.absolute()), *settings, *args.arguments]
    if args.job == "mine" and "--round" not in args.arguments:
        arguments += ["--round", str(_next_round(config))]
    script = render(args.job, site, [*options, *args.sbatch], arguments)
    if args.action == "render" or args.dry_run:
        print(script, end="")
        return 0
    site.logs.mkdir(parents=True, exist_ok=True)  # without it, SLURM fails the job without a word
    try:
        sent = subprocess.run(
            ["sbatch", "--parsable"], input=script, text=True, capture_output=True, check=True
        )
    except FileNotFoundError:
        raise ConfigError("sbatch is not here: run this where the cluster takes jobs") from None
    except subprocess.CalledProcessError as error:
        print(f"memshare: {error.stderr.strip()}", file=sys.stderr)
        return 1
    print(sent.stdout.strip().partition(";")[0])
    return 0
