"""sentence-transformers' folder format: what it says of an encoder.

Both its older and its newer form are read. What would give other vectors than ours is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from memshare.retrieval.errors import EncoderError

Pooling = Literal["mean", "cls", "lasttoken"]
Side = Literal["query", "memory"]

ROUTES: dict[Side, str] = {"query": "query", "memory": "document"}  # a Router's names for them
# sentence-transformers' names for what is pooled: before version 6 one switch each, then one word.
SWITCHES: dict[Pooling, str] = {
    "mean": "mean_tokens",
    "cls": "cls_token",
    "lasttoken": "lasttoken",
}
_UNLIMITED = 10**6  # tokens; "no limit" is written as 10**30
_VECTOR = "sentence_embedding"  # what modules after the pooling read and write
_TOKENS = {"method": "forward", "method_output_name": "last_hidden_state"}
# What a Transformer module's file may hand to transformers: nothing that makes other vectors.
_HANDED = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args",
           "config_kwargs")  # fmt: skip
_HARMLESS = {
    "add_pooling_layer", "attn_implementation", "dtype", "low_cpu_mem_usage", "padding_side",
    "torch_dtype", "trust_remote_code", "use_cache", "use_fast", "use_safetensors",
}  # fmt: skip
_UNKNOWN = ("processing_kwargs", "query_expansion", "query_length", "document_length",
            "tokenizer_name_or_path")  # fmt: skip
# Its file's name in folders of sentence-transformers before 2.
_OLD_NAMES = ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")


@dataclass(frozen=True, slots=True)
class Settings:
    """What an encoder folder says beside weights and tokenizer; ``max_length`` in tokens.

    ``pooling_told``: whether the folder or the configuration says how, or it is but the default.
    ``notes``: what whoever trains the encoder should know of the folder.
    """

    pooling: Pooling = "mean"
    pooling_told: bool = False
    query_prefix: str = ""
    memory_prefix: str = ""
    max_length: int = 256
    lower_case: bool = False
    notes: tuple[str, ...] = ()

    def capped(self, limit: int | None) -> Settings:
        """With ``max_length`` no larger than what the model has positions for."""
        return self if limit is None else replace(self, max_length=min(self.max_length, limit))


def read_json(path: Path, default: Any) -> Any:
    """What a folder's file says, ``default`` where there is none; raises `EncoderError`."""
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(f"{path}: not JSON ({error}); the folder is damaged") from error


def tower_folders(folder: Path) -> list[tuple[Path, list[Path]]]:
    """Where the weights are, of the one tower, or of the query and the memory tower.

    Of each the transformers model's folder, and those of the dense layers after its pooling. Raises
    `EncoderError` as `stored_settings` does.
    """
    chains = [chain for chain in _chains(folder) if chain]
    return [
        (chain[0][1], [path for kind, path in chain if kind == "Dense"]) for chain in chains
    ] or [(folder, [])]


def stored_settings(folder: Path) -> dict[str, Any]:
    """`Settings` fields that a sentence-transformers folder gives; none for a plain model folder.

    Raises `EncoderError` for modules or pooling that would give other vectors than ours, and for
    two towers that differ in more than their weights.
    """
    each = [_chain_settings(folder, chain) for chain in _chains(folder)]
    if any(settings != each[0] for settings in each):
        raise EncoderError(f"{folder}: its two towers have different settings: {each}")
    found = each[0]
    about = read_json(folder / "config_sentence_transformers.json", {})
    if about.get("truncate_dim"):
        raise EncoderError(
            f"{folder}: cuts its vectors to {about['truncate_dim']} dimensions; take truncate_dim "
            "out of its config_sentence_transformers.json to have them whole"
        )
    notes = []
    if found.pop("raw", False) and "dot" in (about.get("similarity_fn_name") or ""):
        notes.append(
            "its folder compares vectors of any length by dot product; here they are made unit "
            "vectors, which rank otherwise until it is trained"
        )
    prompts = {name: text for name, text in (about.get("prompts") or {}).items() if text}
    if "query" in prompts:
        found["query_prefix"] = prompts["query"]
    sides = [key for key in ("memory", "document", "passage", "corpus") if key in prompts]
    if sides:
        found["memory_prefix"] = prompts[sides[0]]
    if prompts and not sides and "query" not in prompts:
        notes.append(
            f"its folder's prompts {', '.join(prompts)} are not used; encoder.query_prefix and "
            "encoder.memory_prefix are"
        )
    found["notes"] = tuple(notes)
    return found


def _chains(folder: Path) -> list[list[tuple[str, Path]]]:
    """The modules that a text goes through, as kind and folder.

    One chain, empty for a plain model folder, or through a Router that of queries and of memories.
    """
    modules = read_json(folder / "modules.json", [])
    chain = [(_kind(folder, module["type"]), folder / module["path"]) for module in modules]
    if [kind for kind, _ in chain] != ["Router"]:
        return [chain]
    home = chain[0][1]
    router = read_json(home / "router_config.json", {})
    try:
        types, routes = router["types"], router["structure"]
        return [
            [(_kind(folder, types[name]), home / name) for name in routes[route]]
            for route in ROUTES.values()
        ]
    except KeyError as error:
        raise EncoderError(
            f"{folder}: its Router lacks {error}; routes named query and document are wanted"
        ) from error


def _kind(folder: Path, module_type: str) -> str:
    home, _, kind = str(module_type).rpartition(".")
    if home.partition(".")[0] != "sentence_transformers":
        raise EncoderError(
            f"{folder}: its module {module_type} is code of its own, which is never run; give a "
            "model that sentence-transformers loads without trust_remote_code"
        )
    return kind


def _chain_settings(folder: Path, chain: list[tuple[str, Path]]) -> dict[str, Any]:
    if not chain:
        return {}
    kinds = [kind for kind, _ in chain]
    whole = ["Transformer", "Pooling", *["Dense"] * kinds.count("Dense"), "Normalize"]
    for kind in kinds:
        if kind not in (*whole, "Dense"):
            raise EncoderError(
                f"{folder}: has a {kind} module; only Transformer, Pooling, Dense and Normalize "
                "are known"
            )
    if kinds not in (whole, whole[:-1]):
        raise EncoderError(
            f"{folder}: its modules are {', '.join(kinds)}; known is {', '.join(whole)} alone"
        )
    (_, base), (_, pooling), *after = chain
    for kind, path in after:
        _check_reads_vectors(folder, kind, read_json(path / "config.json", {}))
    about = _about(base)
    _check_tokens(folder, about)
    return {
        "pooling": _stored_pooling(folder, read_json(pooling / "config.json", {})),
        "pooling_told": True,
        "max_length": _stored_length(base, about),
        "lower_case": bool(about.get("do_lower_case", False)),
        "raw": "Normalize" not in kinds,
    }


def _check_reads_vectors(folder: Path, kind: str, config: dict[str, Any]) -> None:
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, _VECTOR):
            raise EncoderError(
                f"{folder}: its {kind} module has {key} {config[key]}, not {_VECTOR}"
            )


def _about(base: Path) -> dict[str, Any]:
    """What a Transformer module's folder says of how it reads texts."""
    for name in ("bert", *_OLD_NAMES):
        if found := read_json(base / f"sentence_{name}_config.json", {}):
            return dict(found)
    return {}


def _check_tokens(folder: Path, about: dict[str, Any]) -> None:
    """Raise `EncoderError` unless texts go through tokenizer and model as they do here."""
    modality = about.get("modality_config") or {"text": _TOKENS}
    if "message" in modality:
        raise EncoderError(
            f"{folder}: puts texts into its tokenizer's chat template; save it with a "
            "modality_config of text alone"
        )
    text = modality.get("text") or {}
    if {key: text.get(key) for key in _TOKENS} != _TOKENS:
        raise EncoderError(f"{folder}: its modality_config takes {text} of texts, not {_TOKENS}")
    if (task := about.get("transformer_task", "feature-extraction")) != "feature-extraction":
        raise EncoderError(f"{folder}: is a model for {task}, not for feature-extraction")
    for key in (*_HANDED, *_UNKNOWN):
        value = about.get(key)
        if value and (key in _UNKNOWN or not set(value) <= _HARMLESS):
            raise EncoderError(
                f"{folder}: its sentence_bert_config.json sets {key} {value}, which is not known "
                "here; put it into config.json or tokenizer_config.json"
            )


def _stored_length(base: Path, about: dict[str, Any]) -> int:
    """Tokens at most; without a word of it as many as the model has positions for."""
    tokenizer = read_json(base / "tokenizer_config.json", {})
    length = about.get("max_seq_length") or tokenizer.get("model_max_length")
    return min(int(length), _UNLIMITED) if isinstance(length, int | float) else _UNLIMITED


def _stored_pooling(folder: Path, config: dict[str, Any]) -> Pooling:
    mode = config.get("pooling_mode")
    if mode is None:  # sentence-transformers before 6: one switch a mode, all off meaning mean
        switch = "pooling_mode_"
        on = [k.removeprefix(switch) for k, v in config.items() if k.startswith(switch) and v]
        known = {"": "mean", **{switch: pooling for pooling, switch in SWITCHES.items()}}
        mode = known.get("+".join(on), "+".join(on))
    for pooling in SWITCHES:
        if mode == pooling and config.get("include_prompt", True) is not False:
            return pooling
    raise EncoderError(
        f"{folder}: pooling {mode!r}; only mean, cls and lasttoken over all tokens are known"
    )
