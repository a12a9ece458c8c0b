"""The sections of a configuration: every setting with its default, and what it means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Score = Annotated[float, Field(ge=0.0, le=100.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


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
    """

    rubric: str = "general"
    threshold: Score = 80.0
    near_duplicate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    near_duplicate_action: Literal["drop", "merge"] = "drop"
    max_memories: PositiveInt | None = None
    prune_by: str = "near-duplicates"


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
    """One LLM. ``model``: a folder, a hub name, or ``pocket`` (the small one trained here).

    ``openai``: any OpenAI-compatible endpoint, by its own name for the model; it gives no
    likelihoods, and ``context_length`` says how much fits, since it can't be asked.
    """

    backend: Literal["transformers", "vllm", "openai"] = "transformers"
    model: str = "pocket"
    url: str = "http://127.0.0.1:8001"
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
    today's retriever, per new one, so that nothing is forgotten. ``held_out_queries``: at most so
    many held-out memories are labelled a round, where ``training.eval_every`` asks for them.
    """

    labels: Literal["none", "given", "likelihood", "prompted", "reward"] = "likelihood"
    candidates: PositiveInt = 16
    dense_candidates: NonNegativeInt = 8
    replay: Annotated[float, Field(ge=0.0)] = 0.5
    held_out_queries: PositiveInt = 64
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

    ``positives_per_step`` draws so many of the v positives afresh at each step (None: all of them),
    as EPR and LLM-R do: a small set is learned by heart later. ``margin``: nats per token by which
    a positive must beat the likelihood with no example, or the example is dropped.
    ``false_negative_margin``: candidates within it of the worst positive chosen are masked out of
    the negatives. ``batch_tokens``: padded tokens of a micro-batch; ``graph_tokens``: padded tokens
    whose activations are kept for the backward pass, the rest of a step is encoded twice (gradient
    caching), so that memory does not grow with the batch. ``dropout``: as the encoder's own
    configuration has it, or none. ``distill_weight``: weight of the KL divergence from the LM's
    preference among the chosen candidates, ``distill_temperature`` softens that preference;
    ``matryoshka``: widths at which the first entries of the vectors are trained as vectors too.
    ``towers``: one encoder for queries and memories; one each; or one each of which only the
    queries' is trained, so that the memories' vectors, and with them an index, stay as they are.
    ``pool_temperature`` T gives a pool of n examples n ** (1 / T) of the batches (1: every example
    once an epoch); ``max_principal_share`` caps one principal's queries in a batch. ``eval_every``:
    steps between two evaluations on held-out memories (None: none at all), the best of which is
    exported; ``patience``: evaluations in a row without a better nDCG@10 that end the training.
    """

    positives: PositiveInt = 1
    positives_per_step: PositiveInt | None = None
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
    schedule: Literal["linear", "cosine"] = "linear"  # after the warm-up, down to 0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    warmup_ratio: Fraction = 0.1
    max_grad_norm: PositiveFloat = 1.0
    temperature: PositiveFloat = 0.05
    distill_weight: Annotated[float, Field(ge=0.0)] = 0.0
    distill_temperature: PositiveFloat = 1.0
    matryoshka: tuple[PositiveInt, ...] = ()
    towers: Literal["shared", "separate", "query-only"] = "shared"
    pool_temperature: Annotated[float, Field(ge=1.0)] = 1.0
    max_principal_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    eval_every: PositiveInt | None = None
    patience: PositiveInt | None = None
    checkpoint_every: PositiveInt = 100
    log_every: PositiveInt = 5
    lora: LoRAConfig = LoRAConfig()

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
    """Next passes if the paired bootstrap's lower bound of each metric difference is > -margin."""

    margin: Annotated[float, Field(ge=0.0)] = 0.02
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    resamples: PositiveInt = 2000
    max_queries: PositiveInt = 200
    depth: PositiveInt = 10
    gain: Annotated[float, Field(ge=0.0)] = 0.05  # nats per token over no example to be relevant


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
    """Weights & Biases. ``auto``: online with a key, offline without one."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "memshare"
    entity: str | None = None
    name: str | None = None
