"""What every benchmark shares: its arguments, machine facts, and the JSON that it writes.

A benchmark is a script: ``args = parser(__doc__).parse_args()``, measure, ``write_claims(args,
claims)``. It takes ``--json FILE`` and ``--quick`` (under a minute, same code, smaller sizes), and
writes ``{"claims": {NAME: number}, "machine": {...}, "seed": n, "commit": "..."}``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from memshare.files import write_json

ROOT = Path(__file__).resolve().parent.parent


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with ``--json``, ``--quick`` and ``--seed``; add the benchmark's own."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    made.add_argument("--quick", action="store_true", help="under a minute: smaller sizes")
    made.add_argument("--seed", type=int, default=0)
    return made


def write_claims(
    args: argparse.Namespace, claims: Mapping[str, float], **extra: Any
) -> dict[str, Any]:
    """Print the report, write it to ``args.json`` if given, and return it.

    ``claims`` are the benchmark's headline figures, finite numbers by name (`ValueError` for
    others); ``extra`` is put beside them, such as ``model=``, ``data=`` or raw figures.
    """
    bad = [name for name, value in claims.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(f"claims without a finite number: {', '.join(bad)}")
    report = {
        "claims": {name: float(value) for name, value in claims.items()},
        "machine": machine(),
        "seed": args.seed,
        "commit": commit(),
        "quick": args.quick,
        **extra,
    }
    print(json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False))
    if args.json is not None:
        write_json(args.json, report)
    return report


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in bytes, GPUs, and versions."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def commit() -> str:
    """The commit, with ``+changes`` if files differ from it; ``unknown`` outside git."""
    try:
        head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
        changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _gpus() -> list[str]:
    try:
        return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []  # no driver here, so no GPU


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()
