"""Rubrics: Markdown files of named criteria whose points add up to 100.

A criterion is a heading that ends in its points: ``## Form (30 points)``. The files shipped here
(``literary``, ``logic``, ``plans``, ``general``) may be copied, edited and named by path.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

_CRITERION = re.compile(r"^#{2,}\s*(?P<name>\S.*?)\s*\((?P<points>\d+)\s+points?\)\s*$", re.M)
_FOLDER = resources.files("memshare.llm") / "rubrics"


class RubricError(ValueError):
    """A rubric that can't be used; the message names it."""


def shipped_rubrics() -> list[str]:
    """Names of the rubrics that come with memshare."""
    names = (entry.name for entry in _FOLDER.iterdir())
    return sorted(name.removesuffix(".md") for name in names if name.endswith(".md"))


def load_rubric(name_or_path: str | Path) -> str:
    """Text of a shipped rubric, or of a file. Raises `RubricError` for an unusable one."""
    name = str(name_or_path)
    if name in shipped_rubrics():
        text = (_FOLDER / f"{name}.md").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RubricError(
                f"rubric {name!r}: neither a shipped one ({', '.join(shipped_rubrics())}) "
                f"nor a readable file: {error}"
            ) from error
    try:
        criteria(text)
    except RubricError as error:
        raise RubricError(f"rubric {name}: {error}") from None
    return text


def criteria(text: str) -> dict[str, int]:
    """Points of each criterion of a rubric, by name.

    A rubric without such headings has the single criterion ``score`` with 100 points. Raises
    `RubricError` if names repeat or the points do not add up to 100.
    """
    found = [(match["name"], int(match["points"])) for match in _CRITERION.finditer(text)]
    if not text.strip():
        raise RubricError("it is empty")
    if not found:
        return {"score": 100}
    points = dict(found)
    if len(points) != len(found):
        raise RubricError("two criteria have the same name")
    if sum(points.values()) != 100:
        raise RubricError(f"its points add up to {sum(points.values())}, not to 100")
    return points
