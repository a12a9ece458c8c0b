"""What every benchmark shares: its arguments, machine facts, and the JSON that it writes.

A benchmark is a script: ``args = parser(__doc__).parse_args()``, measure, ``write_claims(args,
claims)``. It takes ``--json FILE`` and ``--quick`` (under a minute, same code, smaller sizes), and
writes ``{"claims": {NAME: number}, "machine": {...}, "seed": n, "commit": "..."}``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memshare.evaluation.report import machine
from memshare.files import write_json
from memshare.version import commit

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
    if args.json is not None:
        write_json(args.json, report)
    print(json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False))
    return report
