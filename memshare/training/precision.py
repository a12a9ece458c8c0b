"""Which precision a training computes in: bf16 autocast over float32 weights, or float32.

Weights, gradients and the optimizer's state are float32 either way; accelerate says which it is.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from memshare.config import ConfigError

Autocast = Callable[[], AbstractContextManager[object]]  # an `Accelerator.autocast`


def check_driver() -> None:
    """Raise `ConfigError` where there are GPUs and torch can't use them, as with an old driver.

    Nobody wants what would come of it, days of training on the CPU.
    """
    if torch.cuda.is_available():
        return
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):  # no driver, or something else of that name
        return
    if not failed and count.value:
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise ConfigError(
            f"this machine's driver has {count.value} GPUs, and torch {torch.__version__}, built "
            f"{build}, can't use them: install a newer driver, or the torch that fits this one "
            "(PyTorch has builds for older ones); to use the CPU, set CUDA_VISIBLE_DEVICES="
        )


def preferred() -> str | None:
    """For accelerate's ``--mixed_precision``: bf16 where the GPU computes in it; None without one.

    ``python -m memshare.training.precision`` prints it. Raises `ConfigError` as `check_driver`.
    """
    check_driver()
    if not torch.cuda.is_available():
        return None
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def in_bf16(autocast: Autocast, kind: str) -> bool:
    """Whether ``autocast`` has devices of this ``kind`` compute in bf16."""
    with autocast():
        return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


def described(bf16: bool, kind: str) -> str:
    """For people; of float32 on a GPU, which few want and accelerate chooses, the way to bf16."""
    if bf16:
        return "bf16 autocast over float32 weights"
    if kind != "cuda":
        return "float32"
    return (
        "float32, though on a GPU (for bf16 autocast over float32 weights: accelerate launch "
        "--mixed_precision bf16, or --config_file configs/accelerate/gpu.yaml, or ddp.yaml there "
        "for several GPUs)"
    )


if __name__ == "__main__":
    try:
        print(preferred() or "")
    except ConfigError as error:
        sys.exit(f"error: {error}")
