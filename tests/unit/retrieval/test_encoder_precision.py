"""Encoding in bf16: near to float32's vectors, and what a configuration asks for serves."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memshare.config import EncoderConfig
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.searcher import Searcher
from tests.retrieving import fill, make_config, open_store, publish_now, serves
from tests.tiny import tiny_encoder


def test_bf16_is_near_and_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    texts = [f"rain and {n} cups" for n in range(40)]
    settings = {"model": str(tiny_encoder(tmp_path / "tiny", dim=64)), "device": "cpu"}
    full, half = (Encoder.load(EncoderConfig(**settings, precision=p)) for p in ("float32", "bf16"))
    want, got = full.encode(texts), half.encode(texts)
    assert got.dtype == np.float32 and not np.array_equal(got, want)
    np.testing.assert_allclose((got * got).sum(1), 1.0, atol=1e-6)
    assert (got * want).sum(1).min() > 0.999
    assert half.query_fingerprint() == full.query_fingerprint()
    half.compute_as(EncoderConfig(**settings))
    np.testing.assert_array_equal(half.encode(texts), want)


def test_a_generation_serves_in_the_configured_precision(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", tiny_encoder(tmp_path / "tiny"))
    encoder = {"precision": "bf16", "batch_tokens": 99}
    config = config.model_copy(update={"encoder": config.encoder.model_copy(update=encoder)})
    with open_store(config) as store:
        fill(store, "p", 5)
        publish_now(store, config, Encoder.load(config.encoder))
        with Searcher(store, config) as searcher:
            serves(searcher, 1)
            serving = searcher._worker.serving
            assert serving is not None
            assert (serving.encoder.bf16, serving.encoder.batch_tokens) == (True, 99)
