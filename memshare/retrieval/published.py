"""What a round came to, where an earlier run of it was killed once it had published."""

from __future__ import annotations

import json
from typing import Any

from memshare.config import Config
from memshare.progress import log
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.generation import generations
from memshare.retrieval.manifest import DamagedGeneration, Manifest, NoGeneration, folder_name
from memshare.retrieval.publish import complete


def published_before(
    config: Config, number: int | None, source: str, encoder: Encoder
) -> dict[str, Any] | None:
    """The generation and metrics of round ``number``'s ``encoder``, loaded from ``source``.

    None where it was not published yet, or what was is damaged, and for no round. Where the earlier
    run was killed before CURRENT moved, it moves now.
    """
    if number is None:
        return None
    home = config.retriever_dir
    for manifest in reversed(generations(home)):
        path = home / folder_name(manifest.number) / "metrics.json"
        try:
            metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError) as error:  # damaged: nothing will load it either
            log(f"generation {manifest.number} can't tell of which round it is ({path}: {error})")
            continue
        if (metrics.get("round"), metrics.get("encoder")) != (number, source):
            continue
        if not _made_by(manifest, encoder):
            log(f"round {number}: {source} is no longer what generation {manifest.number} has")
            continue
        try:
            complete(home, manifest.number, config.retriever.keep)
        except (NoGeneration, DamagedGeneration) as error:
            log(f"round {number}: published again, since generation {manifest.number}: {error}")
            continue
        first = manifest.origin or manifest.number  # the round's own, not one with newer rows
        return {"outcome": "published", "generation": first, **metrics}
    return None


def _made_by(manifest: Manifest, encoder: Encoder) -> bool:
    """Whether it is of these very weights and settings: a folder may have been trained into again.

    Hashing them takes its time, so only who has the same round and folder is asked.
    """
    made = (manifest.query_fingerprint, manifest.memory_fingerprint)
    return made == (encoder.query_fingerprint(), encoder.memory_fingerprint())
