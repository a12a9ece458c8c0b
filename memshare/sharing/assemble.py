"""From a configuration to the loop's parts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from memshare.config import Config, ConfigError
from memshare.llm.agent import Agent
from memshare.llm.factory import make_llm
from memshare.llm.rubric import RubricError, load_rubric
from memshare.llm.scorer import make_scorer
from memshare.pool.store import PoolStore
from memshare.progress import log
from memshare.retrieval.errors import EncoderError
from memshare.retrieval.searcher import Searcher
from memshare.sharing.shared import SharedMemory


def uses_scorer_llm(config: Config) -> bool:
    """Whether the scorer needs an LLM: known answers do without."""
    return config.scorer.kind != "reference"


def assemble(config: Config) -> SharedMemory:
    """Open the pool (creating the pools of the configuration), make searcher, agent and scorer.

    Nothing is started yet. Equal settings for agent and scorer share one LLM. Raises `ConfigError`,
    `PoolError` and `LLMError`, each saying what to do.
    """
    store = PoolStore.open(config.url, config.gateway.max_text_chars)
    try:
        for name, settings in config.pools.items():
            try:  # a missing rubric is found now, not at the first grade
                load_rubric(settings.rubric)
            except RubricError as error:
                raise ConfigError(f"pools.{name}.rubric: {error}") from error
            kept = store.create_pool(name, settings.rubric, settings.threshold)
            if (kept.rubric, kept.threshold) != (settings.rubric, settings.threshold):
                log(
                    f"pools.{name}: the pool keeps rubric {kept.rubric} and threshold "
                    f"{kept.threshold:g}, with which it was made; `memshare pool create --pool "
                    f"{name} --rubric {settings.rubric} --threshold {settings.threshold:g} "
                    "--config FILE` changes that"
                )
        for pool in store.pools():  # what is written there is graded by what the pool keeps
            try:
                load_rubric(pool.rubric)
            except RubricError as error:
                told = (
                    f"pool {pool.name}: {error}; it keeps the rubric with which it was made until "
                    f"`memshare pool create --pool {pool.name} --rubric RUBRIC --config FILE`"
                )
                if pool.name in config.pools:
                    raise ConfigError(told) from error
                log(f"warning: {told}")  # somebody else's, maybe, who can read it
        llms = [make_llm(config.agent_llm)]
        if uses_scorer_llm(config) and config.scorer_llm != config.agent_llm:
            llms.append(make_llm(config.scorer_llm))
        try:
            scorer = make_scorer(config.scorer, llms[-1] if uses_scorer_llm(config) else None)
        except EncoderError as error:
            raise ConfigError(f"scorer.bertscore_model: {error}") from error
        return SharedMemory(
            store,
            Searcher(store, config),
            Agent(llms[0], config.agent),
            scorer,
            config,
            llms=tuple(llms),
        )
    except BaseException:
        store.close()
        raise


@asynccontextmanager
async def open_shared(config: Config) -> AsyncIterator[SharedMemory]:
    """`assemble`, started, and closed at the end of the block."""
    shared = assemble(config)
    try:
        await shared.start()
        yield shared
    finally:
        await shared.aclose()
