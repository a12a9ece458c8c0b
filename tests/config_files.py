"""Configuration files for tests."""

from __future__ import annotations

from pathlib import Path


def write(tmp_path: Path, text: str) -> Path:
    """A file of that text."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path
