"""The tree of sections, and reading one from file, environment and command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from memshare.config.base import PoolName
from memshare.config.document import parse
from memshare.config.environment import Environment
from memshare.config.learning import (
    ContinualConfig,
    GateConfig,
    MiningConfig,
    SplitConfig,
    TrainingConfig,
)
from memshare.config.llm import AgentConfig, LLMConfig, ScorerConfig
from memshare.config.sections import (
    BM25Config,
    BootstrapConfig,
    EncoderConfig,
    EvaluationConfig,
    GatewayConfig,
    PoolSettings,
    RetrieverConfig,
    RunConfig,
    WandbConfig,
)

# By pydantic's name for what was expected and not given.
_WRITTEN = {
    "tuple_type": "; a list is written [a, b]",
    "model_type": "; a section is written {key: value}",
    "dict_type": "; it is written {key: value}",
}
_QUOTED = """; a text with a colon is quoted, in --set as in the file: 'KEY="query: "'"""


class ConfigError(ValueError):
    """A configuration that can't be used; the message lists every problem with its key."""


class Config(BaseSettings):
    """The whole tree; `load_config` makes one. ``pools``: by name.

    ``database_url``: ``sqlite:///PATH`` (four slashes before an absolute one), or
    ``postgresql://USER@HOST/DATABASE``, also as ``postgresql+psycopg://``, of a database that is
    there; None: SQLite in the run folder.
    """

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="MEMSHARE_", env_nested_delimiter="__"
    )

    run: RunConfig = RunConfig()
    database_url: str | None = None
    pools: dict[PoolName, PoolSettings] = Field(default_factory=lambda: {"main": PoolSettings()})
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
    evaluation: EvaluationConfig = EvaluationConfig()
    wandb: WandbConfig = WandbConfig()

    @field_validator("pools")
    @classmethod
    def _some_pool(cls, value: dict[str, PoolSettings]) -> dict[str, PoolSettings]:
        if not value:
            raise ValueError("at least one pool is needed")
        return value

    # What is wrong in itself is not in `data`, and is told of itself.
    @field_validator("retriever")
    @classmethod
    def _pools_exist(cls, value: RetrieverConfig, info: ValidationInfo) -> RetrieverConfig:
        unknown = [name for name in value.pools if name not in info.data.get("pools", (name,))]
        if unknown:
            raise ValueError(f"retriever.pools names pools that `pools` lacks: {unknown}")
        return value

    @field_validator("scorer")
    @classmethod
    def _measurable(cls, value: ScorerConfig, info: ValidationInfo) -> ScorerConfig:
        llm = info.data.get("scorer_llm")
        if value.kind == "likelihood" and llm is not None and llm.backend == "openai":
            raise ValueError("scorer.kind: backend openai of scorer_llm gives no `likelihood`")
        return value

    @field_validator("gateway")
    @classmethod
    def _default_exists(cls, value: GatewayConfig, info: ValidationInfo) -> GatewayConfig:
        default, retriever = value.default_pool, info.data.get("retriever")
        if default is not None and default not in info.data.get("pools", (default,)):
            raise ValueError(f"gateway.default_pool: no pool {default!r}")
        if default is not None and retriever and default not in (retriever.pools or (default,)):
            raise ValueError(
                f"gateway.default_pool: can't be searched, retriever.pools lacks {default!r}"
            )
        return value

    @property
    def url(self) -> str:
        """The pool's database URL."""
        return self.database_url or f"sqlite:///{self.run.dir / 'pool.db'}"

    @property
    def generations_dir(self) -> Path:
        """Folder of this run's generations, one sub-folder a retriever."""
        return self.run.generations or self.run.dir / "generations"

    @property
    def retriever_dir(self) -> Path:
        """Folder of the generations of this run's retriever; its name is the retriever's."""
        return self.generations_dir / self.retriever.name

    @property
    def examples_dir(self) -> Path:
        """Folder of mined examples, one Parquet data set a round."""
        return self.run.dir / "examples"

    @property
    def served_pools(self) -> tuple[str, ...]:
        """The pools this run's retriever serves."""
        return self.retriever.pools or tuple(self.pools)

    @property
    def relevant_above(self) -> float:
        """``gate.gain``, by the kind of labels where it is not set."""
        if self.gate.gain is not None:
            return self.gate.gain
        return 0.5 if self.mining.labels == "prompted" else 0.05


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    ``overrides`` are ``dotted.key=value`` strings, values in YAML syntax. Raises `ConfigError`
    naming every unknown key and wrong value at once.
    """
    tree: Any = {}
    if path is not None:
        try:
            tree = parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: can't be read: {error}") from error
        if not isinstance(tree, dict | None):
            raise ConfigError(f"{path}: a mapping of sections is expected")
        tree = {str(key): value for key, value in (tree or {}).items()}  # any other is no section
    override_tree: dict[str, Any] = {}
    lines: list[str] = []
    for item in overrides:
        try:
            _override(override_tree, item)
        except ValueError as error:
            lines.append(f"  --set {item}: {error}")

    trees = [override_tree, tree]
    if not any("pools" in each for each in trees):
        trees.append({"pools": {"main": None}})  # the one by default
    environment = Environment(Config, trees)

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
            return init_settings, environment, InitSettingsSource(settings_cls, tree)

    lines += [f"  {line}" for line in _strangers()]
    lines += [f"  {unclear}" for unclear in environment.unclear]
    try:
        config = FromFile(**override_tree)
    except ValidationError as error:
        for wrong in error.errors():
            where, kind = wrong["loc"], wrong["type"]
            hint = _nearest(where) if kind == "extra_forbidden" else _WRITTEN.get(kind, "")
            if kind == "string_type" and isinstance(wrong["input"], dict):
                hint = _QUOTED
            variable = environment.gave(where, wrong["input"])
            key = ".".join(map(str, where)) or "(top)"
            lines.append(f"  {key}: {wrong['msg']}{hint}" + (f" ({variable})" if variable else ""))
    if lines:
        raise ConfigError(
            f"{path or 'configuration'}: {len(lines)} problem(s)\n" + "\n".join(lines)
        ) from None
    return config


def _override(tree: dict[str, Any], item: str) -> None:
    """Put one ``dotted.key=value`` into ``tree``. Raises ValueError."""
    key, equals, value = item.partition("=")
    if not equals:
        raise ValueError("expected key=value")
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"{parent} is set to a value already")
        tree = child
    try:
        tree[leaf] = parse(value)
    except yaml.YAMLError as error:
        raise ValueError(f"the value is no YAML: {error}") from error


def _strangers() -> Iterator[str]:
    """A line for each environment variable that looks like a setting, and is none.

    Nothing else would tell: an unknown key within a section is refused, an unknown section is not,
    and ``MEMSHARE_RUN_DIR`` with one underscore is no section at all.
    """
    known = Config.model_config
    prefix, delimiter = known["env_prefix"], known["env_nested_delimiter"] or ""
    single = {
        f"{section}_{key}": f"{prefix}{section}{delimiter}{key}".upper()
        for section, field in Config.model_fields.items()
        for key in getattr(field.annotation, "model_fields", ())
    }
    for name in sorted(os.environ):
        if name.upper().startswith(prefix):
            rest = name[len(prefix) :].lower()
            section, nested, _ = rest.partition(delimiter)
            if nested and section not in Config.model_fields:
                yield f"{name}: no such section{_nearest((section,))}"
            elif rest in single:
                yield f"{name}: no setting; did you mean {single[rest]}?"


def positive(text: str) -> int:
    """``text`` as an integer of at least 1, for a parser's ``type``."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _nearest(location: tuple[int | str, ...]) -> str:
    """For the place of an unknown key: which known one beside it may have been meant, if any."""
    *parents, key = location
    keys: Any = Config
    for parent in parents:
        if get_origin(keys) is dict:
            keys = get_args(keys)[1]
        else:
            keys = keys.model_fields[str(parent)].annotation
    found = get_close_matches(str(key), keys.model_fields, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a program's parser ``--config FILE`` and ``--set key=value``."""
    parser.add_argument("--config", type=Path, help="YAML configuration (see configs/)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="override one setting, e.g. training.lr=1e-5 (repeatable)",
    )  # fmt: skip
