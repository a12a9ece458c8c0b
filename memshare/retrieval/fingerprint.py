"""What decides an encoder's vectors, as one hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

# What says nothing about how text becomes a vector, and differs between versions and folders.
_VOLATILE_CONFIG = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "model_type", "gradient_checkpointing", "_attn_implementation",
}  # fmt: skip


@lru_cache(maxsize=4)
def _tokenizer_text(state: str) -> str:
    """A tokenizer's serialised state as sorted JSON, without what its last call left there.

    Remembered, since a vocabulary takes a tenth of a second in which no other thread runs Python,
    searches among them, and generations mostly share one.
    """
    tree = json.loads(state)
    tree.pop("truncation", None)  # both are set anew by each call
    tree.pop("padding", None)
    return json.dumps(tree, sort_keys=True, default=str)


def fingerprint(model: Any, tokenizer: Any, settings: Mapping[str, Any]) -> str:
    """Hex SHA-256 over weights, model configuration, tokenizer and ``settings``.

    Stable over saving, loading and processes; where it is equal, vectors are equal.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _VOLATILE_CONFIG}
    about = {"model": config, "tokenizer": None, **settings}
    # "tokenizer" is the last of the sorted keys: its text, made once, takes the place of null.
    text = json.dumps(about, sort_keys=True, default=str).removesuffix("null}")
    text += _tokenizer_text(tokenizer.backend_tokenizer.to_str()) + "}"
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(model.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"\x1f{name} {tensor.dtype} {tuple(tensor.shape)}\x1f".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
