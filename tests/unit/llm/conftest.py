from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memshare.config import LLMConfig
from memshare.llm.hf import TransformersBackend
from tests.tiny_lm import tiny_lm


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm(tmp_path_factory.mktemp("lm") / "tiny", context=2048)


@pytest.fixture(scope="session")
def backend(lm_folder: Path) -> Iterator[TransformersBackend]:
    made = TransformersBackend(str(lm_folder), LLMConfig(batch_tokens=1024, batch_size=4))
    yield made
    made.close()
