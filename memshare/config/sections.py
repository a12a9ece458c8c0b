"""The sections about pools, the retriever, the gateway, experiments and a run's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from memshare.config.base import (
    Fraction,
    NonNegativeInt,
    Port,
    PositiveFloat,
    PositiveInt,
    Score,
    Section,
    Share,
    Standing,
)
from memshare.config.llm import LLMConfig


class RunConfig(Section):
    """Where a run keeps its files, and the ``seed`` of everything random in it.

    ``generations``: a folder that several gateways, each with a ``dir`` of its own, may share with
    the trainer; None means within ``dir``.
    """

    dir: Path = Path("runs/default")
    generations: Path | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class PoolSettings(Section):
    """One pool: a rubric (name of a shipped one, or a file) and the score that admits a memory.

    ``rubric``: what the scorer grades by; ``threshold``: the least score, of 100. Both count when
    the pool is made; one that is there keeps what it has until it is changed by
    ``memshare pool create --pool NAME --rubric R --threshold N --config FILE``.
    ``near_duplicate``: the cosine from which a written memory counts as one that is there already
    (None: never). Then, by ``near_duplicate_action``, the new one is dropped, or they are merged:
    the better graded one stays.
    ``max_memories``: a cap that the continual loop holds, pruning by the policy ``prune_by``.
    ``max_principal_share``: of the pool's memories, as many one principal may have; more are
    refused (None: any number). ``principal_floor``: so many each may have however small the pool
    is, so the share binds from ``principal_floor / max_principal_share`` memories on. It takes more
    than ``1 / max_principal_share`` principals to grow a pool beyond that. ``max_copies``: memories
    that repeat one memory's answer under other questions, by agents that were shown it (None: any
    number); ``split.near_duplicate`` says how near an answer that is. ``hold_suspicious``: written
    text that seems meant for a model's eyes waits on hold for a review. ``hold_below``: a memory
    whose standing sinks below it is put on hold (None: never); at -0.4 it takes two principals at
    least.
    """

    rubric: Annotated[str, Field(pattern=r"\S")] = "general"
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

    ``pooling`` makes a text's vector of its tokens': their mean, the first one (``cls``), or the
    last one, for decoders such as Qwen3-Embedding; a sentence-transformers folder says which.
    ``batch_tokens`` bounds padded tokens per forward pass; ``max_length`` is in tokens.
    ``query_prefix`` and ``memory_prefix`` come before every text of their side. What is set of
    these wins; what is not is as a sentence-transformers folder has it. ``device``: as torch names
    it, or ``auto``, a GPU where there is one. ``precision``: what it encodes in, by autocast;
    in ``bf16``, which is what GPUs are fast in, similarities differ by some thousandths, and texts
    are not padded on a GPU. What a training computes on and in is accelerate's to say.
    """

    model: str = "all-MiniLM-L6-v2"
    pooling: Literal["mean", "cls", "lasttoken"] = "mean"
    query_prefix: str = ""
    memory_prefix: str = ""
    max_length: PositiveInt = 256
    batch_tokens: PositiveInt = 8192
    device: str = "auto"
    precision: Literal["float32", "bf16"] = "float32"


class IndexConfig(Section):
    """How vectors are kept and searched, by ``kind``: ``flat`` is exact, others for large pools.

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

    ``name``: of its folder; ``keep``: so many of the latest generations. ``gpu``: whether indexes
    are on one (auto: where FAISS has it). ``max_batch``: so many searches at most are answered
    together, the first of which waits ``batch_wait_seconds`` for others. ``poll_seconds``: between
    two looks for a next generation.
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

    @field_validator("pools")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a pool is named twice")
        return value


class BM25Config(Section):
    """BM25+ (Lv & Zhai 2011): the one variant whose scores agree in rank-bm25 and bm25s.

    ``backend``: which of them; ``k1``: how soon repeated terms add no more; ``b``: how much a
    long text's length counts against it; ``delta``: what a term that occurs adds at least.
    """

    backend: Literal["bm25s", "rank-bm25"] = "bm25s"
    k1: PositiveFloat = 1.5
    b: Fraction = 0.75
    delta: Annotated[float, Field(ge=0.0)] = 1.0


class GatewayConfig(Section):
    """The HTTP service's limits and its default pool.

    ``host`` and ``port``: where it listens; ``default_pool``: for requests that name none (None:
    they must), one that the retriever serves. ``max_text_chars``: characters of a text, ``max_k``:
    memories of a search, both of one request. ``scoring_workers``: pairs graded at one time.
    ``visible_timeout_seconds``: how long a write waits until it is searchable; beyond it the reply
    is 503 `search_unavailable`, with the memory stored, so that a retry finds a duplicate.
    ``keys``: callers need one, ``auto`` everywhere but on a loopback address.
    ``requests_per_minute`` (None: no limit) and ``max_body_bytes`` hold for each key that has no
    limit of its own. ``max_requests`` and ``max_chats`` bound what is answered at one time.
    ``score_writes``: memories that clients write are graded before they are stored, as answers are.
    ``scoring_queue``: so many pairs wait for the scorer before chats are refused;
    ``scoring_lease_seconds``: how long after a crash its pairs stay with the gateway that crashed.
    ``shutdown_seconds``: how long a stopping gateway finishes requests, and then its scoring queue.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
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
    threads: PositiveInt = 16  # for blocking calls: reads, writes, and writes of memories apart
    log: Literal["auto", "json", "plain"] = "auto"  # auto: plain on a terminal


class BootstrapConfig(Section):
    """Interactive learning: how many questions to write per round and what counts as trivial.

    ``questions``: so many in each of ``rounds``, sampled at ``temperature``. One of fewer than
    ``min_chars`` characters is trivial, and one whose word 3-grams overlap with an earlier one's by
    ``near_duplicate`` (Jaccard similarity).
    """

    questions: PositiveInt = 64
    rounds: PositiveInt = 1
    min_chars: PositiveInt = 12
    near_duplicate: Fraction = 0.9
    temperature: Annotated[float, Field(ge=0.0)] = 0.8


class EvaluationConfig(Section):
    """`memshare eval`: what is asked, of whom, and how answers are measured.

    ``data``: a folder of domains (docs/experiments.md); None: the nine datasets under
    ``MEMSHARE_DATA``. ``agents``: the LLMs that answer, by name; none: `Config.agent_llm` alone.
    ``partners``: further ones, which answer only in the experiment about shots and where agents of
    different models share a pool.
    ``memories``: at most so many seed memories, and so many problems, a domain (None: all).
    ``questions``: at most so many test questions a dataset in the experiments about shots and pools
    (None: all), ``sample``: in all others. ``world``: seed memories, problems and test questions of
    the pocket world, which is asked beside the data; None: it is left out. ``problems``: at most so
    many problems a domain where the agents answer them themselves. ``seeds``: at most so many seed
    memories a domain where the agents are to fill a pool (the experiment about bootstrapping, and
    agents of different models), so that what they add is no drop in the sea. ``labelled``:
    memories of one domain in the experiment about labels, most of whose labels cost an answer each.
    ``stream``: problems of the pocket world in the experiment about pruning (None: as in
    ``world``). ``bertscore_model``: the encoder of BERTScore.
    """

    data: Path | None = None
    agents: dict[str, LLMConfig] = Field(default_factory=dict)
    partners: dict[str, LLMConfig] = Field(default_factory=dict)
    memories: PositiveInt | None = None
    questions: PositiveInt | None = None
    sample: PositiveInt = 12
    world: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    problems: PositiveInt | None = None
    seeds: PositiveInt | None = None
    labelled: PositiveInt = 100
    stream: PositiveInt | None = None
    bertscore_model: str = "all-MiniLM-L6-v2"


class WandbConfig(Section):
    """Weights & Biases. ``mode`` ``auto``: online with a key, offline without one.

    ``project``, ``entity`` (None: the key's own) and ``name`` of the run (None: the folder that is
    trained into; every round of a loop is a run of its own), and the ``group`` that it is shown in
    (None: what ``WANDB_RUN_GROUP`` says, or the folder around that one, so that a loop's rounds
    are together).
    ``samples``: for so many held-out questions, what the generation before and the new one find is
    shown as a table. Their texts leave the pool for W&B, where deleting a memory does not reach
    them; so none are by default.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "memshare"
    samples: NonNegativeInt = 0
    entity: str | None = None
    group: str | None = None
    name: str | None = None
