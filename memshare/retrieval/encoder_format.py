"""sentence-transformers' folder format: what it says of an encoder, and writing it.

Written in the form that its versions from 5 on read; both its older and its newer form are read.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from memshare.files import write_json
from memshare.progress import quiet_transformers

Pooling = Literal["mean", "cls"]


class EncoderError(RuntimeError):
    """An encoder that can't be found, read or used; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an encoder folder says beside weights and tokenizer; ``max_length`` in tokens."""

    pooling: Pooling = "mean"
    query_prefix: str = ""
    memory_prefix: str = ""
    max_length: int = 256
    lower_case: bool = False

    def capped(self, limit: int | None) -> Settings:
        """With ``max_length`` no larger than what the model has positions for."""
        return self if limit is None else replace(self, max_length=min(self.max_length, limit))


def _read_json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(f"{path}: not JSON ({error}); the folder is damaged") from error


def stored_settings(folder: Path) -> dict[str, Any]:
    """`Settings` fields that a sentence-transformers folder gives; none for a plain model folder.

    Raises `EncoderError` for modules or pooling that would give other vectors than ours.
    """
    modules = _read_json(folder / "modules.json", None)
    if modules is None:
        return {}
    found: dict[str, Any] = {}
    base = folder
    for module in modules:
        kind = str(module["type"]).rsplit(".", 1)[-1]
        if kind == "Transformer":
            base = folder / module["path"]
            if base != folder:
                raise EncoderError(f"{folder}: weights in {module['path']}; export them at the top")
        elif kind == "Pooling":
            config = _read_json(folder / module["path"] / "config.json", {})
            found["pooling"] = _stored_pooling(folder, config)
        elif kind != "Normalize":
            raise EncoderError(
                f"{folder}: has a {kind} module; only Transformer, Pooling and Normalize are known"
            )
    about = _read_json(base / "sentence_bert_config.json", {})
    tokenizer = _read_json(base / "tokenizer_config.json", {})
    length = about.get("max_seq_length") or tokenizer.get("model_max_length")
    if isinstance(length, int) and 0 < length < 10**6:  # "no limit" is written as 10**30
        found["max_length"] = length
    found["lower_case"] = bool(about.get("do_lower_case", False))
    prompts = _read_json(folder / "config_sentence_transformers.json", {}).get("prompts") or {}
    if "query" in prompts:
        found["query_prefix"] = prompts["query"]
    for key in ("memory", "document", "passage"):
        if key in prompts:
            found["memory_prefix"] = prompts[key]
            break
    return found


def _stored_pooling(folder: Path, config: dict[str, Any]) -> Pooling:
    mode = config.get("pooling_mode")
    if mode is None:  # sentence-transformers before 6: one switch a mode, all off meaning mean
        switch = "pooling_mode_"
        on = [k.removeprefix(switch) for k, v in config.items() if k.startswith(switch) and v]
        known = {"": "mean", "mean_tokens": "mean", "cls_token": "cls"}
        mode = known.get("+".join(on), "+".join(on))
    if mode not in ("mean", "cls") or config.get("include_prompt", True) is False:
        raise EncoderError(
            f"{folder}: pooling {mode!r}; only mean and cls over all tokens are known"
        )
    return "cls" if mode == "cls" else "mean"


def save_parts(folder: Path, model: Any, tokenizer: Any, settings: Settings, dim: int) -> None:
    """Write a folder that sentence-transformers from 5 on loads, with prompts query and memory."""
    folder.mkdir(parents=True, exist_ok=True)
    takes_pooler = "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.model_max_length = settings.max_length
        tokenizer.save_pretrained(folder)
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds)
        ],
    )
    about: dict[str, Any] = {"max_seq_length": settings.max_length, "do_lower_case": False}
    if takes_pooler:
        about["model_args"] = {"add_pooling_layer": False}
    write_json(folder / "sentence_bert_config.json", about)
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": dim,
            "pooling_mode_cls_token": settings.pooling == "cls",
            "pooling_mode_mean_tokens": settings.pooling == "mean",
            "include_prompt": True,
        },
    )
    write_json(folder / "2_Normalize" / "config.json", {})
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {
                "sentence_transformers": importlib.metadata.version("sentence-transformers"),
                "transformers": importlib.metadata.version("transformers"),
                "pytorch": torch.__version__,
            },
            "model_type": "SentenceTransformer",
            "prompts": {
                "query": settings.query_prefix,
                "memory": settings.memory_prefix,
                "document": settings.memory_prefix,  # what encode_document() uses
            },
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
