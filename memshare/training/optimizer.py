"""AdamW (Loshchilov & Hutter 2019), the learning-rate schedule, and their state by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from memshare.config import TrainingConfig

_MOMENT = "/exp_avg"
_LEAST_SHARE = 0.1  # of `training.lr`, so that a loop that runs for months still learns


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters; vectors (biases, norms) without weight decay."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [(n, p) for n, p in trainable if p.ndim > 1],
            "weight_decay": config.weight_decay,
        },
        {"params": [(n, p) for n, p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, fused=True)


def round_lr(config: TrainingConfig, number: int) -> float:
    """The peak learning rate of continual round ``number`` (1, 2, ...)."""
    return config.lr * max(_LEAST_SHARE, config.round_lr_decay ** (number - 1))


def lr_factor(
    step: int, total: int, warmup_ratio: float, schedule: Literal["linear", "cosine"]
) -> float:
    """Share of the peak learning rate at ``step`` (0, 1, ...) of ``total``.

    Rises linearly over the first ``warmup_ratio`` of the steps, then falls to 0 at ``total``.
    """
    warmup = round(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    return left if schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))


def update(optimizer: torch.optim.Optimizer, lr: float, max_norm: float | None) -> float:
    """One optimizer step on gradients clipped to ``max_norm``, if any; returns their norm before.

    Nothing is changed where the norm is not finite. The gradients are gone afterwards.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    most = math.inf if max_norm is None else max_norm
    norm = float(whole(nn.utils.clip_grad_norm_(parameters, most)))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def state_tensors(optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Tensor]:
    """The optimizer's state as ``parameter name/entry`` -> tensor on the CPU; AdamW's are tensors.

    Where it is divided over processes, all of them must ask, and each has one whole tensor at a
    time; who does not ``keep`` them gets none.
    """
    found: dict[str, Tensor] = {}
    for name, param in _named(optimizer).items():
        for entry, value in optimizer.state.get(param, {}).items():
            tensor = whole(value.detach())
            if keep:
                found[f"{name}/{entry}"] = tensor.cpu().contiguous()
            del tensor  # before the next one is gathered
    return found


def warm_start(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> int:
    """Take over what `state_tensors` gave of an earlier run, for parameters that are the same.

    The same are those of equal name and shape; all others start without a past. Returns how many
    there were.
    """
    shapes = {name: param.shape for name, param in _named(optimizer).items()}
    moments = [key for key in tensors if key.endswith(_MOMENT)]
    named = {key.removesuffix(_MOMENT): tensors[key].shape for key in moments}
    same = {name for name, shape in named.items() if shapes.get(name) == shape}
    kept = (key for key in tensors if key.rpartition("/")[0] in same)
    load_state_tensors(optimizer, ((key, tensors[key]) for key in kept))
    return len(same)


def load_state_tensors(
    optimizer: torch.optim.Optimizer, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Put back what `state_tensors` gave, one after the other.

    Copies them: they may be a file, mapped, which is deleted one day. Raises `KeyError` for a
    parameter that is not there.
    """
    params = _named(optimizer)
    for key, value in tensors:
        name, _, entry = key.rpartition("/")
        param = params[name]
        value = like(value, param) if value.ndim else value.to(param.device)
        optimizer.state[param][entry] = value.clone()


def like(value: Tensor, param: Tensor) -> Tensor:
    """``value``, which every process has whole, where and as ``param`` is: whole, or its share."""
    value = value.to(param.device)
    if not isinstance(param, DTensor):
        return value
    return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)


def whole(value: Tensor) -> Tensor:
    """All of a tensor of which this process may have a share; then all processes must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _named(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters by name: those that it updates, which may be shares of the model's."""
    return {
        name: param
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }
