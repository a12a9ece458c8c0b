"""The sections of a configuration: every setting with its default, and what it means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Score = Annotated[float, Field(ge=0.0, le=100.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Standing = Annotated[float, Field(gt=-1.0, lt=0.0)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RunConfig(Section):
    """Where a run keeps its files, and the seed of everything random in it.

    ``generations``: a folder that several gateways, each with a ``dir`` of its own, may share with
    the trainer; None means within ``dir``.
    """

    dir: Path = Path("runs/default")
    generations: Path | None = None
    seed: int = 0


class PoolSettings(Section):
    """One pool: a rubric (name of a shipped one, or a file) and the score that admits a memory.

    ``near_duplicate``: the cosine from which a written memory counts as one that is there already
    (None: never). Then the new one is dropped, or they are merged: the better graded one stays.
    ``max_memories``: a cap that the continual loop holds, pruning by the policy ``prune_by``.
    ``max_principal_share``: of the pool's memories, as many one principal may have; more are
    refused (None: any number). ``principal_floor``: so many each may have however small the pool
    is, so the share binds from ``principal_floor / max_principal_share`` memories on. It takes more
    than ``1 / max_principal_share`` principals to grow a pool beyond that. ``max_copies``: memories
    that repeat one memory's answer under other questions, by agents that were shown it (None: any
    number). ``hold_suspicious``: written text that seems meant for a model's eyes waits on hold for
    a review. ``hold_below``: a memory whose standing sinks below it is put on hold (None: never);
    at -0.4 it takes two principals at least.
    """

    rubric: str = "general"
    threshold: Score = 80.0
    near_duplicate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    near_duplicate_action: Literal["drop", "merge"] = "drop"
    max_memories: PositiveInt | None = None
    prune_by: str = "near-duplicates"
    max_principal_share: Share | None = None
    principal_floor: PositiveInt = 20
    max_copies: NonNegativeInt | None = 16
    hold_suspicious: bool = False
    hold_below: Standing | None = -0.5


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


class IndexConfig(Section):
    """How vectors are kept and searched. ``flat`` is exact; the other kinds are for large pools.

    ``ivf``: the ``nprobe`` nearest of ``nlist`` lists (None: four times the root of the pool's
    size) are searched. ``hnsw``, on the CPU alone: a graph with ``links`` a memory, built and
    searched with so many neighbours in view (``ef_construction``, ``ef_search``). Pools below
    ``approximate_from`` memories stay flat. ``recall_floor``: a generation that finds fewer of a
    memory's ten nearest others is not published. ``precision``: of the vectors wherever they are,
    or (``gpu-float16``) of flat indexes' GPU copies alone, while the CPU's decide in full.
    """

    kind: Literal["flat", "ivf", "hnsw"] = "flat"
    nlist: PositiveInt | None = None
    nprobe: PositiveInt = 64
    links: Annotated[int, Field(ge=4, le=256)] = 32
    ef_construction: PositiveInt = 128
    ef_search: PositiveInt = 128
    approximate_from: PositiveInt = 10_000
    recall_floor: Fraction = 0.9
    precision: Literal["float32", "gpu-float16", "float16"] = "float32"


class RetrieverConfig(Section):
    """A named line of generations: which pools it serves and how many past ones are kept.

    ``gpu_memory_gib``: what its generations may take of a GPU together, beside vLLM's share (None:
    whatever is free). Where two don't fit, the next one serves from the CPU until the old one is
    gone.
    ``max_principal_share``: of the k memories that a search returns, at most so many, but one at
    least, are by one principal; unless the search asks for one principal's own.
    """

    name: str = Field(default="main", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    pools: tuple[str, ...] = ()  # empty means every pool of `Config.pools`
    keep: PositiveInt = 3
    index: IndexConfig = IndexConfig()
    max_principal_share: Share = 1.0
    gpu: Literal["auto", "on", "off"] = "auto"
    gpu_memory_gib: PositiveFloat | None = None
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
    """How ``serve/llm.py`` starts vLLM; ``args`` are passed to its server as they stand.

    ``replicas``: so many equal servers, on as many ports from that of the url on. Each takes
    ``tensor_parallel_size`` of the GPUs, in the order of ``CUDA_VISIBLE_DEVICES``.
    """

    python: Path = Path(".venv-vllm/bin/python")
    port: int = 0  # 0: the port of the LLM's url
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
    reached is left out for a while.

    ``openai``: any OpenAI-compatible endpoint, by its own name for the model; it gives no
    likelihoods, and ``context_length`` says how much fits, since it can't be asked.
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

    @model_validator(mode="after")
    def _countable(self) -> LLMConfig:
        if self.server.replicas > 1:
            if not isinstance(self.url, str):
                raise ValueError("server.replicas counts ports from one url; url is a list already")
            try:
                port = urlsplit(self.url).port
            except ValueError:
                port = None
            if port is None:
                raise ValueError(f"server.replicas counts ports from that of url: {self.url}")
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """Of every replica, without ``/v1``."""
        given = (self.url,) if isinstance(self.url, str) else self.url
        bare = tuple(url.rstrip("/").removesuffix("/v1") for url in given)
        if self.server.replicas == 1:
            return bare
        start, colon, port = bare[0].rpartition(":")
        return tuple(f"{start}{colon}{int(port) + i}" for i in range(self.server.replicas))


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
    """Step 5 of the loop: who proposes candidates per memory, and what labels them.

    ``candidates``: BM25's best; ``dense_candidates``: the serving retriever's best, beside them (0:
    BM25 alone; so, too, with ``labels: none``). ``replay``: earlier memories mined again, with
    today's retriever, per new one, so that nothing is forgotten. ``min_standing``: memories
    whose standing is lower are no queries and no candidates; one principal alone can't bring a
    memory below -0.34. ``held_out_queries``: at most so many held-out memories are labelled a
    round, where ``training.eval_every`` asks for them. ``iterations``: how often a round mines and
    trains. The second time the encoder that the first has trained proposes, and training starts
    once more from where the first started (LLM-R).
    """

    labels: Literal["none", "given", "likelihood", "prompted", "reward"] = "likelihood"
    candidates: PositiveInt = 16
    dense_candidates: NonNegativeInt = 8
    iterations: Literal[1, 2] = 1
    replay: Annotated[float, Field(ge=0.0)] = 0.5
    min_standing: Annotated[float, Field(ge=-1.0, le=0.0)] = -0.4
    held_out_queries: PositiveInt = 64
    baseline: bool = True
    given_key: str = "label"  # memory.metadata key that `given` compares
    shard_rows: PositiveInt = 256

    @field_validator("iterations")
    @classmethod
    def _proposed(cls, value: int, info: ValidationInfo) -> int:
        # Settings that are wrong are not in `data`, and are told of themselves.
        told = info.data
        if value > 1 and not (told.get("dense_candidates", 1) and told.get("labels") != "none"):
            raise ValueError(
                "a second one needs an encoder that proposes: mining.dense_candidates, and labels"
            )
        return value


class LoRAConfig(Section):
    """Low-rank adapters through peft; merged into the weights on export."""

    enabled: bool = False
    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Fraction = 0.05
    target_modules: tuple[str, ...] = ("query", "key", "value", "dense")


class TrainingConfig(Section):
    """Step 6: InfoNCE over v positives, hard negatives and in-batch negatives.

    ``positives_per_step`` draws so many of the v positives afresh at each step (None: all of them),
    as EPR and LLM-R do: a small set is learned by heart later. ``margin``: nats per token by which
    a positive must beat the likelihood with no example, or the example is dropped.
    ``false_negative_margin``: candidates within it of the worst positive chosen are masked out of
    the negatives. ``batch_tokens``: tokens of a micro-batch, padding included where there is any;
    ``graph_tokens``: tokens whose activations are kept for the backward pass, the rest of a step is
    encoded twice (gradient caching), so that memory does not grow with the batch. ``compile``: the
    encoder's layers by torch.compile, which takes a minute or so at the start. ``dropout``: as the
    encoder's own configuration has it, or none. ``distill_weight``: weight of the KL divergence
    from the LM's preference among the chosen candidates, ``distill_temperature`` softens that
    preference; ``matryoshka``: widths at which the first entries of the vectors are trained as
    vectors too.
    ``towers``: one encoder for queries and memories; one each; or one each of which only the
    queries' is trained, so that the memories' vectors, and with them an index, stay as they are.
    ``pool_temperature`` T gives a pool of n examples n ** (1 / T) of the batches (1: every example
    once an epoch); ``max_principal_share`` caps one principal's queries in a batch. ``eval_every``:
    steps between two evaluations on held-out memories (None: none at all), the best of which is
    exported; ``patience``: evaluations in a row without a better nDCG@10 that end the training.
    ``round_lr_decay``: what each continual round multiplies the learning rate of the one before by,
    down to a tenth of ``lr`` (1: all rounds alike); ``warm_optimizer``: a round starts from the
    optimizer state with which the training of the encoder that serves has ended.
    """

    positives: PositiveInt = 1
    positives_per_step: PositiveInt | None = None
    hard_negatives: NonNegativeInt = 3
    margin: Annotated[float, Field(ge=0.0)] = 0.0
    false_negative_margin: Annotated[float, Field(ge=0.0)] = 0.0
    batch_size: PositiveInt = 16  # queries per process and step
    batch_tokens: PositiveInt = 4096
    graph_tokens: NonNegativeInt = 8192
    compile: bool = False
    dropout: bool = True
    epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = None  # wins over epochs
    lr: PositiveFloat = 3e-5
    schedule: Literal["linear", "cosine"] = "linear"  # after the warm-up, down to 0
    round_lr_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    warm_optimizer: bool = False
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    warmup_ratio: Fraction = 0.1
    max_grad_norm: PositiveFloat = 1.0
    temperature: PositiveFloat = 0.05
    distill_weight: Annotated[float, Field(ge=0.0)] = 0.0
    distill_temperature: PositiveFloat = 1.0
    matryoshka: tuple[PositiveInt, ...] = ()
    towers: Literal["shared", "separate", "query-only"] = "shared"
    pool_temperature: Annotated[float, Field(ge=1.0)] = 1.0
    max_principal_share: Share = 1.0
    eval_every: PositiveInt | None = None
    patience: PositiveInt | None = None
    checkpoint_every: PositiveInt = 100
    log_every: PositiveInt = 5
    lora: LoRAConfig = LoRAConfig()

    @field_validator("lora")
    @classmethod
    def _kept(cls, value: LoRAConfig, info: ValidationInfo) -> LoRAConfig:
        if value.enabled and info.data.get("warm_optimizer"):
            raise ValueError("adapters are new in each round: training.warm_optimizer can't be set")
        return value

    @field_validator("patience")
    @classmethod
    def _evaluated(cls, value: int | None, info: ValidationInfo) -> int | None:
        # A wrong eval_every is not in `data`, and is told of itself.
        if value is not None and info.data.get("eval_every", 1) is None:
            raise ValueError("counts evaluations, and training.eval_every asks for none")
        return value


class SplitConfig(Section):
    """Held-out queries: split off by hash, near-duplicate clusters kept together."""

    held_out: Fraction = 0.1
    near_duplicate: Fraction = 0.8  # Jaccard similarity of word 3-gram sets


class GateConfig(Section):
    """Next passes if the paired bootstrap's lower bound of each metric difference is > -margin.

    ``canaries``: a file of questions and the memories that must be found for them
    (`memshare.retrieval.canaries`), on which the mean difference must not be below -margin either.
    """

    margin: Annotated[float, Field(ge=0.0)] = 0.02
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    resamples: PositiveInt = 2000
    max_queries: PositiveInt = 200
    depth: PositiveInt = 10
    gain: Annotated[float, Field(ge=0.0)] = 0.05  # nats per token over no example to be relevant
    canaries: Path | None = None


class ContinualConfig(Section):
    """When a round starts. ``rounds`` None: until stopped."""

    min_new: PositiveInt = 256
    poll_seconds: PositiveFloat = 2.0
    rounds: PositiveInt | None = None
    num_processes: PositiveInt = 1
    accelerate_config: Path | None = None


class GatewayConfig(Section):
    """The HTTP service's limits and its default pool.

    ``keys``: callers need one, ``auto`` everywhere but on a loopback address.
    ``requests_per_minute`` (None: no limit) and ``max_body_bytes`` hold for each key that has no
    limit of its own. ``max_requests`` and ``max_chats`` bound what is answered at one time.
    ``score_writes``: memories that clients write are graded before they are stored, as answers are.
    ``scoring_queue``: so many pairs wait for the scorer before chats are refused;
    ``scoring_lease_seconds``: how long after a crash its pairs stay with the gateway that crashed.
    ``shutdown_seconds``: how long a stopping gateway finishes what it has accepted.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    default_pool: str | None = None
    keys: Literal["auto", "required"] = "auto"
    requests_per_minute: PositiveInt | None = None
    max_requests: PositiveInt = 1024
    max_chats: PositiveInt = 256
    max_body_bytes: PositiveInt = 1_000_000
    max_text_chars: PositiveInt = 32_768
    max_k: PositiveInt = 1000
    score_writes: bool = False
    scoring_workers: PositiveInt = 4
    scoring_queue: PositiveInt = 1024
    scoring_lease_seconds: PositiveFloat = 30.0
    shutdown_seconds: PositiveFloat = 30.0
    visible_timeout_seconds: PositiveFloat = 30.0
    threads: PositiveInt = 16  # for blocking calls of the store, reads and writes apart
    log: Literal["auto", "json", "plain"] = "auto"  # auto: plain on a terminal


class BootstrapConfig(Section):
    """Interactive learning: how many questions to write per round and what counts as trivial."""

    questions: PositiveInt = 64
    rounds: PositiveInt = 1
    min_chars: PositiveInt = 12
    near_duplicate: Fraction = 0.9
    temperature: Annotated[float, Field(ge=0.0)] = 0.8


class EvaluationConfig(Section):
    """`memshare eval`: what is asked, of whom, and how answers are measured.

    ``data``: a folder of domains (docs/experiments.md); None: the nine datasets under
    ``MEMSHARE_DATA``. ``agents``: the LLMs that answer, by name; none: `Config.agent_llm` alone.
    ``memories``: at most so many seed memories, and so many problems, a domain (None: all).
    ``questions``: at most so many test questions a dataset in the experiments about shots and pools
    (None: all), ``sample``: in all others. ``world``: seed memories, problems and test questions of
    the pocket world, which is asked beside the data; None: it is left out. ``problems``: at most so
    many problems a domain where the agents answer them themselves. ``labelled``: memories of one
    domain in the experiment about labels, most of whose labels cost an answer each. ``stream``:
    problems of the pocket world in the experiment about pruning (None: as in ``world``).
    """

    data: Path | None = None
    agents: dict[str, LLMConfig] = Field(default_factory=dict)
    memories: PositiveInt | None = None
    questions: PositiveInt | None = None
    sample: PositiveInt = 12
    world: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    problems: PositiveInt | None = None
    labelled: PositiveInt = 100
    stream: PositiveInt | None = None
    bertscore_model: str = "all-MiniLM-L6-v2"


class WandbConfig(Section):
    """Weights & Biases. ``auto``: online with a key, offline without one.

    ``samples``: for so many held-out questions, what the generation before and the new one find is
    shown as a table. Their texts leave the pool for W&B, where deleting a memory does not reach
    them; so none are by default.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "memshare"
    samples: NonNegativeInt = 0
    entity: str | None = None
    name: str | None = None
