"""Low-rank adapters (Hu et al. 2022, "LoRA") through peft, on by ``training.lora.enabled``.

peft is imported where it is needed: it takes seconds, and most runs do without.
"""

from __future__ import annotations

import torch

from memshare.config import LoRAConfig
from memshare.retrieval.encoder import SIDES, Encoder
from memshare.retrieval.encoder_format import Side
from memshare.retrieval.errors import EncoderError


def add_adapters(encoder: Encoder, side: Side, config: LoRAConfig, seed: int) -> None:
    """Freeze a tower and give it adapters whose first weights depend on ``seed`` alone.

    Raises `EncoderError` where the model has none of the modules that the configuration names.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    chosen = config.target_modules
    settings = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=chosen if isinstance(chosen, str) else list(chosen),
        bias="none",
    )
    tower = encoder.tower(side)
    try:
        encoder.replace_tower(side, get_peft_model(tower, settings))
    except ValueError as error:
        raise EncoderError(
            f"training.lora.target_modules {chosen!r} fits no module of "
            f"{type(tower).__name__}: {error}"
        ) from error


def merge_adapters(encoder: Encoder) -> None:
    """Add the adapters to the weights they belong to; the towers are plain models again."""
    for side in SIDES:
        tower = encoder.tower(side)
        if hasattr(tower, "merge_and_unload"):  # a PeftModel
            encoder.replace_tower(side, tower.merge_and_unload())
