"""Tiny random encoders for tests: a real BERT, a real T5, with a real tokenizer."""

from __future__ import annotations

import string
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from memshare.retrieval.encoder import Encoder
from memshare.retrieval.encoder_format import Pooling, Settings
from memshare.retrieval.ragged import Ragged

MAX_POSITIONS = 128


def _tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over letters, letter pairs, digits and punctuation; anything else is [UNK]."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    alphabet = string.ascii_lowercase + string.digits
    pairs = ["".join(pair) for pair in product(string.ascii_lowercase, repeat=2)]
    pieces += [*alphabet, *pairs, *string.punctuation]
    pieces += [f"##{piece}" for piece in (*alphabet, *pairs)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def lists(rows: Ragged) -> list[list[int]]:
    """The token ids of each text."""
    return [row.tolist() for row in np.split(rows.ids, rows.lengths.cumsum()[:-1])]


def tiny_encoder(
    folder: Path,
    seed: int = 0,
    dim: int = 32,
    *,
    pooling: Pooling = "mean",
    query_prefix: str = "",
    memory_prefix: str = "",
    max_length: int = 64,
) -> Path:
    """Write a two-layer BERT with weights from ``seed`` as a sentence-transformers folder.

    Its word vectors outweigh the rest, so texts that share words are near each other. Global
    random state is left as it was.
    """
    tokenizer = _tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * dim,
        max_position_embeddings=MAX_POSITIONS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(config, add_pooling_layer=False)
        with torch.no_grad():
            model.embeddings.word_embeddings.weight.mul_(10)
    settings = Settings(
        pooling=pooling,
        query_prefix=query_prefix,
        memory_prefix=memory_prefix,
        max_length=max_length,
    )
    Encoder(model, tokenizer, settings, device="cpu").save(folder)
    return folder


def tiny_decoder(folder: Path) -> Path:
    """Write a two-layer Qwen3 whose last token's vector is the text's."""
    tokenizer = _tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3Model(config)
    settings = Settings(max_length=64, pooling="lasttoken")
    Encoder(model, tokenizer, settings, device="cpu").save(folder)
    return folder


def tiny_t5(folder: Path) -> Path:
    """Write the encoder half of a two-layer T5, whose layers are lists of modules themselves."""
    tokenizer = _tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5EncoderModel(config)
    Encoder(model, tokenizer, Settings(max_length=64), device="cpu").save(folder)
    return folder
