"""Training speed on a GPU, side by side with sentence-transformers' trainer; encoding speed too.

A BERT-base with random weights, the triplets of train_speed.py, bf16 autocast, dropout off, global
batches of 512, 4,096 and 16,384 queries. Ours: texts without padding, graphs kept at 512 (direct
steps) and gradients cached at all sizes; all of it then also with ``training.compile``
(``_compiled``), compiled before the clock starts; where torch can't compile, the report says why
and makes no such claims. The peer: its cached loss, which is the only one that such batches fit, by
FlashAttention-2 where that is installed (it then leaves padding out as well), else SDPA; which one
is in the report. Each runs once to warm up before it is timed.

Claims: ``speedup_b<N>``, our real tokens a second over the peer's, both caching gradients;
``mfu_direct`` and ``mfu_cached``, model FLOPs (memshare/training/flops.py: neither padding nor the
second forward pass counts) over the GPU's dense bf16 peak, in the steps at 512 and at the largest
batch, where the GPU's peak is known; ``peak_memory_growth``, peak bytes at the largest batch over
those at the one before; ``encode_docs_per_second`` with ``encoder.precision: bf16``, and
(``_float32``) as it is by default.

Without a CUDA GPU it refuses. ``--quick --device cpu`` runs the same code on a tiny model, which
shows that it works and nothing else.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import parser, write_claims
from torch._dynamo.exc import TorchDynamoException
from trainers import LR, MAX_TOKENS, Run, Setup, Triplet, ours_once, theirs_once, triplets
from transformers import BertConfig, BertModel
from transformers.utils import is_flash_attn_2_available

from memshare.config import EncoderConfig, TrainingConfig
from memshare.progress import log
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.encoder_format import Settings

TOKENIZER_OF = "all-MiniLM-L6-v2"
STEPS = {512: 16, 4096: 4, 16384: 2}  # of a timed run, by global batch
BATCH_TOKENS = 65536  # ours: of a micro-batch
MINI_BATCHES = (64, 256, 1024)  # the peer's, tried at the smallest batch
DOCS = 65536
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128}  # fmt: skip


def new_encoder(folder: Path, shape: dict[str, int], seed: int) -> None:
    """Write an encoder with random weights, of BERT-base's shape but for what ``shape`` says."""
    tokenizer = Encoder.load(EncoderConfig(model=TOKENIZER_OF, device="cpu")).tokenizer
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(tokenizer), **shape)
    model = BertModel(config, add_pooling_layer=False)
    Encoder(model, tokenizer, Settings(max_length=MAX_TOKENS), device="cpu").save(folder)


def settings(batch: int, budget: int, *, cached: bool, compiled: bool) -> TrainingConfig:
    """Ours, with every micro-batch encoded twice, or every graph kept."""
    return TrainingConfig(
        batch_size=batch, dropout=False, lr=LR, batch_tokens=budget, compile=compiled,
        graph_tokens=0 if cached else 10**9,
    )  # fmt: skip


def warm(run: Any, *args: Any) -> Run:
    """The second of two runs; what the first one left is given back before."""
    run(*args)
    gc.collect()
    result: Run = run(*args)
    return result


def figures(run: Run, tokens: int) -> dict[str, float | None]:
    """A run as the report tells it."""
    return {
        "seconds": run.seconds,
        "tokens_per_second": tokens / run.seconds,
        "model_tflops_per_second": run.flops / run.step_seconds / 1e12 if run.flops else None,
        "mfu": mfu(run),
        "peak_bytes": run.peak_bytes,
    }


def mfu(run: Run) -> float | None:
    """Model FLOPs utilisation of a run's steps; None where the peak is not known."""
    return run.flops / run.step_seconds / run.peak_flops if run.peak_flops else None


def known(name: str, value: float | None) -> dict[str, float]:
    """A claim that can be made, or none."""
    return {} if value is None else {name: value}


def fastest(setup: Setup, rows: Sequence[Triplet], sizes: Sequence[int]) -> tuple[int, Any]:
    """The peer's mini-batch size that trains ``rows`` fastest, and the seconds of each."""
    tried: dict[int, float] = {}
    for size in sizes:
        try:
            tried[size] = warm(theirs_once, setup, rows, len(rows), size).seconds
        except torch.cuda.OutOfMemoryError:
            log(f"sentence-transformers: mini-batches of {size} do not fit")
    if not tried:
        sys.exit("error: the peer fits none of its mini-batch sizes")
    return min(tried, key=lambda size: tried[size]), tried


def encode_rate(setup: Setup, rows: Sequence[Triplet], budget: int, precision: str) -> float:
    """Documents a second, from text to vectors in memory."""
    encoder = setup.encoder(batch_tokens=budget, precision=precision)
    texts = [positive for _, positive, _ in rows]
    encoder.encode(texts[:512])
    began = time.perf_counter()
    encoder.encode(texts)
    return len(texts) / (time.perf_counter() - began)


def ours(
    setup: Setup, rows: Sequence[Triplet], batch: int, budget: int, *, direct: bool, compiled: bool
) -> dict[str, Run]:
    """Our runs at one batch size: gradients cached, and, ``direct``, graphs kept."""
    kinds = {"ours": True, "ours_direct": False} if direct else {"ours": True}
    return {
        name: warm(
            ours_once, setup, rows, settings(batch, budget, cached=cached, compiled=compiled)
        )
        for name, cached in kinds.items()
    }


def measure(setup: Setup, seed: int, sizes: dict[str, Any]) -> tuple[dict[str, float], Any]:
    """Claims, and what they were made of."""
    claims: dict[str, float] = {}
    details: dict[str, Any] = {}
    budget, steps = sizes["batch_tokens"], sizes["steps"]
    words, batches = setup.encoder(), list(steps)
    most = max(batch * count for batch, count in steps.items())
    rows = triplets(words, most, seed, sizes["middle"])
    mini, tried = fastest(setup, rows[: batches[0]], sizes["mini_batches"])
    details["peer_seconds_by_mini_batch"], details["peer_mini_batch"] = tried, mini
    peers: dict[int, Run] = {}

    def measure_batch(batch: int, *, compiled: bool) -> None:
        name, some = "_compiled" if compiled else "", rows[: batch * steps[batch]]
        runs = ours(setup, some, batch, budget, direct=batch == batches[0], compiled=compiled)
        if batch not in peers:
            peers[batch] = warm(theirs_once, setup, some, batch, mini)
            details[f"batch_{batch}"] = {"peer": figures(peers[batch], runs["ours"].tokens)}
        found = {kind + name: figures(run, run.tokens) for kind, run in runs.items()}
        details[f"batch_{batch}"] |= found
        claims[f"speedup_b{batch}{name}"] = peers[batch].seconds / runs["ours"].seconds
        if batch == batches[0]:
            claims.update(known("mfu_direct" + name, mfu(runs["ours_direct"])))
        if batch == batches[-1]:
            claims.update(known("mfu_cached" + name, mfu(runs["ours"])))
        log(f"batch {batch}: {details[f'batch_{batch}']}")

    for batch in batches:
        measure_batch(batch, compiled=False)
    peaks = [details[f"batch_{batch}"]["ours"]["peak_bytes"] for batch in batches[-2:]]
    if peaks[0]:
        claims["peak_memory_growth"] = peaks[1] / peaks[0]
    docs = triplets(words, sizes["docs"], seed, sizes["middle"])
    for precision, name in (("bf16", ""), ("float32", "_float32")):
        claims["encode_docs_per_second" + name] = encode_rate(setup, docs, budget, precision)
    log(f"without compiling: {claims}")
    try:
        for batch in batches:
            measure_batch(batch, compiled=True)
    except TorchDynamoException as fault:  # an option of ours: what was measured without it stands
        details["compile_failed"] = f"{type(fault).__name__}: {fault}"
        log(f"torch.compile: {details['compile_failed']}")
    return claims, details


def main() -> None:
    """Measure and report."""
    make = parser(__doc__)
    make.add_argument("--device", default="cuda", help="cuda, or cpu with --quick")
    args = make.parse_args()
    cuda = torch.device(args.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA GPU, and that is what is measured here; "
                 "--quick --device cpu runs the same code on a tiny model")  # fmt: skip
    if not cuda and not args.quick:
        sys.exit("error: --device cpu is there to try the code, with --quick")
    shape = TINY if args.quick else {}
    sizes: dict[str, Any] = {
        "steps": {8: 2, 16: 1} if args.quick else STEPS,
        "mini_batches": (4, 8) if args.quick else MINI_BATCHES,
        "batch_tokens": 512 if args.quick else BATCH_TOKENS,
        "docs": 64 if args.quick else DOCS,
        "middle": 20.0 if args.quick else 55.0,
    }
    flash = cuda and is_flash_attn_2_available()
    attention = "flash_attention_2" if flash else "sdpa"
    with tempfile.TemporaryDirectory() as folder:
        new_encoder(Path(folder), shape, args.seed)
        setup = Setup(folder, args.device, bf16=True, attention=attention)
        claims, details = measure(setup, args.seed, sizes)
    write_claims(
        args,
        claims,
        device=torch.cuda.get_device_name() if cuda else args.device,
        model={"shape": "BERT-base, random weights", **shape},
        data=f"random words, {sizes['middle']:g} tokens in the middle, at most {MAX_TOKENS}",
        settings={"precision": "bf16 autocast", "dropout": False, "lr": LR,
                  "batch_tokens": sizes["batch_tokens"], "peer_attention": attention},
        **details,
    )  # fmt: skip


if __name__ == "__main__":
    main()
