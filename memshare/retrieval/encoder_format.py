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
from memshare.loading import using_transformers
from memshare.retrieval.errors import EncoderError

Pooling = Literal["mean", "cls", "lasttoken"]
Side = Literal["query", "memory"]

_ROUTES: dict[Side, str] = {"query": "query", "memory": "document"}  # a Router's names for them
_MODULES = "sentence_transformers.models."
# sentence-transformers' names for what is pooled: before version 6 one switch each, then one word.
_SWITCHES: dict[Pooling, str] = {
    "mean": "mean_tokens",
    "cls": "cls_token",
    "lasttoken": "lasttoken",
}
_TOWER = {"0_Transformer": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}


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


def tower_folders(folder: Path) -> list[Path]:
    """Where the weights are: of the one tower, or of the query and the memory tower.

    Raises `EncoderError` as `stored_settings` does.
    """
    chains = _chains(folder)
    return [path for chain in chains for kind, path in chain if kind == "Transformer"] or [folder]


def stored_settings(folder: Path) -> dict[str, Any]:
    """`Settings` fields that a sentence-transformers folder gives; none for a plain model folder.

    Raises `EncoderError` for modules or pooling that would give other vectors than ours, and for
    two towers that differ in more than their weights.
    """
    each = [_chain_settings(folder, chain) for chain in _chains(folder)]
    if any(settings != each[0] for settings in each):
        raise EncoderError(f"{folder}: its two towers have different settings: {each}")
    found = each[0]
    prompts = _read_json(folder / "config_sentence_transformers.json", {}).get("prompts") or {}
    if "query" in prompts:
        found["query_prefix"] = prompts["query"]
    for key in ("memory", "document", "passage"):
        if key in prompts:
            found["memory_prefix"] = prompts[key]
            break
    return found


def _chains(folder: Path) -> list[list[tuple[str, Path]]]:
    """The modules that a text goes through, as kind and folder.

    One chain, empty for a plain model folder, or through a Router that of queries and of memories.
    """
    modules = _read_json(folder / "modules.json", [])
    chain = [(_kind(module["type"]), folder / module["path"]) for module in modules]
    if [kind for kind, _ in chain] != ["Router"]:
        return [chain]
    home = chain[0][1]
    router = _read_json(home / "router_config.json", {})
    try:
        types, routes = router["types"], router["structure"]
        return [[(_kind(types[n]), home / n) for n in routes[route]] for route in _ROUTES.values()]
    except KeyError as error:
        raise EncoderError(
            f"{folder}: its Router lacks {error}; routes named query and document are wanted"
        ) from error


def _kind(module_type: str) -> str:
    return str(module_type).rsplit(".", 1)[-1]


def _chain_settings(folder: Path, chain: list[tuple[str, Path]]) -> dict[str, Any]:
    if not chain:
        return {}
    found: dict[str, Any] = {}
    base = folder
    for kind, path in chain:
        if kind == "Transformer":
            base = path
        elif kind == "Pooling":
            found["pooling"] = _stored_pooling(folder, _read_json(path / "config.json", {}))
        elif kind != "Normalize":
            raise EncoderError(
                f"{folder}: has a {kind} module; only Transformer, Pooling and Normalize are known"
            )
    about = _read_json(base / "sentence_bert_config.json", {})
    if "message" in (about.get("modality_config") or {}):
        raise EncoderError(
            f"{folder}: puts texts into its tokenizer's chat template; save it with a "
            "modality_config of text alone"
        )
    tokenizer = _read_json(base / "tokenizer_config.json", {})
    length = about.get("max_seq_length") or tokenizer.get("model_max_length")
    if isinstance(length, int) and 0 < length < 10**6:  # "no limit" is written as 10**30
        found["max_length"] = length
    found["lower_case"] = bool(about.get("do_lower_case", False))
    return found


def _stored_pooling(folder: Path, config: dict[str, Any]) -> Pooling:
    mode = config.get("pooling_mode")
    if mode is None:  # sentence-transformers before 6: one switch a mode, all off meaning mean
        switch = "pooling_mode_"
        on = [k.removeprefix(switch) for k, v in config.items() if k.startswith(switch) and v]
        known = {"": "mean", **{switch: pooling for pooling, switch in _SWITCHES.items()}}
        mode = known.get("+".join(on), "+".join(on))
    for pooling in _SWITCHES:
        if mode == pooling and config.get("include_prompt", True) is not False:
            return pooling
    raise EncoderError(
        f"{folder}: pooling {mode!r}; only mean, cls and lasttoken over all tokens are known"
    )


def save_parts(folder: Path, model: Any, tokenizer: Any, settings: Settings, dim: int) -> None:
    """Write a folder that sentence-transformers from 5 on loads, with prompts query and memory.

    ``model``: one transformers model, or a mapping of two by `Side`; two are saved as a Router.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, torch.nn.ModuleDict):
        routes = {
            route: {f"{route}_{name}": kind for name, kind in _TOWER.items()}
            for route in _ROUTES.values()
        }
        for side, route in _ROUTES.items():
            _save_tower([folder / name for name in routes[route]], model[side], tokenizer,
                        settings, dim)  # fmt: skip
        write_json(
            folder / "router_config.json",
            {
                "types": {n: _MODULES + k for names in routes.values() for n, k in names.items()},
                "structure": {route: list(names) for route, names in routes.items()},
                "parameters": {"default_route": "document", "allow_empty_key": True},
            },
        )
        modules = {"": "Router"}
    else:
        modules = {name.removeprefix("0_Transformer"): kind for name, kind in _TOWER.items()}
        _save_tower([folder / name for name in modules], model, tokenizer, settings, dim)
    write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": _MODULES + kind}
            for i, (path, kind) in enumerate(modules.items())
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


def _save_tower(
    folders: list[Path], model: Any, tokenizer: Any, settings: Settings, dim: int
) -> None:
    """Weights and tokenizer, pooling, and normalisation, each into its folder."""
    base, pooling, normalize = folders
    for path in folders:
        path.mkdir(exist_ok=True)
    with using_transformers():
        model.save_pretrained(base)
        tokenizer.model_max_length = settings.max_length
        tokenizer.save_pretrained(base)
    about: dict[str, Any] = {"max_seq_length": settings.max_length, "do_lower_case": False}
    if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        about["model_args"] = {"add_pooling_layer": False}
    write_json(base / "sentence_bert_config.json", about)
    write_json(
        pooling / "config.json",
        {
            "word_embedding_dimension": dim,
            **{
                f"pooling_mode_{switch}": settings.pooling == pooling
                for pooling, switch in _SWITCHES.items()
            },
            "include_prompt": True,
        },
    )
    write_json(normalize / "config.json", {})
