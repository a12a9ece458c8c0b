"""From configuration to a backend; where a model lies and what identifies its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from memshare.config import LLMConfig
from memshare.files import sha256_file
from memshare.llm.base import LLM, LLMError
from memshare.pocket.lm import RECIPES, PocketLMMissing, lm_folder

_WHOLE_FILE_BYTES = 256 * 2**20  # larger files are sampled: hashing 140 GB would take minutes
_SAMPLES = 64
_SAMPLE_BYTES = 2**16


def make_llm(config: LLMConfig) -> LLM:
    """The backend that ``config`` names. Raises `LLMError` if its model can't be loaded.

    A vLLM server need not run yet: it is first asked when it is first used, or by ``ready()``.
    """
    if config.backend == "openai":
        from memshare.llm.endpoint import EndpointBackend

        return EndpointBackend(config.model, config)
    model = resolve_model(config.model)
    if config.backend == "vllm":
        from memshare.llm.vllm import VLLMBackend

        return VLLMBackend(model, config)
    from memshare.llm.hf import TransformersBackend

    return TransformersBackend(model, config)


def resolve_model(name: str) -> str:
    """Folder of a pocket LM or of a local model; anything else is a hub name and stays as it is.

    Raises `LLMError` naming a folder that is missing.
    """
    if name in RECIPES:
        try:
            return str(lm_folder(name))
        except PocketLMMissing as error:
            raise LLMError(str(error)) from error
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LLMError(f"{path}: not a model folder (no config.json)")
        return str(path.resolve())
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise LLMError(f"{name}: no such model folder")
    return name


def llm_identity(config: LLMConfig) -> str:
    """What identifies a configured LLM's weights, as far as that can be known from here."""
    if config.backend == "openai":
        return f"{config.model}@{config.urls[0]}"
    return model_identity(resolve_model(config.model))


def model_identity(model: str) -> str:
    """What identifies the weights: ``folder-name@hash``, or the hub name.

    The hash covers configuration, tokenizer, template and weights by content (large files by size
    and samples), so that a copy elsewhere is the same model and a retrained one is not.
    """
    path = Path(model)
    if not path.is_dir():
        return model
    return f"{path.resolve().name}@{_folder_hash(path, _stamp(path))}"


def _model_files(folder: Path) -> Iterator[Path]:
    kinds = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
    yield from sorted(path for path in folder.iterdir() if path.suffix in kinds and path.is_file())


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes whenever a file does, so that a remembered hash never outlives its folder."""
    stats = ((path.name, path.stat()) for path in _model_files(folder))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@lru_cache(maxsize=64)
def _folder_hash(folder: Path, stamp: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, size, _ in stamp:
        path = folder / name
        content = sha256_file(path) if size <= _WHOLE_FILE_BYTES else _sampled_hash(path, size)
        digest.update(f"{name}\0{size}\0{content}\n".encode())
    return digest.hexdigest()[:16]


def _sampled_hash(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for sample in range(_SAMPLES):
            handle.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()
