"""Every setting of memshare in one tree. Imports neither torch, FAISS nor vLLM.

A configuration is a YAML file; environment variables (``MEMSHARE_TRAINING__LR=1e-5``) win over it
and ``--set training.lr=1e-5`` on a command line wins over both. `load_config` finds every mistake
before anything starts, all at once, each with the key it belongs to.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Score = Annotated[float, Field(ge=0.0, le=100.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class ConfigError(ValueError):
    """A configuration that can't be used; the message lists every problem with its key."""


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RunConfig(Section):
    """Where a run keeps its files, and the seed of everything random in it."""

    dir: Path = Path("runs/default")
    seed: int = 0


class PoolSettings(Section):
    """One pool: a rubric (name of a shipped one, or a file) and the score that admits a memory."""

    rubric: str = "general"
    threshold: Score = 80.0


class EncoderConfig(Section):
    """The text encoder. ``model`` is a folder, a hub name, or the name of an installed package's.

    ``batch_tokens`` bounds padded tokens per forward pass; ``max_length`` is in tokens.
    """

    model: str = "all-MiniLM-L6-v2"
    pooling: Literal["mean", "cls"] = "mean"
    query_prefix: str = ""
    memory_prefix: str = ""
    max_length: PositiveInt = 256
    batch_tokens: PositiveInt = 8192
    device: str = "auto"


class RetrieverConfig(Section):
    """A named line of generations: which pools it serves and how many past ones are kept."""

    name: str = Field(default="main", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    pools: tuple[str, ...] = ()  # empty means every pool of `Config.pools`
    keep: PositiveInt = 3
    gpu: Literal["auto", "on", "off"] = "auto"
    batch_wait_seconds: Annotated[float, Field(ge=0.0)] = 0.003
    max_batch: PositiveInt = 64
    poll_seconds: PositiveFloat = 0.5


class BM25Config(Section):
    """BM25+ (Lv & Zhai 2011): the one variant whose scores agree in rank-bm25 and bm25s."""

    backend: Literal["bm25s", "rank-bm25"] = "bm25s"
    k1: PositiveFloat = 1.5
    b: Fraction = 0.75
    delta: Annotated[float, Field(ge=0.0)] = 1.0


class VLLMServerConfig(Section):
    """How ``serve/llm.py`` starts vLLM; ``args`` are passed to its server as they stand."""

    python: Path = Path(".venv-vllm/bin/python")
    port: int = 0  # 0: the port of the LLM's url
    max_model_len: PositiveInt | None = None
    dtype: str = "auto"
    tensor_parallel_size: PositiveInt = 1
    gpu_memory_utilization: Fraction = 0.45
    enable_prefix_caching: bool = True
    args: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    start_timeout_seconds: PositiveFloat = 600.0


class LLMConfig(Section):
    """One LLM. ``model``: a folder, a hub name, or ``pocket`` (the small one trained here)."""

    backend: Literal["transformers", "vllm"] = "transformers"
    model: str = "pocket"
    url: str = "http://127.0.0.1:8001"
    api_key_env: str = "MEMSHARE_LLM_API_KEY"
    timeout_seconds: PositiveFloat = 120.0
    retries: NonNegativeInt = 4
    max_concurrency: PositiveInt = 32
    batch_size: PositiveInt = 16
    batch_tokens: PositiveInt = 8192  # padded tokens per forward pass of the transformers backend
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    server: VLLMServerConfig = VLLMServerConfig()


class AgentConfig(Section):
    """How agents answer: instruction, number of shots, sampling."""

    instruction: str = ""
    shots: Annotated[int, Field(ge=0, le=64)] = 3
    max_tokens: PositiveInt = 256
    temperature: Annotated[float, Field(ge=0.0)] = 0.0


class ScorerConfig(Section):
    """How a pair is graded 0-100.

    ``rubric``: the scorer LLM grades against the pool's rubric (``grading``: structured output, or
    the expected value over label tokens). ``likelihood``: 100 * exp(l / likelihood_scale) clipped,
    where l is the mean log-likelihood per token (nats) of the answer after the bare question.
    ``reference``: 100 * BERTScore F1 against the known answer in ``references`` (JSONL of
    ``{"prompt", "answer"}`` or chat rows).
    """

    kind: Literal["rubric", "likelihood", "reference"] = "rubric"
    grading: Literal["structured", "labels"] = "structured"
    likelihood_scale: PositiveFloat = 2.0
    references: tuple[Path, ...] = ()
    bertscore_model: str = "all-MiniLM-L6-v2"
    max_tokens: PositiveInt = 256


class MiningConfig(Section):
    """Step 5 of the loop: BM25's ``candidates`` per memory, and what labels them."""

    labels: Literal["none", "given", "likelihood", "prompted", "reward"] = "likelihood"
    candidates: PositiveInt = 16
    baseline: bool = True
    given_key: str = "label"  # memory.metadata key that `given` compares
    shard_rows: PositiveInt = 256


class LoRAConfig(Section):
    """Low-rank adapters through peft; merged into the weights on export."""

    enabled: bool = False
    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Fraction = 0.05
    target_modules: tuple[str, ...] = ("query", "key", "value", "dense")


class TrainingConfig(Section):
    """Step 6: InfoNCE over v positives, hard negatives and in-batch negatives.

    ``margin``: nats per token by which a positive must beat the likelihood with no example, or the
    example is dropped. ``false_negative_margin``: candidates within it of the worst positive chosen
    are masked out of the negatives. ``batch_tokens``: padded tokens of a micro-batch;
    ``graph_tokens``: padded tokens whose activations are kept for the backward pass, the rest of a
    step is encoded twice (gradient caching), so that memory does not grow with the batch.
    ``dropout``: as the encoder's own configuration has it, or none.
    """

    positives: PositiveInt = 1
    hard_negatives: NonNegativeInt = 3
    margin: Annotated[float, Field(ge=0.0)] = 0.0
    false_negative_margin: Annotated[float, Field(ge=0.0)] = 0.0
    batch_size: PositiveInt = 16  # queries per process and step
    batch_tokens: PositiveInt = 4096
    graph_tokens: NonNegativeInt = 8192
    dropout: bool = True
    epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = None  # wins over epochs
    lr: PositiveFloat = 3e-5
    round_lr_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # round r: lr * decay ** (r - 1)
    schedule: Literal["linear", "cosine"] = "linear"  # after the warm-up, down to 0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    warmup_ratio: Fraction = 0.1
    max_grad_norm: PositiveFloat = 1.0
    temperature: PositiveFloat = 0.05
    checkpoint_every: PositiveInt = 100
    log_every: PositiveInt = 5
    lora: LoRAConfig = LoRAConfig()


class SplitConfig(Section):
    """Held-out queries: split off by hash, near-duplicate clusters kept together."""

    held_out: Fraction = 0.1
    near_duplicate: Fraction = 0.8  # Jaccard similarity of word 3-gram sets


class GateConfig(Section):
    """Next passes if the paired bootstrap's lower bound of each metric difference is > -margin."""

    margin: Annotated[float, Field(ge=0.0)] = 0.02
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    resamples: PositiveInt = 2000
    max_queries: PositiveInt = 200
    depth: PositiveInt = 10
    gain: Annotated[float, Field(ge=0.0)] = 0.05  # nats per token over no example to be relevant


class ContinualConfig(Section):
    """When a round starts and what it mixes in. ``rounds`` None: until stopped."""

    min_new: PositiveInt = 256
    poll_seconds: PositiveFloat = 2.0
    replay: Annotated[float, Field(ge=0.0)] = 1.0  # earlier examples per new one
    rounds: PositiveInt | None = None
    num_processes: PositiveInt = 1
    accelerate_config: Path | None = None


class GatewayConfig(Section):
    """The HTTP service's limits and its default pool.

    ``score_writes``: memories that clients write are graded before they are stored, as answers are.
    ``scoring_queue`` bounds the pairs that wait for the scorer, ``scoring_wait_seconds`` how long
    an answer waits for a place there, ``shutdown_seconds`` how long a stopping one works it off.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    default_pool: str | None = None
    max_body_bytes: PositiveInt = 1_000_000
    max_text_chars: PositiveInt = 32_768
    max_k: PositiveInt = 1000
    score_writes: bool = False
    scoring_workers: PositiveInt = 4
    scoring_queue: PositiveInt = 1024
    scoring_wait_seconds: Annotated[float, Field(ge=0.0)] = 2.0
    shutdown_seconds: PositiveFloat = 30.0
    visible_timeout_seconds: PositiveFloat = 30.0
    threads: PositiveInt = 16  # for blocking calls of the store, reads and writes apart


class BootstrapConfig(Section):
    """Interactive learning: how many questions to write per round and what counts as trivial."""

    questions: PositiveInt = 64
    rounds: PositiveInt = 1
    min_chars: PositiveInt = 12
    near_duplicate: Fraction = 0.9
    temperature: Annotated[float, Field(ge=0.0)] = 0.8


class WandbConfig(Section):
    """Weights & Biases. ``auto``: online with a key, offline without one."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "memshare"
    entity: str | None = None
    name: str | None = None


class Config(BaseSettings):
    """The whole tree; `load_config` makes one."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="MEMSHARE_", env_nested_delimiter="__"
    )

    run: RunConfig = RunConfig()
    database_url: str | None = None  # None: SQLite in the run folder
    pools: dict[str, PoolSettings] = Field(default_factory=lambda: {"main": PoolSettings()})
    encoder: EncoderConfig = EncoderConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    bm25: BM25Config = BM25Config()
    agent_llm: LLMConfig = LLMConfig()
    scorer_llm: LLMConfig = LLMConfig()
    agent: AgentConfig = AgentConfig()
    scorer: ScorerConfig = ScorerConfig()
    mining: MiningConfig = MiningConfig()
    training: TrainingConfig = TrainingConfig()
    split: SplitConfig = SplitConfig()
    gate: GateConfig = GateConfig()
    continual: ContinualConfig = ContinualConfig()
    gateway: GatewayConfig = GatewayConfig()
    bootstrap: BootstrapConfig = BootstrapConfig()
    wandb: WandbConfig = WandbConfig()

    @field_validator("pools")
    @classmethod
    def _some_pool(cls, value: dict[str, PoolSettings]) -> dict[str, PoolSettings]:
        if not value:
            raise ValueError("at least one pool is needed")
        return value

    @model_validator(mode="after")
    def _pools_exist(self) -> Config:
        unknown = [name for name in self.retriever.pools if name not in self.pools]
        if unknown:
            raise ValueError(f"retriever.pools names pools that `pools` lacks: {unknown}")
        if self.gateway.default_pool is not None and self.gateway.default_pool not in self.pools:
            raise ValueError(f"gateway.default_pool: no pool {self.gateway.default_pool!r}")
        return self

    @property
    def url(self) -> str:
        """The pool's database URL."""
        return self.database_url or f"sqlite:///{self.run.dir / 'pool.db'}"

    @property
    def generations_dir(self) -> Path:
        """Folder of this run's generations, one sub-folder a retriever."""
        return self.run.dir / "generations"

    @property
    def examples_dir(self) -> Path:
        """Folder of mined examples, one Parquet data set a round."""
        return self.run.dir / "examples"

    @property
    def served_pools(self) -> tuple[str, ...]:
        """The pools this run's retriever serves."""
        return self.retriever.pools or tuple(self.pools)


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    ``overrides`` are ``dotted.key=value`` strings, values in YAML syntax. Raises `ConfigError`
    naming every unknown key and wrong value at once.
    """
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: can't be read: {error}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: a mapping of sections is expected")
    override_tree: dict[str, Any] = {}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: expected key=value")
        node = override_tree
        *parents, leaf = key.strip().split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"--set {item}: {parent} is set to a value already")
            node = child
        try:
            node[leaf] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item}: the value is no YAML: {error}") from error

    class FromFile(Config):
        """`Config` with this file as the source of least priority."""

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, tree)

    try:
        return FromFile(**override_tree)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(part) for part in item['loc']) or '(top)'}: {item['msg']}"
            for item in error.errors()
        ]
        raise ConfigError(
            f"{path or 'configuration'}: {len(lines)} problem(s)\n" + "\n".join(lines)
        ) from None


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a program's parser ``--config FILE`` and ``--set key=value``."""
    parser.add_argument("--config", type=Path, help="YAML configuration (see configs/)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="override one setting, e.g. training.lr=1e-5 (repeatable)",
    )  # fmt: skip
