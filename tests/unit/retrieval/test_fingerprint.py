"""The remembered vocabulary must not change what a fingerprint is: manifests on disk name it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from memshare.retrieval import fingerprint as module
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.fingerprint import fingerprint
from tests.tiny import tiny_encoder


def plain(encoder: Encoder, settings: dict[str, object]) -> str:
    """Everything in one JSON text, and the weights."""
    config = encoder.model.config.to_dict()
    config = {k: v for k, v in config.items() if k not in module._VOLATILE_CONFIG}
    state = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    about = {"model": config, "tokenizer": state, **settings}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, value in sorted(encoder.model.state_dict().items()):
        digest.update(f"\x1f{name} {value.dtype} {tuple(value.shape)}\x1f".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def test_it_is_one_hash_over_all_of_it(tmp_path: Path) -> None:
    encoder = Encoder.from_folder(tiny_encoder(tmp_path / "tiny"), device="cpu")
    for prefix in ("", '"tokenizer": null}', "query: "):
        settings: dict[str, object] = {"pooling": "mean", "prefix": prefix, "max_length": 9}
        found = fingerprint(encoder.model, encoder.tokenizer, settings)
        assert found == plain(encoder, settings)
        encoder.encode(["a text", "another one"])  # leaves truncation settings in the tokenizer
        assert fingerprint(encoder.model, encoder.tokenizer, settings) == found
