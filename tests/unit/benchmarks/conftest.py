"""Benchmarks are scripts beside each other: they find one another on sys.path, as when started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
