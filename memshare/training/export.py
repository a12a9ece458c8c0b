"""What a training is for: the encoder in a folder of its own, with its model card, whole."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memshare.files import disk_full, fsync_dir, fsync_tree
from memshare.retrieval.card import CARD, model_card
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.errors import EncoderError
from memshare.training.lora import merge_adapters


def export(encoder: Encoder, folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write the encoder, adapters merged, so that ``folder`` is whole or as it was before.

    ``metrics``: what its model card tells, see `model_card`. Raises `EncoderError` where it can't
    be written, and leaves nothing behind.
    """
    merge_adapters(encoder)
    temporary, old = (folder.with_name(f".{folder.name}.{what}") for what in ("tmp", "old"))
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)
    encoder.model.eval()
    try:
        encoder.save(temporary)
        (temporary / CARD).write_text(model_card(encoder, metrics), encoding="utf-8")
        fsync_tree(temporary)  # a crash must not leave a part of what the result calls whole
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        fsync_dir(folder.parent)
    except Exception as error:  # all that tokenizers raises
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError) and not disk_full(error):
            raise
        raise EncoderError(
            f"{folder}: the trained encoder can't be written ({error}); the checkpoints are "
            "intact. Free some space and run the same command again"
        ) from error
    shutil.rmtree(old, ignore_errors=True)
