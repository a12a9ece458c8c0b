from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from memshare.config import LLMConfig
from memshare.llm.base import LLMError
from memshare.llm.factory import make_llm, model_identity, resolve_model
from memshare.llm.vllm import VLLMBackend
from tests.tiny_lm import tiny_lm


def test_missing_folders_are_named(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "./none", "runs/a/none"):
        with pytest.raises(LLMError, match="none"):
            resolve_model(name)
    with pytest.raises(LLMError, match=r"config\.json"):
        resolve_model(str(tmp_path))
    assert resolve_model("some/hub-name") == "some/hub-name"


def test_pocket_says_how_to_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MEMSHARE_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(LLMError, match=r"train/pocket_lm\.py"):
        resolve_model("pocket")


def test_identity_follows_the_content(lm_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / lm_folder.name
    shutil.copytree(lm_folder, copy)
    assert model_identity(str(copy)) == model_identity(str(lm_folder))
    other = tiny_lm(tmp_path / "b" / lm_folder.name, seed=1, context=2048)
    assert model_identity(str(other)) != model_identity(str(lm_folder))
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert model_identity(str(copy)) != model_identity(str(lm_folder))
    assert model_identity("some/hub-name") == "some/hub-name"


def test_vllm_backend_starts_nothing(lm_folder: Path) -> None:
    llm = make_llm(LLMConfig(backend="vllm", model=str(lm_folder), url="http://127.0.0.1:9"))
    assert isinstance(llm, VLLMBackend)
    assert llm.count_tokens([{"role": "user", "content": "x"}]) > 3
    with pytest.raises(LLMError, match="URL"):
        make_llm(LLMConfig(backend="vllm", model=str(lm_folder), url="127.0.0.1"))
