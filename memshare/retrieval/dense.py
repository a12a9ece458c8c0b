"""Dense layers between pooling and unit vector, as LaBSE, GTR and EmbeddingGemma have them.

A tower's are a module of its own, beside the transformers model's: so they move, learn, are
adapted, divided, hashed and checkpointed with it. Saved they are sentence-transformers' modules.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memshare.files import write_json
from memshare.retrieval.errors import EncoderError

_NAME = "dense_after_pooling"
_TANH = "torch.nn.modules.activation.Tanh"  # where its file names none
_ACTIVATIONS = {
    f"{kind.__module__}.{kind.__qualname__}": kind
    for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)
}


class Dense(nn.Module):
    """A linear layer and what follows it."""

    def __init__(self, linear: nn.Linear, activation: nn.Module) -> None:
        """``linear``'s weights may be put in later."""
        super().__init__()
        self.linear = linear
        self.activation = activation

    def forward(self, vectors: Tensor) -> Tensor:
        """(batch, width) to (batch, another width)."""
        found: Tensor = self.activation(self.linear(vectors))
        return found


def attach(tower: Any, folders: Sequence[Path]) -> None:
    """Give a transformers model the layers of these folders. Raises `EncoderError`."""
    if not folders:
        return
    layers = [_load(folder) for folder in folders]
    widths = [int(tower.config.hidden_size), *(layer.linear.out_features for layer in layers)]
    for folder, layer, width in zip(folders, layers, widths, strict=False):
        if layer.linear.in_features != width:
            raise EncoderError(
                f"{folder}: takes {layer.linear.in_features} numbers, and there are {width}"
            )
    tower.add_module(_NAME, nn.Sequential(*layers))


def of(tower: Any) -> Sequence[Dense]:
    """A tower's layers, adapted or not; none as a rule."""
    return getattr(tower, _NAME, ())


def apply(tower: Any, vectors: Tensor) -> Tensor:
    """Pooled vectors (batch, hidden width) through a tower's layers, (batch, `width`)."""
    for layer in of(tower):
        vectors = layer(vectors)
    return vectors.float()


def width(tower: Any) -> int:
    """Of the vectors that a tower gives."""
    layers = of(tower)
    return int(layers[-1].linear.out_features if layers else tower.config.hidden_size)


def activations(tower: Any) -> list[str]:
    """Their names, layer by layer: all that a tower's weights don't say of its layers."""
    return [_name(layer) for layer in of(tower)]


def bare_state(tower: Any) -> dict[str, Tensor]:
    """The weights of the transformers model alone."""
    return {k: v for k, v in tower.state_dict().items() if not k.startswith(f"{_NAME}.")}


def save(layer: Dense, folder: Path) -> None:
    """Write one layer as sentence-transformers' module."""
    linear = layer.linear
    config = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
        "activation_function": _name(layer),
    }
    write_json(folder / "config.json", config)
    weights = {
        name: value.detach().cpu().contiguous() for name, value in linear.state_dict().items()
    }
    save_file({f"linear.{k}": v for k, v in weights.items()}, folder / "model.safetensors")


def _name(layer: Dense) -> str:
    kind = type(layer.activation)
    return f"{kind.__module__}.{kind.__qualname__}"


def _load(folder: Path) -> Dense:
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise EncoderError(
            f"{folder}: no weights as safetensors (pickled .bin files are never read); load and "
            "save the model with sentence-transformers"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        linear = nn.Linear(config["in_features"], config["out_features"], config.get("bias", True))
        name = config.get("activation_function", _TANH)
        layer = Dense(linear, _ACTIVATIONS.get(name, nn.Identity)())
        layer.load_state_dict(load_file(weights))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise EncoderError(
            f"{folder}: can't be loaded as a Dense module ({type(error).__name__}: {error})"
        ) from error
    if name not in _ACTIVATIONS or config.get("use_residual"):
        residual = " with use_residual" if config.get("use_residual") else ""
        raise EncoderError(
            f"{folder}: its activation_function is {name}{residual}; known, without it, are "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return layer.float()
