"""Which memshare this is: its version, and the commit where it runs from a git work tree."""

from __future__ import annotations

import subprocess
from pathlib import Path

from memshare import __version__

__all__ = ["__version__", "commit"]


def commit() -> str:
    """The commit, with ``+changes`` if files differ from it; unknown outside git.

    A memshare that is installed inside another project's work tree is outside, too.
    """
    folder = Path(__file__).parent
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
