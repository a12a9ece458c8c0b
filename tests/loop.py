"""The whole loop on tiny real parts: a random encoder, a random chat model, SQLite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from memshare.config import Config, load_config
from tests.tiny import tiny_encoder
from tests.tiny_lm import tiny_lm


def loop_settings(run_dir: Path, models: Path, **sections: Any) -> dict[str, Any]:
    """A configuration tree. ``models``: a folder for the models, which are made once.

    Pools by what the likelihood scorer does with a random model's answers: ``keep`` stores all of
    them, ``strict`` none.
    """
    encoder, lm = models / "encoder", models / "lm"
    if not encoder.exists():
        tiny_encoder(encoder)
    if not lm.exists():
        tiny_lm(lm)
    llm = {"backend": "transformers", "model": str(lm), "device": "cpu"}
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir)},
        "pools": {"keep": {"threshold": 0}, "strict": {"threshold": 100}},
        "encoder": {"model": str(encoder), "device": "cpu", "max_length": 64},
        "retriever": {"poll_seconds": 0.05, "gpu": "off"},
        "agent_llm": llm,
        "scorer_llm": llm,
        "agent": {"max_tokens": 8, "shots": 2},
        "scorer": {"kind": "likelihood"},
        "gateway": {"default_pool": "keep", "shutdown_seconds": 20},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return tree


def loop_config_file(run_dir: Path, models: Path, **sections: Any) -> Path:
    """`loop_settings` as a YAML file in ``run_dir``."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "config.yaml"
    path.write_text(yaml.safe_dump(loop_settings(run_dir, models, **sections)), encoding="utf-8")
    return path


def loop_config(run_dir: Path, models: Path, **sections: Any) -> Config:
    """`loop_settings`, loaded."""
    return load_config(loop_config_file(run_dir, models, **sections))
