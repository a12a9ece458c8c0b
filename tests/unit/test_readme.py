"""The README's tree names every file, and no file that is gone."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("train", "serve", "memshare", "benchmarks")


def listed() -> set[str]:
    tree = (ROOT / "README.md").read_text().split("## What is where")[1].split("```")[1]
    folder, files = "", set()
    for line in tree.strip().splitlines():
        if match := re.match(r"(\S+)/ ", line):
            folder = match[1]
        elif match := re.match(r"  (\S+\.py) +\S", line):
            files.add(f"{folder}/{match[1]}")
    return files


def test_the_tree_is_true() -> None:
    present = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert listed() == present
