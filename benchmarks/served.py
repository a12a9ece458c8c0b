"""Real vLLM for benchmarks, started by ``serve/llm.py`` as a user would."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from pipeline import ProgramFailed, Work, environment, run_program
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from memshare.pocket.lm import lm_folder
from memshare.progress import log

_STOP_SECONDS = 120.0


def vllm_llm(model: str = "pocket", dtype: str = "float32") -> dict[str, Any]:
    """Settings of an LLM section: ``model`` (a folder, or the pocket LM), on a port free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    server = {
        "python": str(ROOT / ".venv-vllm" / "bin" / "python"),
        "dtype": dtype,
        "env": {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"},
    }
    return {"backend": "vllm", "model": model, "url": url, "server": server}


def random_lm(folder: Path) -> None:
    """Write an LM with the layers of SmolLM2-135M (Allal et al. 2025), in bfloat16.

    Its weights are random and its tokenizer is the pocket LM's, so that nothing is fetched: what it
    says means nothing, what it costs is what a small chat model costs.
    """
    tokenizer = AutoTokenizer.from_pretrained(lm_folder())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def serve(work: Work) -> Iterator[None]:
    """``make vllm``, then the servers that ``work``'s configuration wants, until the block ends.

    Raises `ProgramFailed` if one of them doesn't get ready.
    """
    run_program(["make", "-C", str(ROOT), "vllm"], work.folder / "logs" / "make-vllm.log")
    words = [sys.executable, str(ROOT / "serve" / "llm.py"), "--config", str(work.file)]
    logfile = work.folder / "logs" / "serve-llm.log"
    log("starting vLLM")
    with logfile.open("ab") as errors:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environment()
        )
        assert process.stdout is not None
        try:
            if process.stdout.readline().strip() != "ready":
                tail = logfile.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise ProgramFailed(f"vLLM did not start; {logfile}:\n{tail}")
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(_STOP_SECONDS)
