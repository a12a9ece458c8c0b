"""Train a pocket LM from scratch: a small Qwen2 that answers by the examples it is shown.

    python train/pocket_lm.py                 # into the user's cache, unless it is there already
    python train/pocket_lm.py --force         # again
    python train/pocket_lm.py pocket-small    # a smaller one beside it, for agents that differ

A few minutes on two CPU cores. The result is an ordinary Hugging Face folder for transformers and
vLLM, with a report of what the LM can do: answers shown in its context against answers that are
not. See `memshare.pocket.fit` for the training and `memshare.pocket.episodes` for what it reads.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from memshare.pocket.lm import RECIPES, folder_of, is_built, lm_folder
from memshare.progress import log

LABELS = {
    "unseen_present": "random text, form in an example",
    "unseen_absent": "random text, no example",
    "world_gold": "pocket world, memory of the same group",
    "world_gold_third": "pocket world, the same as last of three",
    "world_wrong": "pocket world, memory of another group",
    "world_zero_shot": "pocket world, no example",
}


def show(name: str, report: dict[str, Any]) -> None:
    """Print what the LM can do as a table."""
    table = Table(title=f"{name}, {report['parameters']:,} parameters")
    table.add_column("asked")
    for name in ("exact answers", "right tokens", "log-likelihood a token (nats)", "above none"):
        table.add_column(name, justify="right")
    for key, label in LABELS.items():
        row = report["ability"][key]
        table.add_row(
            label,
            f"{row['exact']:.2f}",
            f"{row['tokens']:.2f}",
            f"{row['loglik']:.2f}",
            f"{row['above_none']:.2f}",
        )
    Console(width=110).print(table)


def main() -> None:
    """Build the LM if need be, and say where it lies and what it can do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=RECIPES, default="pocket")
    parser.add_argument("--force", action="store_true", help="train again although it is built")
    args = parser.parse_args()
    folder: Path = folder_of(RECIPES[args.name])
    if args.force and is_built(folder):
        shutil.rmtree(folder)
    log(f"{args.name}: {folder}" + (" is built already" if is_built(folder) else " is to be built"))
    lm_folder(args.name, build=True)
    show(args.name, json.loads((folder / "report.json").read_text(encoding="utf-8")))
    print(folder)


if __name__ == "__main__":
    main()
