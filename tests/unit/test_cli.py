"""The dispatcher: every command helps, and help is quick because it imports little."""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from memshare.cli import COMMANDS, build_parser, main

SLOW = {"torch", "faiss", "transformers", "datasets", "sqlalchemy", "fastapi", "matplotlib"}


def actions(command: str) -> list[str]:
    """The actions of one command, read from its parser."""
    parser = build_parser(command)
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    own = commands.choices[command]._actions
    nested = [a for a in own if isinstance(a, argparse._SubParsersAction)]
    return [name for sub in nested for name in sub.choices]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_action_has_help(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([command], *([command, action] for action in actions(command))):
        with pytest.raises(SystemExit) as left:
            main([*words, "--help"])
        assert left.value.code == 0
        assert f"usage: memshare {' '.join(words)}" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_list_of_commands_agrees_with_the_rooms(command: str) -> None:
    subparsers = argparse.ArgumentParser().add_subparsers()
    importlib.import_module(COMMANDS[command][0]).add_parser(subparsers)
    assert list(subparsers.choices) == [command]


def test_help_names_every_command_and_imports_nothing_slow() -> None:
    code = (
        "import sys\nfrom memshare.cli import main\n"
        "try:\n    main(['--help'])\n"
        "finally:\n    print('MODULES', *sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, _, modules = done.stdout.partition("MODULES")
    assert all(name in text and summary in text for name, (_, summary) in COMMANDS.items())
    assert not SLOW & set(modules.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_loads_no_model_library(command: str) -> None:
    code = (
        "import sys\nfrom memshare.cli import main\n"
        f"try:\n    main([{command!r}, '--help'])\n"
        "finally:\n    print('MODULES', *sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.partition("MODULES")[2].split())
    assert not {"torch", "faiss", "transformers", "datasets"} & modules


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["pool"], ["pool", "nonsense"]])
def test_a_wrong_command_shows_usage_and_exits_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "usage: memshare" in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path) -> None:
    setup = [sys.executable, "-m", "memshare.cli", "pool"]
    url = ["--url", f"sqlite:///{tmp_path}/pool.db", "--pool", "main"]
    subprocess.run([*setup, "create", *url], check=True, capture_output=True)
    rows = "".join(f'{{"prompt": "p{n}", "answer": "{"x" * 1000}"}}\n' for n in range(2000))
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    subprocess.run([*setup, "import", str(path), *url], check=True, capture_output=True)
    export = subprocess.Popen(
        [*setup, "export", *url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert export.stdout is not None and export.stderr is not None
    assert export.stdout.readline()
    export.stdout.close()
    err = export.stderr.read()
    assert export.wait(timeout=60) == 141
    assert err == ""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*setup, "list", *url], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    told = "memshare: [Errno 28] No space left on device\n"
    assert (done.returncode, done.stderr.endswith(told), "Trace" in done.stderr) == (1, True, False)


def test_what_the_file_system_refuses_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, taken = tmp_path / "rows.jsonl", tmp_path / "taken"
    rows.write_text('{"query": "q", "pos": ["p"]}\n')
    taken.write_text("a file")
    assert main(["examples", "import", str(rows), str(taken)]) == 1
    assert capsys.readouterr().err.endswith(f"memshare: [Errno 17] File exists: '{taken}'\n")


def test_mcp_refuses_where_it_could_never_serve(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["mcp", "--pool", "p", "--url", "gateway:8000"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("memshare: 'gateway:8000' is no URL") and told.count("\n") == 1
    monkeypatch.setenv("MEMSHARE_KEY", "ms-\u2026")
    assert main(["mcp", "--pool", "p"]) == 2 and "MEMSHARE_KEY" in capsys.readouterr().err
    for port in ("0", "65536", "x"):
        with pytest.raises(SystemExit):
            main(["mcp", "--pool", "p", "--http", port])
        assert "port" in capsys.readouterr().err


def test_every_experiment_is_a_command() -> None:
    from memshare.evaluation import cli
    from memshare.evaluation.experiment import EXPERIMENTS, load_experiment

    assert tuple(cli.SUMMARIES) == EXPERIMENTS
    for name in EXPERIMENTS:
        assert load_experiment(name).name == name


@pytest.mark.parametrize("name", ["eval.yaml", "eval-vllm.yaml", "paper.yaml"])
def test_the_shipped_experiments_run_dry(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Their configuration is whole and their data is read; no model is loaded or asked for."""
    from memshare.evaluation.data import data_root

    try:
        data_root()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    config = Path(__file__).parents[2] / "configs" / name
    assert main(["eval", "all", "--config", str(config), "--dry-run"]) == 0
    plan = yaml.safe_load(capsys.readouterr().out)
    assert "pruning" in plan["experiments"]
    tests = {dataset for domain in plan["data"].values() for dataset in domain["tests"]}
    assert len(tests - {"world"}) == 9
