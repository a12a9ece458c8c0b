"""What the configurations for GPUs make the trainer choose there; no GPU is needed to ask."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands import launch
from transformers import BertConfig, BertModel

from memshare.config import ConfigError, ContinualConfig, load_config
from memshare.retrieval import packing
from memshare.training import child, gather, precision
from memshare.training.child import accelerate_command

ROOT = Path(__file__).parents[3]
GPU_CONFIGS = ("h200.yaml", "cluster.yaml")


def mixed_precision(command: list[str]) -> str:
    """What accelerate's launcher tells the programs that ``command`` starts."""
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    args = launch.launch_command_parser().parse_args([*command[3:], "program.py"])
    args, _, _ = launch._validate_launch_command(args)
    if args.multi_gpu:
        return str(launch.prepare_multi_gpu_env(args)["ACCELERATE_MIXED_PRECISION"])
    return str(launch.prepare_simple_launcher_cmd_env(args)[1]["ACCELERATE_MIXED_PRECISION"])


@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_the_loop_trains_in_bf16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # whose configs/accelerate they name
    config = load_config(ROOT / "configs" / name)
    assert mixed_precision(accelerate_command(config.continual)) == "bf16"


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("found", [None, "no", "bf16"])
def test_without_a_configuration_the_loop_trains_in_what_the_gpu_is_made_for(
    monkeypatch: pytest.MonkeyPatch, processes: int, found: str | None
) -> None:
    monkeypatch.setattr(child, "gpu_precision", lambda: found)
    command = accelerate_command(ContinualConfig(num_processes=processes))
    assert command[command.index("--mixed_precision") + 1] == (found or "no")
    assert ("--cpu" in command) == (found is None and processes == 1)


@pytest.mark.parametrize(("gpu", "bf16", "wanted"), [
    (False, True, None), (True, False, "no"), (True, True, "bf16"),
])  # fmt: skip
def test_bf16_is_preferred_where_a_gpu_has_it(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, bf16: bool, wanted: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert precision.preferred() == wanted


def test_the_loop_is_told_what_torch_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert child.gpu_precision() == precision.preferred()
    monkeypatch.setattr(child.ctypes, "CDLL", lambda name: None)  # as where there is a driver
    assert child.gpu_precision() == precision.preferred()


class Driver:
    """CUDA's, with so many GPUs; ``failure``: what its start gives."""

    def __init__(self, count: int, failure: int = 0) -> None:
        self._count, self._failure = count, failure

    def cuInit(self, flags: int) -> int:
        return self._failure

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._count
        return 0


def test_gpus_that_torch_cannot_use_are_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for driver in (Driver(0), Driver(8, failure=100), None):  # None: no driver at all
        monkeypatch.setattr(precision.ctypes, "CDLL", lambda name, driver=driver: driver)
        precision.check_driver()
    monkeypatch.setattr(precision.ctypes, "CDLL", lambda name: Driver(8))
    with pytest.raises(ConfigError, match=r"has 8 GPUs, and torch .* can't use them"):
        gather.launch()
    with pytest.raises(ConfigError, match="has 8 GPUs"):
        precision.preferred()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    precision.check_driver()


def test_the_loop_does_not_start_with_gpus_that_torch_cannot_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(child.ctypes, "CDLL", lambda name: None)  # there is a driver
    fails = [sys.executable, "-c", "import sys; sys.exit('error: it has 8 GPUs')"]
    run = subprocess.run
    monkeypatch.setattr(child.subprocess, "run", lambda command, **how: run(fails, **how))
    with pytest.raises(ConfigError, match=r"^it has 8 GPUs$"):
        child.check_launch(ContinualConfig())


def test_more_processes_than_gpus_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first training would find out, once a round is mined."""
    monkeypatch.setattr(child, "gpu_precision", lambda: "bf16")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    two, on_cpu = (ROOT / "configs/accelerate" / name for name in ("loop.yaml", "cpu2.yaml"))
    with pytest.raises(ConfigError, match=r"^continual\.num_processes: 2 processes, and 1 GPU"):
        child.check_launch(ContinualConfig(num_processes=2))
    with pytest.raises(ConfigError, match=r"^continual\.accelerate_config: 2 processes, and 1 GPU"):
        child.check_launch(ContinualConfig(accelerate_config=two))
    child.check_launch(ContinualConfig(accelerate_config=two, num_processes=1))
    child.check_launch(ContinualConfig(accelerate_config=on_cpu))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    child.check_launch(ContinualConfig(accelerate_config=two))
    with monkeypatch.context() as patch:
        patch.setattr(child, "visible_gpus", list)  # as without nvidia-smi, or with AMD's
        child.check_launch(ContinualConfig(num_processes=4))
    monkeypatch.setattr(child, "gpu_precision", lambda: None)
    child.check_launch(ContinualConfig(num_processes=4))


def test_a_configuration_of_accelerates_that_can_not_be_read_is_told_at_the_start(
    tmp_path: Path,
) -> None:
    path = tmp_path / "own.yaml"
    for content in (b"num_processes: [", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"^continual\.accelerate_config: {path}: "):
            child.check_launch(ContinualConfig(accelerate_config=path))


def test_float32_on_a_gpu_is_told_with_the_way_to_bf16() -> None:
    assert precision.described(False, "cpu") == "float32"
    assert precision.described(True, "cuda") == "bf16 autocast over float32 weights"
    told = precision.described(False, "cuda")
    assert told.startswith("float32, though on a GPU") and "--mixed_precision bf16" in told
    for name in re.findall(r"\w+\.yaml", told):
        config = yaml.safe_load((ROOT / "configs/accelerate" / name).read_text())
        assert config["mixed_precision"] == "bf16" and config["use_cpu"] is False


def test_precision_is_read_from_autocast() -> None:
    def autocast(dtype: torch.dtype) -> precision.Autocast:
        return lambda: torch.autocast("cpu", dtype)

    assert precision.in_bf16(autocast(torch.bfloat16), "cpu")
    assert not precision.in_bf16(autocast(torch.float16), "cpu")
    assert not precision.in_bf16(nullcontext, "cpu")


@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_texts_are_packed_on_a_gpu(name: str) -> None:
    config = load_config(ROOT / "configs" / name)
    assert config.encoder.model == "BAAI/bge-base-en-v1.5"  # a BERT-base, its dropouts the class's
    small = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    assert small.attention_probs_dropout_prob > 0
    dropout = config.training.dropout
    cuda = torch.device("cuda")
    assert packing.enable([BertModel(small)], cuda, half=True, dropout=dropout)
    # Not in single precision, for which the GPU has no such kernel.
    assert not packing.enable([BertModel(small)], cuda, half=False, dropout=dropout)
