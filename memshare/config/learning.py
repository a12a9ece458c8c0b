"""The sections about learning: mining, training, the gate, and continual rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from memshare.config.base import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
)


class MiningConfig(Section):
    """Step 5 of the loop: who proposes candidates per memory, and what labels them.

    ``labels``: what a candidate is worth to a query (`memshare.training.labels`).

    * ``none``: nothing is measured; the query's own memory is the positive.
    * ``given``: whether both have the same label, ``metadata[given_key]``, or, where one has none,
      the same answer.
    * ``likelihood``: mean log-likelihood per token of the query's answer with the candidate shown.
    * ``prompted``: log of the probability that the scorer states when it is asked.
    * ``reward``: the scorer's grade, as a share of 100, of what the agent answers with it shown.

    ``training.margin`` and ``gate.gain`` are in the units of what was chosen: see there.

    ``candidates``: BM25's best; ``dense_candidates``: the serving retriever's best, beside them (0:
    BM25 alone; so, too, with ``labels: none``). ``replay``: earlier memories mined again, with
    today's retriever, per new one and from all pools, so that nothing is forgotten.
    ``min_standing``: memories whose standing is lower are no queries and no candidates; one
    principal alone can't bring a memory below -0.34. ``held_out_queries``: at most so many held-out
    memories are labelled a round, where ``training.eval_every`` asks for them. ``iterations``: how
    often a round mines and trains. The second time the encoder that the first has trained proposes,
    and training starts once more from where the first started (LLM-R). ``baseline``: with
    ``likelihood`` and ``reward``, what the answer is worth with no example is labelled, too, for
    ``training.margin`` to compare with. ``shard_rows``: queries of a shard, which is written when
    it is complete.
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
    """Low-rank adapters through peft, where ``enabled``; merged into the weights on export.

    ``r``: their rank; ``alpha``: what they add is scaled by ``alpha / r``; ``dropout``: share of
    their inputs that is dropped, where ``training.dropout`` is on; ``target_modules``: the linear
    layers that get one, all of them or those of these names, or ends of names.
    """

    enabled: bool = False
    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Fraction = 0.05
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class TrainingConfig(Section):
    """Step 6: InfoNCE over v positives, hard negatives and in-batch negatives.

    ``positives``: at most so many (v) a query, its best candidates; ``hard_negatives``: so many of
    its worst ones. With ``mining.labels: none`` its own memory is the positive, and there and with
    ``given`` hard negatives are the first ones proposed. ``temperature``: what cosines are divided
    by before the softmax.
    ``positives_per_step`` draws so many of the v positives afresh at each step (None: all of them),
    as EPR and LLM-R do: a small set is learned by heart later. ``margin``: by how much a positive
    must beat what was measured with no example; an example of which no candidate does is dropped.
    In nats per token with ``mining.labels: likelihood``, a share of 100 with ``reward``; without
    effect otherwise, and without ``mining.baseline``. ``false_negative_margin``: candidates within
    it of the worst positive chosen are masked out of the negatives; in the same units, with
    ``prompted`` in nats; without effect with ``given`` and ``none``.
    ``batch_tokens``: tokens of a micro-batch, padding included where there is any;
    ``graph_tokens``: tokens whose activations are kept for the backward pass, the rest of a step is
    encoded twice (gradient caching), so that memory does not grow with the batch. ``compile``: the
    encoder's layers by torch.compile, which takes a minute or so at the start; dropout draws other
    numbers then, the same ones when a text is encoded again. ``dropout``: as the encoder's own
    configuration and ``lora`` have it; by default none, since texts can't be packed with dropout of
    attention weights. ``distill_weight``: weight of the KL divergence
    from the LM's preference among the chosen candidates (5: as LLM-R weighs the two, and then with
    several ``hard_negatives``), ``distill_temperature`` softens that preference; ``matryoshka``:
    widths at which the first entries of the vectors are trained as vectors too. ``towers``: one
    encoder for queries and memories; one each; or one each of which only the queries' is trained,
    so that the memories' vectors, and with them an index, stay as they are.
    ``pool_temperature`` T gives a pool of n examples n ** (1 / T) of the batches (1: every example
    once an epoch); ``max_principal_share``: as much of a batch's queries, and of its positives, one
    principal may have; more is left out of the epoch (`memshare.training.principals`).
    ``eval_every``: steps between two evaluations on held-out memories (None: none at all), the best
    of which is exported; ``patience``: evaluations in a row without a better nDCG@10 that end the
    training. ``epochs``: passes over the examples; ``weight_decay``: AdamW's, of matrices alone;
    ``warmup_ratio``: share of the steps in which the learning rate rises to ``lr``;
    ``max_grad_norm``: a longer gradient (L2) is shortened to it; ``checkpoint_every`` and
    ``log_every``: in steps, beside the last one; a line of the log has means over those since the
    one before, and the last one's learning rate and gradient norm (before it is shortened).
    ``round_lr_decay``: what each continual round multiplies the learning rate of the
    one before by, down to a tenth of ``lr`` (1: all rounds alike); ``warm_optimizer``: a round
    starts from the optimizer state with which the training of the encoder that serves has ended.
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
    dropout: bool = False
    epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = None  # wins over epochs
    lr: PositiveFloat = 3e-5
    schedule: Literal["linear", "cosine"] = "linear"  # after the warm-up, down to 0
    round_lr_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    warm_optimizer: bool = False
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    warmup_ratio: Fraction = 0.1
    max_grad_norm: PositiveFloat | None = 1.0  # None: no clipping
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
        asked = value.dropout not in (0.0, LoRAConfig().dropout)
        if value.enabled and asked and not info.data.get("dropout", True):
            raise ValueError("its dropout has no effect while training.dropout is off")
        return value

    @field_validator("patience")
    @classmethod
    def _evaluated(cls, value: int | None, info: ValidationInfo) -> int | None:
        # A wrong eval_every is not in `data`, and is told of itself.
        if value is not None and info.data.get("eval_every", 1) is None:
            raise ValueError("counts evaluations, and training.eval_every asks for none")
        return value


class SplitConfig(Section):
    """Held-out queries: split off by hash, near-duplicate clusters kept together.

    ``held_out``: share of the memories that judges and does not train. ``near_duplicate``: of
    prompts; from it on, an answer also counts as a copy of a shown memory's (``max_copies``).
    """

    held_out: Fraction = 0.1
    near_duplicate: Fraction = 0.8  # Jaccard similarity of word 3-gram sets


class GateConfig(Section):
    """Next passes if the paired bootstrap's lower bound of each metric difference is > -margin.

    ``margin``: how much worse it may be, in a metric's own units, all from 0 to 1; ``confidence``:
    of the interval (0.95: 95 %); ``resamples``: draws of the bootstrap. ``max_queries``: at most so
    many held-out questions are asked, ``depth``: so many memories each are looked at. ``gain``: a
    memory must have more of it to be relevant to a question (None: 0.5 with ``mining.labels:
    prompted``, else 0.05). With ``likelihood`` that is nats per token over no example, with
    ``reward`` a share of 100 over none, with ``prompted`` the stated probability, with ``none`` the
    share of words in common; ``given`` has 1 for the same label and 0 for another, so that any
    value below 1 does.
    ``canaries``: a file of questions and the memories that must be found for them
    (`memshare.retrieval.canaries`), on which the mean difference must not be below -margin either.
    """

    margin: Annotated[float, Field(ge=0.0)] = 0.02
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    resamples: PositiveInt = 2000
    max_queries: PositiveInt = 200
    depth: PositiveInt = 10
    gain: Annotated[float, Field(ge=0.0)] | None = None
    canaries: Path | None = None


class ContinualConfig(Section):
    """When a round starts, and on how many processes it trains and encodes.

    ``min_new``: memories that are new since the last round, over all pools, and start one;
    ``poll_seconds``: between two looks for them; ``rounds``: after so many the loop ends (None: it
    goes on until stopped). ``keep_rounds``: examples, figures, logs and W&B's offline runs of more
    finished rounds than that are deleted, oldest first (None: of none). ``retry_seconds``: where
    serve/up.py runs the loop and it fails, serving goes on, and it is started again after so long,
    and after twice as long each further time, up to an hour (None: everything stops).
    ``accelerate_config``: a file of ``accelerate config``'s or of ``configs/accelerate``, seen from
    the folder where the loop starts (None: one machine, bf16 where a GPU has it);
    ``num_processes``: its number of processes, or another one than it says (None: as many as it
    says, one without it).
    """

    min_new: PositiveInt = 256
    poll_seconds: PositiveFloat = 2.0
    rounds: PositiveInt | None = None
    keep_rounds: PositiveInt | None = None
    retry_seconds: PositiveFloat | None = 60.0
    num_processes: PositiveInt | None = None
    accelerate_config: Path | None = None
