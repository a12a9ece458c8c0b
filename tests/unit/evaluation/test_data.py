import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memshare.config import load_config
from memshare.evaluation.data import Pair, by_characters, load_domains, read_chat
from memshare.evaluation.lab import Lab
from memshare.evaluation.material import load_data

Rows = Sequence[tuple[str, str]]


def write_domain(folder: Path, files: Mapping[str, Rows]) -> None:
    folder.mkdir(parents=True)
    for name, rows in files.items():
        turns = [
            [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows
        ]
        lines = [json.dumps({"messages": two}, ensure_ascii=False) + "\n" for two in turns]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def test_ones_own_domains_are_read(tmp_path: Path) -> None:
    write_domain(tmp_path / "law", {"pool": [("q", "a")], "problems": [("p", "b"), ("empty", " ")],
                                    "test_torts": [("t", "r")]})  # fmt: skip
    write_domain(tmp_path / "both", {"pool": [("x", "y")]})
    found = load_domains(tmp_path)
    assert found["law"].pairs == (Pair("q", "a"), Pair("p", "b"))
    assert found["both"].tests == {"torts": (Pair("t", "r"),)} and not found["both"].problems
    # Beside a single domain, too, the mixed pool is not the one that experiments are about.
    lab: Any = SimpleNamespace(domains=found)
    assert Lab.own_pools.__get__(lab) == {"law": found["law"]}


@pytest.mark.parametrize("content", [None, 7, [{"type": "text", "text": "a"}]])
def test_an_answer_that_is_no_text_is_named(tmp_path: Path, content: object) -> None:
    path = tmp_path / "pool.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    path.write_text(json.dumps({"messages": turns}))
    with pytest.raises(ValueError, match=f"{path}:1: not a chat pair: .*must be text"):
        read_chat(path)


def test_two_datasets_of_one_name_or_none_are_refused(tmp_path: Path) -> None:
    write_domain(tmp_path / "a", {"pool": [("q", "a")]})
    with pytest.raises(ValueError, match="test_<dataset>"):
        load_domains(tmp_path)
    for name in ("b", "c"):
        write_domain(tmp_path / name, {"pool": [("q", "a")], "test_t": [("t", "r")]})
    with pytest.raises(ValueError, match="names of their own"):
        load_domains(tmp_path)


@pytest.mark.parametrize(("domain", "dataset"), [("world", "wars"), ("history", "average")])
def test_a_name_of_the_reports_own_is_refused(tmp_path: Path, domain: str, dataset: str) -> None:
    """It would be taken for the pocket world, or for the mean, and be in no average."""
    files = {"pool": [("q", "a")], f"test_{dataset}": [("t", "r")]}
    write_domain(tmp_path / domain, files)
    with pytest.raises(ValueError, match=f"{tmp_path}: (world|average) can't be the name"):
        load_data(load_config(None, [f"evaluation.data={tmp_path}"]))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("昔闻洞庭水，今上岳阳楼。", True),
        ("A poem: 昔", False),
        ("plain words", False),
        ("", False),
    ],
)
def test_chinese_is_measured_by_characters(answer: str, expected: bool) -> None:
    assert by_characters([Pair("q", answer)]) is expected
