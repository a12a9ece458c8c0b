"""One tree of settings: every mistake at once, and who wins over whom."""

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from memshare.config import Config, ConfigError, load_config, public
from memshare.config.base import Section
from memshare.pool.errors import InvalidMemory
from memshare.pool.validate import check_pool_name
from tests.config_files import write

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("no_settings")


def test_defaults_stand_alone() -> None:
    config = load_config()
    assert config.run.dir == Path("runs/default")
    assert config.url == "sqlite:///runs/default/pool.db"
    assert config.served_pools == ("main",)


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "colour: red\n"
        "training:\n  lr: fast\n  epoch: 3\n  lora: {r: 0}\n"
        "pools:\n  a: {threshold: 101}\n"
        "scorer: {kind: coin}\n"
        "gateway: 7\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["gate.margin=-1", "agent.shot=2"])
    message = str(caught.value)
    assert str(path) in message.splitlines()[0] and "9 problem" in message.splitlines()[0]
    for key in ("colour", "training.lr", "training.epoch", "training.lora.r", "pools.a.threshold",
                "scorer.kind", "gateway", "gate.margin", "agent.shot"):  # fmt: skip
        assert any(line.startswith(f"  {key}: ") for line in message.splitlines()), key


def test_a_wrong_default_pool_and_retriever_pools_are_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.default_pool: no pool 'x'"):
        load_config(write(tmp_path, "gateway: {default_pool: x}"))
    both = "pools: {a: {}, b: {}}\nretriever: {pools: [a]}\n"
    with pytest.raises(ConfigError, match=r"gateway\.default_pool: .*retriever\.pools lacks 'b'"):
        load_config(write(tmp_path, both + "gateway: {default_pool: b}"))
    with pytest.raises(ConfigError, match=r"retriever\.pools.*'y'"):
        load_config(write(tmp_path, "retriever: {pools: [y]}"))
    with pytest.raises(ConfigError, match="at least one pool"):
        load_config(write(tmp_path, "pools: {}"))


def test_what_contradicts_is_told_with_all_other_mistakes(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "training: {lr: fast}\nretriever: {pools: [x]}\ngateway: {default_pool: y}\n"
        "agent_llm: {url: http://host, server: {replicas: 2}, retries: -1}\n"
        "scorer: {kind: likelihood}\nscorer_llm: {backend: openai}\n",
    )
    with pytest.raises(ConfigError, match="6 problem") as caught:
        load_config(path)
    for told in ("training.lr", "retriever.pools names", "gateway.default_pool: no pool 'y'",
                 "server.replicas counts", "agent_llm.retries", "scorer.kind: "):  # fmt: skip
        assert told in str(caught.value)


def test_infinity_is_no_setting() -> None:
    """A checkpoint is JSON, which can't hold it: a run would end at its first one."""
    keys = ("epochs", "lr", "max_grad_norm", "temperature", "weight_decay", "distill_weight",
            "false_negative_margin", "pool_temperature")  # fmt: skip
    for value in (".inf", ".nan", "1.0e+400"):
        with pytest.raises(ConfigError) as caught:
            load_config(None, [f"training.{key}={value}" for key in keys])
        assert f"{len(keys)} problem" in str(caught.value)
    assert load_config(None, ["training.max_grad_norm=null"]).training.max_grad_norm is None


def test_what_would_fail_only_in_use_is_no_setting(tmp_path: Path) -> None:
    """In the gate after a whole training, when a generation is published, or with a traceback."""
    path = write(tmp_path, "pools: {' a': {rubric: ' '}, '': {}, ok: {}}\n")
    with pytest.raises(ConfigError, match="7 problem") as caught:
        load_config(path, [
            "run.seed=-1", "gateway.port=65536", "scorer_llm.server.port=-1",
            "retriever.pools=[ok, ok]",
        ])  # fmt: skip
    for key in ("run.seed", "gateway.port", "scorer_llm.server.port", "retriever.pools: .*twice",
                "pools. a.\\[key]: .*printable", "pools. a.rubric", "pools..\\[key]"):  # fmt: skip
        assert re.search(f"\n  {key}", str(caught.value)), key


@pytest.mark.parametrize("name", ["a", "日本 b", " a", "a\n", "\u00a0", "", "x" * 200, "x" * 201])
def test_a_pool_that_can_be_configured_can_be_made(name: str) -> None:
    fits = True
    try:
        check_pool_name(name)
    except InvalidMemory:
        fits = False
    try:
        load_config(None, [f"pools={json.dumps({name: {}})}"])
        assert fits
    except ConfigError:
        assert not fits


def test_patience_needs_evaluations() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["training.patience=2", "training.lr=no"])
    assert "training.patience: " in str(caught.value) and "training.lr: " in str(caught.value)
    assert "training.eval_every asks for none" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["training.patience=2", "training.eval_every=0"])
    assert "training.patience" not in str(caught.value)  # it is the other one that is wrong
    assert load_config(None, ["training.patience=2", "training.eval_every=9"]).training.patience


def test_environment_beats_file_and_set_beats_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "training: {lr: 1.0, epochs: 7}\nrun: {seed: 1}\n")
    assert load_config(path).training.lr == 1.0
    monkeypatch.setenv("MEMSHARE_TRAINING__LR", "2.0")
    monkeypatch.setenv("MEMSHARE_RUN__SEED", "2")
    config = load_config(path)
    assert (config.training.lr, config.run.seed) == (2.0, 2)
    config = load_config(path, ["training.lr=3.0"])
    assert (config.training.lr, config.run.seed) == (3.0, 2)
    assert config.training.epochs == 7, "a setting beside the overridden one is kept"


def test_a_pool_set_beside_those_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "pools: {a: {threshold: 10}}")
    config = load_config(path, ["pools.a.rubric=logic", "retriever.pools=[a]"])
    assert (config.pools["a"].threshold, config.pools["a"].rubric) == (10, "logic")
    assert config.served_pools == ("a",)


def test_an_environment_mistake_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSHARE_AGENT__SHOTS", "many")
    with pytest.raises(ConfigError, match=r"agent\.shots"):
        load_config()


def test_an_environment_variable_for_no_section_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSHARE_TRANING__LR", "1.0")
    monkeypatch.setenv("MEMSHARE_RUN__SEED", "2")
    monkeypatch.setenv("MEMSHARE_URL", "http://localhost")  # the client's
    monkeypatch.setenv("MEMSHARE_LLM_API_KEY", "k")  # the backends'
    monkeypatch.setenv("MEMSHARE_RUN_DIR", "elsewhere")
    monkeypatch.setenv("MEMSHARE_AGENT__SHOTS", "many")
    with pytest.raises(ConfigError) as caught:
        load_config()
    told = str(caught.value)
    assert "3 problem(s)" in told and "agent.shots" in told
    assert "MEMSHARE_RUN_DIR: no setting; did you mean MEMSHARE_RUN__DIR?" in told
    assert "MEMSHARE_TRANING__LR: no such section; did you mean training?" in told
    monkeypatch.delenv("MEMSHARE_AGENT__SHOTS")
    with pytest.raises(ConfigError, match="MEMSHARE_TRANING__LR"):
        load_config()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lr", "--set training.lr: expected key=value"),
        ("run.seed.x=1", "--set run.seed.x=1: seed is set to a value already"),
        ("a=[", r"--set a=\[: the value is no YAML"),
        ("a=" + "9" * 5000, "the value is no YAML: Exceeds the limit"),
        ("a=" + "[" * 5000, "the value is no YAML: maximum recursion depth"),
        ("training={lr: 1, lr: 2}", "the value is no YAML: the key 'lr' stands here for a second"),
    ],
)
def test_a_bad_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"2 problem(.|\n)*{message}") as caught:
        load_config(None, ["run.seed=1", override, "gate.margin=-1"])
    assert "  gate.margin: " in str(caught.value)


def test_a_prefix_with_a_colon_is_to_be_quoted() -> None:
    with pytest.raises(ConfigError, match=r"query_prefix: .*valid string; a text with a colon is"):
        load_config(None, ["encoder.query_prefix=query: "])
    assert load_config(None, ['encoder.query_prefix="query: "']).encoder.query_prefix == "query: "


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "a: \x00", "[]", "false"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=str(path)):
        load_config(path)


def test_a_missing_or_undecodable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run: {dir: caf\xe9}")
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path / "latin.yaml")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """All that the first one says would be lost: a section added at the end of a copy, say."""
    path = write(tmp_path, "training: {lr: 1.0}\nrun: {}\ntraining: {epochs: 3}\n")
    with pytest.raises(ConfigError, match=r"'training' stands here for a second time\n.*line 3"):
        load_config(path)
    model = "agent_llm: &one {model: a, dtype: float32}\nscorer_llm: {<<: *one, model: b}\n"
    config = load_config(write(tmp_path, model))
    assert (config.scorer_llm.model, config.scorer_llm.dtype) == ("b", "float32")


def test_words_and_dates_are_text_and_switches_take_both(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "retriever: {gpu: on}\ntraining: {compile: yes, dropout: off}\nwandb: {name: 2026-13-01}\n"
        "gateway: {score_writes: true}\npools: {no: {hold_suspicious: False}}\n",
    )
    config = load_config(path, ["agent.instruction=yes"])
    assert (config.retriever.gpu, config.wandb.name) == ("on", "2026-13-01")
    assert (config.training.compile, config.training.dropout) == (True, False)
    assert (config.agent.instruction, config.gateway.score_writes) == ("yes", True)
    assert config.served_pools == ("no",) and not config.pools["no"].hold_suspicious


def test_a_key_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "1: {}\ntraining: {2: x}\npools: {3: {}}\n")
    with pytest.raises(ConfigError, match="3 problem") as caught:
        load_config(path)
    for key in ("1", "training.2", "pools.3"):
        assert f"\n  {key}" in str(caught.value)


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")).model_dump() == load_config().model_dump()


def test_settings_never_change_after_loading() -> None:
    config = load_config()
    with pytest.raises(ValueError, match="frozen"):
        config.training.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert isinstance(load_config(path), Config)


def test_a_second_iteration_needs_an_encoder_that_proposes() -> None:
    for wrong in ("mining.dense_candidates=0", "mining.labels=none"):
        with pytest.raises(ConfigError, match=r"mining\.iterations: .*needs an encoder"):
            load_config(None, ["mining.iterations=2", wrong])
    assert load_config(None, ["mining.iterations=2"]).mining.iterations == 2


def test_replicas_are_counted_from_a_url_that_ends_in_its_port() -> None:
    two = "agent_llm.server.replicas=2"
    for url in ("http://h:8001/x", "http://h:8001?a=1", "http://h", "http://h:8001/v1/x"):
        with pytest.raises(ConfigError, match=f"agent_llm.server: .*{re.escape(url)}$"):
            load_config(None, [two, f"agent_llm.url={url}"])
    for url in ("http://h:8001", "http://h:8001/", "http://h:8001/v1", "http://h:8001/v1/"):
        config = load_config(None, [two, f"agent_llm.url={url}"])
        assert config.agent_llm.urls == ("http://h:8001", "http://h:8002")


def test_adapters_have_no_past() -> None:
    with pytest.raises(ConfigError, match=r"training\.lora: .*training\.warm_optimizer"):
        load_config(None, ["training.warm_optimizer=true", "training.lora.enabled=true"])


def test_adapters_that_are_to_drop_inputs_need_dropout() -> None:
    asked = ["training.lora.enabled=true", "training.lora.dropout=0.2"]
    with pytest.raises(ConfigError, match=r"training\.lora: .*while training\.dropout is off"):
        load_config(None, asked)
    load_config(None, [*asked, "training.dropout=true"])
    load_config(None, asked[:1])


def test_what_is_shown_of_a_configuration_is_all_of_it() -> None:
    config = load_config(None, ["encoder.query_prefix='q: '", "training.matryoshka=[8, 4]"])
    assert public(config) == config.model_dump(mode="json")


def test_what_is_shown_of_a_configuration_has_no_secrets() -> None:
    config = load_config(None, [
        "database_url=postgresql+psycopg://writer:s3cret@/in@db.host:5432/pool?sslpassword=s3cret",
        "agent_llm.url=[http://s3cret@one:8001/v1, 'https://me:s3cret@two/v1?api_key=s3cret&v=2']",
        "agent_llm.server.env={HF_TOKEN: s3cret, VLLM_PORT: s3cret-too}",
        "scorer_llm.server.args=[--api-key, s3cret, s3cret, --seed, '7', --hf-token=s3cret]",
        "evaluation.agents={big: {server: {env: {A: s3cret}}, url: 'http://a:s3cret@three'}}",
    ])  # fmt: skip
    shown = public(config)
    assert "s3cret" not in repr(shown)
    url = "postgresql+psycopg://writer:***@db.host:5432/pool?sslpassword=***"
    assert shown["database_url"] == url
    assert shown["agent_llm"]["url"] == [
        "http://***@one:8001/v1", "https://***@two/v1?api_key=***&v=2",
    ]  # fmt: skip
    assert shown["agent_llm"]["server"]["env"] == {"HF_TOKEN": "***", "VLLM_PORT": "***"}
    args = ["--api-key", "***", "***", "--seed", "7", "--hf-token=***"]
    assert shown["scorer_llm"]["server"]["args"] == args
    assert shown["scorer_llm"]["api_key_env"] == "MEMSHARE_LLM_API_KEY"


@pytest.mark.parametrize(
    "url", ["sqlite:////data/pool.db", "postgresql+psycopg://writer@db/pool?connect_timeout=3"]
)
def test_a_url_without_a_secret_is_shown_as_it_is(url: str) -> None:
    assert public(load_config(None, [f"database_url={url}"]))["database_url"] == url


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("training.epoch=3", "training.epoch: .*; did you mean epochs\\?"),
        ("trainnig.lr=1", "trainnig: .*; did you mean training\\?"),
        ("agent_llm.server.replica=2", "agent_llm.server.replica: .*; did you mean replicas\\?"),
        ("pools.a.treshold=2", "pools.a.treshold: .*; did you mean threshold\\?"),
        ("gate.colour=red", "gate.colour: [^;]*$"),
    ],
)
def test_an_unknown_key_is_told_with_its_neighbour(setting: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(None, [setting])


def sections(base: type[BaseModel] = Section) -> Iterator[type[BaseModel]]:
    """Those of the tree; other programs have some of their own."""
    for section in base.__subclasses__():
        if section.__module__.startswith("memshare.config."):
            yield section
            yield from sections(section)


@pytest.mark.parametrize("section", [Config, *sections()], ids=lambda section: section.__name__)
def test_every_setting_is_documented(section: type[BaseModel]) -> None:
    """As ``key`` in its class's docstring, or in a comment behind it; a section has its own."""
    source = inspect.getsource(section)
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            continue
        named = re.search(rf"``{name}\b", section.__doc__ or "")
        assert named or re.search(rf"^    {name}: .*\S  # \S", source, re.MULTILINE), name
