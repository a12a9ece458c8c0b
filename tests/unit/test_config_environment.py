"""Settings from environment variables: lists, sections, and the names of pools."""

from __future__ import annotations

from pathlib import Path

import pytest

from memshare.config import ConfigError, load_config
from tests.config_files import write

pytestmark = pytest.mark.usefixtures("no_settings")


def test_lists_are_written_as_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSHARE_RETRIEVER__POOLS", "[main]")
    monkeypatch.setenv("MEMSHARE_TRAINING__MATRYOSHKA", "[64, 32]")
    monkeypatch.setenv("MEMSHARE_TRAINING", '{"lr": 1e-5, "epochs": 2}')
    monkeypatch.setenv("MEMSHARE_AGENT_LLM__URL", "[http://one:1, http://two:1]")
    monkeypatch.setenv("MEMSHARE_AGENT__INSTRUCTION", "Answer: [briefly]")  # text stays text
    config = load_config()
    assert config.retriever.pools == ("main",)
    assert config.training.matryoshka == (64, 32)
    assert (config.training.lr, config.training.epochs) == (1e-5, 2)
    assert config.agent_llm.urls == ("http://one:1", "http://two:1")
    assert config.agent.instruction == "Answer: [briefly]"


def test_null_is_none_as_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was text: a database of that name, or no integer."""
    path = write(
        tmp_path, "training: {max_steps: 5, max_grad_norm: 2.0}\ndatabase_url: sqlite:///x"
    )
    monkeypatch.setenv("MEMSHARE_TRAINING__MAX_STEPS", "null")
    monkeypatch.setenv("memshare_training__max_grad_norm", "~")
    monkeypatch.setenv("MEMSHARE_DATABASE_URL", "Null")
    monkeypatch.setenv("MEMSHARE_AGENT__INSTRUCTION", "")
    config = load_config(path)
    assert (config.training.max_steps, config.training.max_grad_norm) == (None, None)
    assert (config.database_url, config.agent.instruction) == (None, "")
    assert load_config(path, ["training.max_steps=7"]).training.max_steps == 7


@pytest.mark.parametrize(
    ("variable", "text", "told"),
    [
        ("MEMSHARE_RETRIEVER__POOLS", "main", r"retriever.pools: .*written \[a, b\]"),
        ("MEMSHARE_RETRIEVER__POOLS", "[main", r"retriever.pools: .*written \[a, b\]"),
        ("MEMSHARE_RETRIEVER__POOLS", "", r"retriever.pools: .*written \[a, b\]"),
        ("memshare_training__Matryoshka", "64,32", r"training.matryoshka: .*written \[a, b\]"),
        ("MEMSHARE_TRAINING", "lr=1", r"training: .*written \{key: value\}"),
        ("MEMSHARE_TRAINING__LR", "fast", "training.lr: "),
        ("MEMSHARE_TRAINING__LR", "null", "training.lr: "),
    ],
)
def test_a_wrong_value_is_told_with_its_variable_and_all_the_rest(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, told: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigError, match=rf"2 problem.*\n(.*\n)?  {told}") as caught:
        load_config(None, ["run.seed=x"])
    (line,) = (line for line in str(caught.value).splitlines() if variable in line)
    assert line.endswith(f"({variable})")


def test_a_variable_that_set_wins_over_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSHARE_TRAINING__LR", "1.0")
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["training.lr=fast"])
    assert "MEMSHARE" not in str(caught.value)


def test_names_of_pools_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "pools: {Commons: {threshold: 10, rubric: logic}}")
    for variable in ("MEMSHARE_POOLS__Commons__THRESHOLD", "MEMSHARE_POOLS__COMMONS__THRESHOLD"):
        monkeypatch.setenv(variable, "20")
        pools = load_config(path, ["pools.Extra.threshold=30"]).pools
        assert set(pools) == {"Commons", "Extra"}
        assert (pools["Commons"].threshold, pools["Commons"].rubric) == (20, "logic")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("MEMSHARE_POOLS__EXTRA__RUBRIC", "logic")
    pools = load_config(path, ["pools.Extra.threshold=30"]).pools
    assert (pools["Extra"].threshold, pools["Extra"].rubric) == (30, "logic")


def test_a_new_name_is_as_the_variable_spells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSHARE_POOLS__MAIN__THRESHOLD", "20")  # there without a file, too
    monkeypatch.setenv("MEMSHARE_POOLS__Mine__THRESHOLD", "30")
    monkeypatch.setenv("MEMSHARE_AGENT_LLM__SERVER__ENV__HF_TOKEN", "abc")
    config = load_config()
    assert {name: pool.threshold for name, pool in config.pools.items()} == {"main": 20, "Mine": 30}
    assert config.agent_llm.server.env == {"HF_TOKEN": "abc"}


def test_the_pool_by_default_is_none_where_others_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMSHARE_POOLS__MAIN__THRESHOLD", "20")
    assert load_config(write(tmp_path, "pools: {Main: {}}")).pools["Main"].threshold == 20


def test_a_name_that_may_be_either_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "pools: {Commons: {}, commons: {}}")
    monkeypatch.setenv("MEMSHARE_POOLS__commons__THRESHOLD", "20")
    assert load_config(path).pools["commons"].threshold == 20
    monkeypatch.setenv("MEMSHARE_POOLS__COMMONS__THRESHOLD", "30")
    monkeypatch.setenv("MEMSHARE_RUN__SEED", "no")
    with pytest.raises(ConfigError, match="2 problem") as caught:
        load_config(path)
    assert "MEMSHARE_POOLS__COMMONS__THRESHOLD: Commons or commons?" in str(caught.value)
