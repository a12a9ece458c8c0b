"""The sections about LLMs: agents, scorers, and the servers that vLLM runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator

from memshare.config.base import Fraction, NonNegativeInt, Port, PositiveFloat, PositiveInt, Section


class VLLMServerConfig(Section):
    """How ``serve/llm.py`` starts vLLM; ``args`` are passed to its server as they stand.

    ``replicas``: so many equal servers, on as many ports from that of the url on. Each takes
    ``tensor_parallel_size`` of the GPUs, in the order of ``CUDA_VISIBLE_DEVICES``.
    ``python``: of vLLM's environment. ``max_model_len`` (tokens of prompt and answer; None: the
    model's), ``dtype``, ``gpu_memory_utilization`` (share of a card) and ``enable_prefix_caching``
    are vLLM's own, but a server that is the scorer's alone never has a prefix cache; ``env``:
    environment variables for it, their values text (in YAML, numbers in quotes).
    ``start_timeout_seconds``: how long it may take until it answers.
    """

    python: Path = Path(".venv-vllm/bin/python")
    port: Port = 0  # 0: the port of the LLM's url
    replicas: PositiveInt = 1
    max_model_len: PositiveInt | None = None
    dtype: str = "auto"
    tensor_parallel_size: PositiveInt = 1
    gpu_memory_utilization: Fraction = 0.45
    enable_prefix_caching: bool = True
    args: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    start_timeout_seconds: PositiveFloat = 600.0


class LLMConfig(Section):
    """One LLM. ``model``: a folder, a hub name, or ``pocket`` (the small one trained here).

    ``url``: its server, or a list of equal ones, which get requests in turn; one that can't be
    reached, times out, or answers 502, 503 or 504 is left out for a while.

    ``openai``: any OpenAI-compatible endpoint, by its own name for the model; it gives no
    likelihoods, and ``context_length`` says how much fits, since it can't be asked.

    ``backend``: ``transformers`` runs the model in this process, in texts of ``batch_size`` at a
    time, on ``device`` (auto: a GPU where there is one) in ``dtype`` (auto: the model's own, on a
    CPU float32). The others are asked: at most ``max_concurrency`` requests at one time, each up to
    ``timeout_seconds`` and ``retries`` times more on each server, with the key in the environment
    variable ``api_key_env``.
    """

    backend: Literal["transformers", "vllm", "openai"] = "transformers"
    model: str = "pocket"
    url: str | Annotated[tuple[str, ...], Field(min_length=1)] = "http://127.0.0.1:8001"
    api_key_env: str = "MEMSHARE_LLM_API_KEY"
    context_length: PositiveInt = 8192
    timeout_seconds: PositiveFloat = 120.0
    retries: NonNegativeInt = 4
    max_concurrency: PositiveInt = 32
    batch_size: PositiveInt = 16
    batch_tokens: PositiveInt = 8192  # padded tokens per forward pass of the transformers backend
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    server: VLLMServerConfig = VLLMServerConfig()

    @field_validator("server")
    @classmethod
    def _countable(cls, value: VLLMServerConfig, info: ValidationInfo) -> VLLMServerConfig:
        url = info.data.get("url")  # one that is wrong is told of itself
        if value.replicas > 1 and url is not None:
            if not isinstance(url, str):
                raise ValueError("server.replicas counts ports from one url; url is a list already")
            try:
                port = urlsplit(url).port
            except ValueError:
                port = None
            if port is None or not _bare(url).endswith(f":{port}"):
                raise ValueError(f"server.replicas counts ports from the end of url: {url}")
        return value

    @property
    def urls(self) -> tuple[str, ...]:
        """Of every replica, without ``/v1``."""
        given = (self.url,) if isinstance(self.url, str) else self.url
        bare = tuple(map(_bare, given))
        if self.server.replicas == 1:
            return bare
        start, colon, port = bare[0].rpartition(":")
        return tuple(f"{start}{colon}{int(port) + i}" for i in range(self.server.replicas))


def _bare(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


class AgentConfig(Section):
    """How agents answer: the system message ``instruction`` (empty: none), shots, sampling.

    ``shots``: memories that are shown as examples; ``max_tokens``: of an answer; ``temperature``: 0
    takes the likeliest token each time.
    """

    instruction: str = ""
    shots: Annotated[int, Field(ge=0, le=64)] = 3
    max_tokens: PositiveInt = 256
    temperature: Annotated[float, Field(ge=0.0)] = 0.0


class ScorerConfig(Section):
    """How a pair is graded 0-100, by its ``kind``.

    ``rubric``: the scorer LLM grades against the pool's rubric (``grading``: structured output, or
    the expected value over label tokens). ``likelihood``: 100 * exp(l / likelihood_scale) clipped,
    where l is the mean log-likelihood per token (nats) of the answer after the bare question.
    ``reference``: 100 * BERTScore F1 against the known answer in ``references`` (JSONL of
    ``{"prompt", "answer"}`` or chat rows), by the encoder ``bertscore_model``.
    ``likelihood_scale``: in nats; ``max_tokens``: of a grade that the scorer writes.
    """

    kind: Literal["rubric", "likelihood", "reference"] = "rubric"
    grading: Literal["structured", "labels"] = "structured"
    likelihood_scale: PositiveFloat = 2.0
    references: tuple[Path, ...] = ()
    bertscore_model: str = "all-MiniLM-L6-v2"
    max_tokens: PositiveInt = 256
