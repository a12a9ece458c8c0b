"""Imports of Hugging Face data sets, from local folders."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from memshare.pool.errors import TransferError
from memshare.pool.mapping import parse_mapping
from memshare.pool.store import PoolStore
from memshare.pool.transfer import import_memories

MAPPING = parse_mapping(["prompt=text,answer=label"])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PoolStore]:
    with PoolStore.open(f"sqlite:///{tmp_path}/pool.db") as opened:
        opened.create_pool("main")
        yield opened


@pytest.fixture
def data() -> datasets.Dataset:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    return datasets.Dataset.from_dict(
        {"text": ["one", "two", None, "four"], "label": [1, 0, 1, -1]}, features=features
    )


def pairs(store: PoolStore) -> list[tuple[str, str]]:
    return [(m.prompt, m.answer) for m in store.iter("main")]


def test_a_saved_data_set(store: PoolStore, data: datasets.Dataset, tmp_path: Path) -> None:
    data.save_to_disk(tmp_path / "saved")
    report = import_memories(store, "main", tmp_path / "saved", mapping=MAPPING)
    assert pairs(store) == [("one", "yes"), ("two", "no")]
    assert [(e.line, e.reason) for e in report.errors] == [
        (3, "prompt: is missing"),
        (4, "answer: is missing"),
    ]


def test_a_saved_dictionary_of_splits(
    store: PoolStore, data: datasets.Dataset, tmp_path: Path
) -> None:
    splits = {"train": data.select([0]), "test": data.select([1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    import_memories(store, "main", tmp_path / "saved", mapping=MAPPING, split="test")
    assert pairs(store) == [("two", "no")]
    with pytest.raises(TransferError, match="train, test"):
        import_memories(store, "main", tmp_path / "saved", mapping=MAPPING, split="dev")


def test_a_folder_of_parquet_files(
    store: PoolStore, data: datasets.Dataset, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    data.select([0, 1]).to_parquet(tmp_path / "files" / "train.parquet")
    report = import_memories(store, "main", tmp_path / "files", mapping=MAPPING)
    assert (report.stored, report.bad) == (2, 0)
    assert pairs(store) == [("one", "yes"), ("two", "no")]
    with pytest.raises(TransferError, match="map them"):
        import_memories(store, "main", tmp_path / "files")


def test_chat_columns_need_no_mapping(store: PoolStore, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    datasets.Dataset.from_dict({"messages": [turns]}).save_to_disk(tmp_path / "saved")
    import_memories(store, "main", tmp_path / "saved")
    assert pairs(store) == [("q", "a")]


def test_a_damaged_file_is_named(store: PoolStore, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.parquet").write_bytes(b"PAR1 this is not parquet")
    with pytest.raises(TransferError, match=r"files.*can't be read"):
        import_memories(store, "main", tmp_path / "files", mapping=MAPPING)


def test_an_unreachable_hub_is_one_clear_message(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/pool.db"
    with PoolStore.open(url) as store:
        store.create_pool("main")
    done = subprocess.run(
        [sys.executable, "-m", "memshare.cli", "pool", "import", "nobody/nothing", "--pool", "main",
         "--url", url],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("memshare pool import: data set nobody/nothing")
    assert "Traceback" not in done.stderr
