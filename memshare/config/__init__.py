"""Every setting of memshare in one tree. Imports neither torch, FAISS nor vLLM.

A configuration is a YAML file; environment variables (``MEMSHARE_TRAINING__LR=1e-5``) win over it
and ``--set training.lr=1e-5`` on a command line wins over both. `load_config` finds every mistake
before anything starts, all at once, each with the key it belongs to.
"""

from memshare.config.learning import (
    ContinualConfig,
    GateConfig,
    LoRAConfig,
    MiningConfig,
    SplitConfig,
    TrainingConfig,
)
from memshare.config.llm import AgentConfig, LLMConfig, ScorerConfig, VLLMServerConfig
from memshare.config.load import Config, ConfigError, add_config_arguments, load_config, positive
from memshare.config.public import public, shown_command, without_secrets
from memshare.config.sections import (
    BM25Config,
    BootstrapConfig,
    EncoderConfig,
    EvaluationConfig,
    GatewayConfig,
    IndexConfig,
    PoolSettings,
    RetrieverConfig,
    RunConfig,
    WandbConfig,
)

__all__ = [
    "AgentConfig",
    "BM25Config",
    "BootstrapConfig",
    "Config",
    "ConfigError",
    "ContinualConfig",
    "EncoderConfig",
    "EvaluationConfig",
    "GateConfig",
    "GatewayConfig",
    "IndexConfig",
    "LLMConfig",
    "LoRAConfig",
    "MiningConfig",
    "PoolSettings",
    "RetrieverConfig",
    "RunConfig",
    "ScorerConfig",
    "SplitConfig",
    "TrainingConfig",
    "VLLMServerConfig",
    "WandbConfig",
    "add_config_arguments",
    "load_config",
    "positive",
    "public",
    "shown_command",
    "without_secrets",
]
