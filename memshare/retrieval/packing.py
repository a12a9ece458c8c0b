"""Batches without padding: texts one after another in a single row, attention within each of them.

Every layer of an encoder but attention treats each token on its own, so a batch of texts can be one
long row whose positions start anew with each text ("unpadded" or padding-free training: Zeng et al.
2022, "Boosting Distributed Training Performance of the Unpadded BERT Model"). Attention is torch's
variable-length flash kernel on a GPU in half precision, and one call a text elsewhere: the same
mathematics without a mask.

It takes the place of a model's attention through transformers' registry. Calls that bring no
lengths are SDPA's, mask and all, so a model that can be packed can still be padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from memshare.retrieval.ragged import Ragged, on_device

NAME = "memshare_packed"
# Families that count positions by `position_ids`, looked up in a table or rotated by, and that hand
# what they are called with down to attention. Relative positions would run over texts' borders.
_DECODERS = frozenset({"qwen2", "qwen3"})
_ROTARY = frozenset({"modernbert"}) | _DECODERS
_FAMILIES = frozenset({"bert", "roberta", "xlm-roberta", "camembert"}) | _ROTARY
_HALF = (torch.bfloat16, torch.float16)


def possible(models: Sequence[Any], device: torch.device, *, half: bool, dropout: bool) -> bool:
    """Whether all of these transformers models can take packed texts.

    ``half``: they run in half precision, which is what the GPU's kernel is for. ``dropout``: what
    their configurations say of it is heeded; attention within texts has none.
    """
    if any(model.config.model_type not in _FAMILIES for model in models):
        return False
    if not all(getattr(model, "_supports_attention_backend", False) for model in models):
        return False  # as ModernBERT in earlier versions of transformers
    # A decoder that its configuration makes see both ways: its layers don't say so.
    if any(getattr(model.config, "is_causal", None) is False for model in models):
        return False
    if dropout and any(attention_dropout(model.config) for model in models):
        return False
    return device.type != "cuda" or half


def enable(models: Sequence[Any], device: torch.device, *, half: bool, dropout: bool) -> bool:
    """Give transformers models attention that takes packed texts; False where not `possible`."""
    if not possible(models, device, half=half, dropout=dropout):
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for model in models:
        if model.config._attn_implementation != NAME:  # asked before every few queries
            model.set_attn_implementation(NAME)
    return True


def attention_dropout(config: Any) -> float:
    """What a transformers configuration says of attention weights' dropout; 0.1 if nothing."""
    older = getattr(config, "attention_probs_dropout_prob", 0.1)  # BERT's name for it
    return float(getattr(config, "attention_dropout", older))


def forward(model: Any, ids: Tensor, positions: Tensor, lengths: Tensor, borders: Tensor) -> Tensor:
    """Token vectors (tokens, dim) of texts that follow each other.

    ``ids`` and ``positions`` (1, tokens) int64 on the model's device, positions from 0 in each
    text; ``lengths`` (texts,) int64 on the CPU, ``borders`` (texts + 1,) int32 their running sum on
    the device. The model must have been given to `enable`.
    """
    how: dict[str, Any] = {"text_lengths": lengths, "text_borders": borders}
    if model.config.model_type in _ROTARY:
        # No masks: theirs would be of all tokens by all tokens, and keep apart what is apart.
        how["attention_mask"] = dict.fromkeys(("full_attention", "sliding_attention"))
        if model.config.model_type in _DECODERS:
            how["use_cache"] = False  # keys and values that nobody reads on from
    elif (padding := model.embeddings.position_embeddings.padding_idx) is not None:
        positions = _counted(ids, borders, padding)
    output = model(input_ids=ids, position_ids=positions, **how)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def _counted(ids: Tensor, borders: Tensor, padding: int) -> Tensor:
    """Positions (1, tokens) as RoBERTa and its kin count them: from ``padding`` + 1 in each text.

    A token that is ``padding`` itself, which a text may contain, has that position and no other.
    """
    real = (ids != padding).long()
    seen = real.cumsum(dim=1)
    before = (seen - real)[0].index_select(0, borders[:-1])
    # With the size told, nobody waits for a GPU to add it up.
    skipped = before.repeat_interleave(borders.diff(), output_size=ids.shape[1])
    return (seen - skipped) * real + padding


@torch.compiler.disable  # type: ignore[untyped-decorator]  # its loop is as long as the batch has texts: nothing to compile
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    text_lengths: Tensor | None = None,
    text_borders: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, within texts where their lengths are given.

    ``query``, ``key`` and ``value`` are (1, heads, tokens, width), of the last two fewer heads
    where queries share them; returns (1, tokens, heads, width). ``text_borders`` (texts + 1,) int32
    are the lengths' running sum on the device. ``sliding_window``: a token sees those that are
    fewer than so many away. In a decoder (``module.is_causal``) it sees none that follow.
    """
    if text_lengths is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return result
    if value.dtype in _HALF:  # under autocast, rotating has left the other two in float32
        query, key = query.to(value.dtype), key.to(value.dtype)
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    causal = bool(getattr(module, "is_causal", False))
    back = -1 if sliding_window is None else sliding_window - 1
    window = (back, 0 if causal else back)  # how far a token sees, back and ahead; -1: all
    if text_borders is not None and query.is_cuda and query.dtype in _HALF and dropout == 0.0:
        return _flash(query, key, value, text_lengths, text_borders, scaling, window), None
    sizes = text_lengths.tolist()
    # Cut where a text's tokens lie together in memory: so do their gradients then, and putting
    # those together again is one plain copy, which the layers before take as it is.
    by_token = (torch.split(x.transpose(1, 2), sizes, dim=1) for x in (query, key, value))
    found = []
    for size, text in zip(sizes, zip(*by_token, strict=True), strict=True):
        q, k, v = (x.transpose(1, 2) for x in text)
        far = 0 <= back < size - 1
        seen = _band(size, window, query.device) if far else None
        weighed = scaled_dot_product_attention(
            q, k, v, attn_mask=seen, dropout_p=dropout, scale=scaling, is_causal=causal and not far
        )
        found.append(weighed.transpose(1, 2))
    return torch.cat(found, dim=1), None


def _band(size: int, window: tuple[int, int], device: torch.device) -> Tensor:
    """Which of ``size`` tokens (column) each of them (row) sees."""
    back, ahead = window
    seen = torch.ones(size, size, dtype=torch.bool, device=device)
    return seen.tril(ahead).triu(-back)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    borders: Tensor,
    scaling: float | None,
    window: tuple[int, int],
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, width)
    most = int(lengths.max())
    found = varlen_attn(q, k, v, borders, borders, most, most, scale=scaling, window_size=window)
    assert isinstance(found, Tensor)  # a pair only where more is asked for
    return found.unsqueeze(0)


def pool(hidden: Tensor, borders: Tensor, pooling: str) -> Tensor:
    """One float32 vector (texts, dim) a text, of token vectors (tokens, dim).

    The mean of its tokens, its first one (``cls``) or its last (``lasttoken``).
    """
    if pooling != "mean":
        at = borders[:-1] if pooling == "cls" else borders[1:] - 1
        return hidden.index_select(0, at).float()
    # Unsafe: unchecked. A check would have the CPU wait for all that the GPU has to do before.
    sizes = borders.diff().long()
    return torch.segment_reduce(hidden.float(), "mean", lengths=sizes, axis=0, unsafe=True)


def collate(rows: Ragged, device: torch.device) -> dict[str, Tensor]:
    """Token ids of texts as `forward` takes them."""
    borders = np.concatenate([[0], rows.lengths.cumsum()])
    positions = np.arange(len(rows.ids)) - np.repeat(borders[:-1], rows.lengths)
    return {
        "ids": on_device(rows.ids.astype(np.int64)[None], device),
        "positions": on_device(positions[None], device),
        "lengths": torch.from_numpy(rows.lengths),
        "borders": on_device(borders.astype(np.int32), device),
    }
