"""Writing an encoder in sentence-transformers' folder format, as its versions from 5 on read it."""

from __future__ import annotations

import importlib.metadata
import inspect
from pathlib import Path
from typing import Any

import torch

from memshare.files import write_json
from memshare.loading import using_transformers
from memshare.retrieval import dense
from memshare.retrieval.encoder_format import ROUTES, SWITCHES, Settings

_MODULES = "sentence_transformers.models."


def save_parts(folder: Path, model: Any, tokenizer: Any, settings: Settings) -> None:
    """Write a folder that sentence-transformers from 5 on loads, with prompts query and memory.

    ``model``: one transformers model, or a mapping of two by `Side`; two are saved as a Router.
    """
    folder.mkdir(parents=True, exist_ok=True)
    modules: list[tuple[str, str]]  # folder and kind
    if isinstance(model, torch.nn.ModuleDict):
        routes = {
            route: {f"{route}_{name}": kind for name, kind in _tower_modules(model[side])}
            for side, route in ROUTES.items()
        }
        for side, route in ROUTES.items():
            _save_tower([folder / name for name in routes[route]], model[side], tokenizer, settings)
        write_json(
            folder / "router_config.json",
            {
                "types": {n: _MODULES + k for names in routes.values() for n, k in names.items()},
                "structure": {route: list(names) for route, names in routes.items()},
                "parameters": {"default_route": "document", "allow_empty_key": True},
            },
        )
        modules = [("", "Router")]
    else:
        first, *others = _tower_modules(model)
        modules = [("", first[1]), *others]
        _save_tower([folder / name for name, _ in modules], model, tokenizer, settings)
    write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": _MODULES + kind}
            for i, (path, kind) in enumerate(modules)
        ],
    )
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


def _tower_modules(model: Any) -> list[tuple[str, str]]:
    """Folder and kind of the modules that a tower is saved as."""
    kinds = ["Transformer", "Pooling", *["Dense"] * len(dense.of(model)), "Normalize"]
    return [(f"{i}_{kind}", kind) for i, kind in enumerate(kinds)]


def _save_tower(folders: list[Path], model: Any, tokenizer: Any, settings: Settings) -> None:
    """Weights and tokenizer, pooling, dense layers, and normalisation, each into its folder."""
    base, pooling, *layers, normalize = folders
    for path in folders:
        path.mkdir(exist_ok=True)
    with using_transformers():
        model.save_pretrained(base, state_dict=dense.bare_state(model) if layers else None)
        tokenizer.model_max_length = settings.max_length
        tokenizer.save_pretrained(base)
    about: dict[str, Any] = {"max_seq_length": settings.max_length, "do_lower_case": False}
    if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        about["model_args"] = {"add_pooling_layer": False}
    write_json(base / "sentence_bert_config.json", about)
    write_json(
        pooling / "config.json",
        {
            "word_embedding_dimension": int(model.config.hidden_size),
            **{
                f"pooling_mode_{switch}": settings.pooling == pooling
                for pooling, switch in SWITCHES.items()
            },
            "include_prompt": True,
        },
    )
    for path, layer in zip(layers, dense.of(model), strict=True):
        dense.save(layer, path)
    write_json(normalize / "config.json", {})
