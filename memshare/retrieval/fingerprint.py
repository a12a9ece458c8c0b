"""What decides an encoder's vectors, as one hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

# What says nothing about how text becomes a vector, and differs between versions and folders.
_VOLATILE_CONFIG = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "model_type", "gradient_checkpointing", "_attn_implementation",
}  # fmt: skip


def fingerprint(model: Any, tokenizer: Any, settings: Mapping[str, Any]) -> str:
    """Hex SHA-256 over weights, model configuration, tokenizer and ``settings``.

    Stable over saving, loading and processes; where it is equal, vectors are equal.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _VOLATILE_CONFIG}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left there by the last call, and set anew by each.
    state.pop("truncation", None)
    state.pop("padding", None)
    about = {"model": config, "tokenizer": state, **settings}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"\x1f{name} {tensor.dtype} {tuple(tensor.shape)}\x1f".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
