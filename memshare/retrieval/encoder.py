"""The encoder: texts to unit vectors, by any Hugging Face text encoder.

A query is its prompt, a memory is prompt + newline + answer, each after a prefix of its own. Both
go through one model, or each through a tower of its own (`Encoder.split`). The folder written by
`Encoder.save` is a sentence-transformers model: ``SentenceTransformer(folder)`` gives the same
vectors, its prompts ``query`` and ``memory`` being the prefixes; two towers are its Router, with
``encode_query`` and ``encode_document``. Mean and CLS pooling as in Sentence-BERT (Reimers &
Gurevych 2019); the last token's vector for decoders, whose last token alone has read all others (as
E5-Mistral, Wang et al. 2023, and Qwen3-Embedding).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from memshare.config import EncoderConfig
from memshare.retrieval import dense, encoder_folder, packing
from memshare.retrieval.encoder_format import (
    Pooling,
    Settings,
    Side,
    stored_settings,
    tower_folders,
)
from memshare.retrieval.encoder_saving import save_parts
from memshare.retrieval.errors import EncoderError
from memshare.retrieval.fingerprint import fingerprint
from memshare.retrieval.ragged import Ragged, on_device
from memshare.retrieval.text import memory_text

SIDES: tuple[Side, ...] = ("query", "memory")
_BLOCK_TEXTS = 8192  # texts tokenized and sorted at a time: bounds memory, keeps padding small


def pool_embeddings(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Pool token vectors to one unit vector a row, in float32.

    ``hidden`` is (batch, tokens, dim), ``mask`` (batch, tokens) with 1 for real tokens, at least
    one a row; returns (batch, dim). ``mean`` averages the real tokens, ``cls`` takes the first and
    ``lasttoken`` the last.
    """
    return functional.normalize(_pooled(hidden, mask, pooling), dim=-1)


def _pooled(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    hidden = hidden.float()
    if pooling in ("cls", "lasttoken"):
        at = mask.to(torch.int64).argmax(dim=1)
        if pooling == "lasttoken":
            at = mask.shape[1] - 1 - mask.flip(1).to(torch.int64).argmax(dim=1)
        pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), at]
    elif pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
    else:
        raise ValueError(f"pooling {pooling!r}: expected mean, cls or lasttoken")
    return pooled


def cut_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Positions of ``lengths`` in batches, longest first, each at most ``batch_tokens`` padded.

    A text longer than the budget has a batch to itself. Sorting by length leaves next to no
    padding; longest first means that what doesn't fit in memory fails at once.
    """
    batches: list[list[int]] = []
    width = 0
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * width > batch_tokens:
            batches.append([])
            width = max(lengths[position], 1)
        batches[-1].append(position)
    return batches


class Encoder:
    """A text encoder with its tokenizer and settings. Not thread-safe: one thread owns it."""

    def __init__(self, model: Any, tokenizer: Any, settings: Settings, device: str) -> None:
        """Use `load` or `from_folder`.

        ``model`` is a transformers model in float32, or a ``ModuleDict`` of two by `Side`.
        """
        self.device = encoder_folder.pick_device(device)
        self.model = model.to(self.device).eval()
        self.tokenizer = tokenizer
        self.pooling: Pooling = settings.pooling
        self.query_prefix = settings.query_prefix
        self.memory_prefix = settings.memory_prefix
        self.max_length = settings.max_length
        self._notes = settings.notes
        self.compute_as(EncoderConfig())
        self.dim = dense.width(self.tower("query"))

    @classmethod
    def load(cls, config: EncoderConfig) -> Encoder:
        """The configured encoder.

        What ``config`` sets explicitly (pooling, prefixes, max_length) wins; the rest is taken from
        the folder where it is a sentence-transformers one, else from the config's defaults. Raises
        `EncoderError`.
        """
        folder = encoder_folder.local_folder(config.model)
        chosen = config.model_dump(
            include={"pooling", "query_prefix", "memory_prefix", "max_length"}
        )
        explicit = {name: chosen[name] for name in config.model_fields_set if name in chosen}
        told = {"pooling_told": "pooling" in explicit}
        stored = stored_settings(folder)
        notes = [*stored.pop("notes", ())]
        for name in ("pooling", "query_prefix", "memory_prefix"):
            if name in explicit and stored.get(name, explicit[name]) != explicit[name]:
                notes.append(f"encoder.{name} is set, and its folder has {stored[name]!r}")
        settings = Settings(**{**chosen, **told, **stored, **explicit, "notes": tuple(notes)})
        encoder = cls._open(folder, settings, config.device)
        encoder.compute_as(config)
        return encoder

    @classmethod
    def from_folder(cls, path: str | Path, device: str = "auto") -> Encoder:
        """An encoder as its folder describes it: pooling, prefixes (prompts) and max_length.

        A plain transformers folder gets mean pooling, no prefixes, 256 tokens. Raises
        `EncoderError`.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise EncoderError(f"{folder}: no such encoder folder")
        return cls._open(folder, Settings(**stored_settings(folder)), device)

    @classmethod
    def _open(cls, folder: Path, settings: Settings, device: str) -> Encoder:
        towers = tower_folders(folder)
        parts = [encoder_folder.load_parts(path, settings, layers) for path, layers in towers]
        model, tokenizer, limit = parts[0]
        if len(parts) > 1:
            other = parts[1]
            if _vocabulary(tokenizer) != _vocabulary(other[1]):
                raise EncoderError(f"{folder}: its two towers have different tokenizers")
            sizes = [dense.width(part[0]) for part in parts]
            if sizes[0] != sizes[1]:
                raise EncoderError(f"{folder}: its towers' vectors differ in size: {sizes}")
            model = nn.ModuleDict({"query": model, "memory": other[0]})
        encoder = cls(model, tokenizer, settings.capped(limit), device)
        try:
            for side in SIDES if encoder.two_towers else SIDES[:1]:
                encoder.encode(["probe"], side=side)
        except (TypeError, ValueError, AttributeError) as error:
            raise EncoderError(
                f"{folder}: not a text encoder ({type(parts[0][0]).__name__}: {error}); "
                "give a model that returns token vectors, such as a BERT"
            ) from error
        return encoder

    def __str__(self) -> str:
        family = "two towers of " * self.two_towers + self.tower("query").config.model_type
        about = (
            f"encoder: {family}, {self.dim} dimensions, {self.pooling} pooling, at most "
            f"{self.max_length} tokens, {self.query_prefix!r} before queries and "
            f"{self.memory_prefix!r} before memories"
        )
        return "; ".join([about, *self._notes])

    @property
    def two_towers(self) -> bool:
        """Whether queries and memories have a model each."""
        return isinstance(self.model, nn.ModuleDict)

    def tower(self, side: Side | None) -> Any:
        """The transformers model that encodes queries or memories; one for both unless split.

        Raises ValueError without a ``side`` where it matters.
        """
        if not self.two_towers:
            return self.model
        if side is None:
            raise ValueError("this encoder has two towers: say whether queries or memories")
        return self.model[side]

    def compute_as(self, config: EncoderConfig) -> None:
        """Encode in the batches and the precision that ``config`` says, from the next one on."""
        self.batch_tokens = config.batch_tokens
        self.bf16 = config.precision == "bf16"  # by autocast

    def move(self, device: str) -> None:
        """To another device, from the next batch on."""
        self.device = encoder_folder.pick_device(device)
        self.model.to(self.device)

    def replace_tower(self, side: Side, model: Any) -> None:
        """Put ``model`` where `tower` finds the one of ``side``; the only one unless split."""
        if self.two_towers:
            self.model[side] = model
        else:
            self.model = model

    def split(self) -> None:
        """Give memories a tower of their own, equal to the queries' until one is trained."""
        if not self.two_towers:
            self.model = nn.ModuleDict({"query": self.model, "memory": copy.deepcopy(self.model)})

    def tokenize_to_ids(self, texts: Sequence[str], prefix: str = "") -> list[list[int]]:
        """Token ids of ``prefix + text``, special tokens included, truncated at ``max_length``."""
        if not texts:
            return []
        rows: list[list[int]] = self.tokenizer(
            [prefix + text for text in texts],
            truncation=True,
            max_length=self.max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        # A tokenizer without special tokens leaves nothing of an empty text, and a mean of nothing.
        return [row or [self._filler] for row in rows]

    @property
    def _filler(self) -> int:
        for name in ("unk_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self.tokenizer, name, None)
            if value is not None:
                return int(value)
        return 0

    def collate(self, rows: Ragged) -> dict[str, Tensor]:
        """Token ids, padded on the right, on the encoder's device.

        Gives ``input_ids`` and ``attention_mask``, both (batch, tokens) int64.
        """
        ids, mask = rows.padded(self.tokenizer.pad_token_id or 0)
        batch = {"input_ids": ids, "attention_mask": mask}
        return {name: on_device(part, self.device) for name, part in batch.items()}

    def pack(self, rows: Ragged) -> dict[str, Tensor]:
        """Token ids without padding, for `embed` by towers that `packing.enable` has prepared."""
        return packing.collate(rows, self.device)

    def embed(self, batch: Mapping[str, Tensor], side: Side | None = None) -> Tensor:
        """Unit rows (batch, dim) float32, with gradients, of what `collate` or `pack` gives."""
        tower = self.tower(side)
        if "borders" in batch:
            hidden = packing.forward(tower, **batch)
            pooled = packing.pool(hidden, batch["borders"], self.pooling)
        else:
            mask = batch["attention_mask"]
            output = tower(input_ids=batch["input_ids"], attention_mask=mask)
            pooled = _pooled(output.last_hidden_state, mask, self.pooling)
        return functional.normalize(dense.apply(tower, pooled), dim=-1)

    def encode(
        self, texts: Sequence[str], prefix: str = "", side: Side | None = None
    ) -> np.ndarray:
        """Unit vectors (n, dim) float32 of ``prefix + text``, in the order of ``texts``.

        ``side`` must be said where queries and memories have a tower each.

        Sorted by length and cut by ``batch_tokens``; no gradients; the tower's train or eval mode
        is as before afterwards. Raises `EncoderError` where the model gives NaN or infinity.
        """
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        tower = self.tower(side)
        training = tower.training
        if training:  # each change goes through all modules
            tower.eval()
        gather = self.pack if self._packs(tower) else self.collate
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        try:
            with torch.inference_mode(), half:
                for start in range(0, len(texts), _BLOCK_TEXTS):
                    block = texts[start : start + _BLOCK_TEXTS]
                    batches = self._batches(block, prefix)
                    made = [(places, self.embed(gather(rows), side)) for places, rows in batches]
                    for places, out in made:  # a GPU is waited for once a block
                        vectors[places + start] = out.cpu().numpy()
        finally:
            if training:
                tower.train()
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise EncoderError(
                f"the encoder gave NaN or infinity for text {row} ({texts[row][:60]!r}): "
                "its weights are damaged or its training diverged; use an earlier generation"
            )
        return vectors

    def _packs(self, tower: Any) -> bool:
        # On a CPU each text has a call of its own: more than sorted texts lose by padding.
        gpu = self.bf16 and self.device.type == "cuda"
        return gpu and packing.enable([tower], self.device, half=True, dropout=False)

    def _batches(self, texts: Sequence[str], prefix: str) -> Iterator[tuple[np.ndarray, Ragged]]:
        rows = Ragged.of(self.tokenize_to_ids(texts, prefix))
        for places in map(np.array, cut_batches(rows.lengths.tolist(), self.batch_tokens)):
            yield places, rows.take(places)

    def encode_queries(self, prompts: Sequence[str]) -> np.ndarray:
        """Unit vectors (n, dim) float32 of questions."""
        return self.encode(prompts, self.query_prefix, "query")

    def encode_memories(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Unit vectors (n, dim) float32 of (prompt, answer) pairs."""
        texts = [memory_text(*pair) for pair in pairs]
        return self.encode(texts, self.memory_prefix, "memory")

    def save(self, folder: str | Path) -> None:
        """Write the sentence-transformers folder; weights as safetensors. LoRA must be merged.

        Its model card is the caller's, who knows what the encoder was made of (`card`).
        """
        settings = Settings(
            pooling=self.pooling,
            query_prefix=self.query_prefix,
            memory_prefix=self.memory_prefix,
            max_length=self.max_length,
        )
        save_parts(Path(folder), self.model, self.tokenizer, settings)

    def query_fingerprint(self) -> str:
        """Hex SHA-256 of all that decides a query's vector: equal means equal vectors."""
        return self._fingerprint("query", self.query_prefix)

    def memory_fingerprint(self) -> str:
        """Hex SHA-256 of all that decides a memory's vector: while it stays, an index stays valid.

        With one tower for both it differs from `query_fingerprint` only through the prefix. A tower
        split off keeps it until it is trained.
        """
        return self._fingerprint("memory", self.memory_prefix)

    def _fingerprint(self, side: Side, prefix: str) -> str:
        tower = self.tower(side)
        settings = {"pooling": self.pooling, "prefix": prefix, "max_length": self.max_length}
        if layers := dense.activations(tower):
            settings["dense"] = layers
        return fingerprint(tower, self.tokenizer, settings)


def _vocabulary(tokenizer: Any) -> str:
    return str(tokenizer.backend_tokenizer.to_str())
