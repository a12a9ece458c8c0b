"""Models load in several threads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import PreTrainedModel

from memshare.retrieval.encoder import Encoder
from tests.tiny import tiny_encoder


def test_threads_that_load_models_leave_transformers_and_torch_as_they_were(
    tmp_path: Path,
) -> None:
    folder = tiny_encoder(tmp_path / "tiny")
    before = PreTrainedModel.tie_weights, torch.nn.init.normal_, torch.get_default_dtype()
    with ThreadPoolExecutor(4) as threads:
        vectors = list(
            threads.map(
                lambda _: Encoder.from_folder(folder, device="cpu").encode(["a"]), range(40)
            )
        )
    after = PreTrainedModel.tie_weights, torch.nn.init.normal_, torch.get_default_dtype()
    assert after == before
    assert all((found == vectors[0]).all() for found in vectors)
