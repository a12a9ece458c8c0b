"""Loading: whatever is torn, altered or foreign is refused, and the old one serves on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from memshare.cli import main
from memshare.config import Config
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.generation import current, load, load_current
from memshare.retrieval.index import FlatIndex
from memshare.retrieval.index_file import write_indexes
from memshare.retrieval.manifest import (
    MANIFEST,
    DamagedGeneration,
    NoGeneration,
    describe,
    read_manifest,
)
from memshare.retrieval.publish import activate
from tests.retrieving import fill, make_config, open_store, publish_now
from tests.tiny import tiny_encoder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two generations of two pools."""
    base = tmp_path_factory.mktemp("prepared")
    encoder = tiny_encoder(base / "encoder")
    tiny_encoder(base / "other", seed=1)
    config = make_config(base / "run", encoder, ("p", "q"))
    with open_store(config) as store:
        fill(store, "p", 5)
        fill(store, "q", 4)
        publish_now(store, config, Encoder.from_folder(encoder, device="cpu"))
        fill(store, "p", 2, seed=1)
        publish_now(store, config, Encoder.from_folder(encoder, device="cpu"))
    return base


@pytest.fixture
def config(prepared: Path, tmp_path: Path) -> Iterator[Config]:
    shutil.copytree(prepared / "run", tmp_path / "run")
    yield make_config(tmp_path / "run", prepared / "encoder", ("p", "q"))


def rewrite(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change the manifest as someone would who knows how its digest is made."""
    manifest = read_manifest(folder)
    tree = json.loads(manifest.dump())
    change(tree)
    del tree["digest"]
    from memshare.retrieval.manifest import _digest

    (folder / MANIFEST).write_text(json.dumps({**tree, "digest": _digest(tree)}))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def re_described(folder: Path) -> None:
    def change(tree: dict[str, object]) -> None:
        tree["files"] = {
            name: {"sha256": blob.sha256, "size": blob.size}
            for name, blob in describe(folder).items()
        }

    rewrite(folder, change)


def no_unpickling(folder: Path) -> None:
    np.save(folder / "ids.npy", np.array(["x"] * 11, dtype=object), allow_pickle=True)
    re_described(folder)


def short_index(folder: Path) -> None:
    write_indexes(folder / "index.faiss", [FlatIndex.build(np.eye(3, 32, dtype=np.float32))])
    re_described(folder)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda f: (f / MANIFEST).unlink(),
    "torn manifest": lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text()[:200]),
    "empty manifest": lambda f: (f / MANIFEST).write_text(""),
    "manifest is a list": lambda f: (f / MANIFEST).write_text("[]"),
    "manifest is not UTF-8": lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"),
    "altered manifest": lambda f: (f / MANIFEST).write_text(
        (f / MANIFEST).read_text().replace('"main"', '"else"')
    ),
    "another number": lambda f: rewrite(f, lambda tree: tree.update(number=1)),
    "another metric": lambda f: rewrite(f, lambda tree: tree.update(metric="l2")),
    "unknown field": lambda f: rewrite(f, lambda tree: tree.update(extra=1)),
    "overlapping spans": lambda f: rewrite(
        f, lambda tree: tree.update(spans={"p": [0, 7], "q": [6, 11]})
    ),
    "another dimension": lambda f: rewrite(f, lambda tree: tree.update(dimension=31)),
    "missing index": lambda f: (f / "index.faiss").unlink(),
    "torn index": lambda f: (f / "index.faiss").write_bytes(b"IxFI"),
    "flipped index": lambda f: flip(f / "index.faiss"),
    "flipped ids": lambda f: flip(f / "ids.npy"),
    "flipped weights": lambda f: flip(f / "encoder" / "model.safetensors"),
    "flipped tokenizer": lambda f: flip(f / "encoder" / "tokenizer.json"),
    "a file too many": lambda f: (f / "encoder" / "adapter_config.json").write_text("{}"),
    "a link out": lambda f: (f / "encoder" / "extra").symlink_to("/etc/hostname"),
    "pickled ids": no_unpickling,
    "another index": short_index,
    "pickled weights": lambda f: (
        (f / "encoder" / "pytorch_model.bin").write_bytes(b"x"),
        re_described(f),
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_and_the_old_one_loads(config: Config, kind: str) -> None:
    home = config.retriever_dir
    DAMAGE[kind](home / "000002")
    told = "or of another version of memshare" if kind == "unknown field" else "000002: .*"
    with pytest.raises(DamagedGeneration, match=told):
        load(home, device="cpu")
    older = load_current(home, device="cpu")
    assert older is not None and older.number == 1
    older.close()


def test_a_damaged_one_after_a_roll_back_gives_way_to_an_older_one(
    config: Config, prepared: Path
) -> None:
    """Not to the newer one, which somebody has rolled back from."""
    home = config.retriever_dir
    with open_store(config) as store:
        publish_now(store, config, Encoder.from_folder(prepared / "encoder", device="cpu"))
    activate(home, 2)
    flip(home / "000002" / "ids.npy")
    older = load_current(home, device="cpu")
    assert older is not None and older.number == 1
    older.close()


def test_an_encoder_that_did_not_build_the_vectors_is_refused(
    config: Config, prepared: Path
) -> None:
    """All hashes are right; only the fingerprint tells."""
    folder = config.retriever_dir / "000002"
    shutil.rmtree(folder / "encoder")
    shutil.copytree(prepared / "other", folder / "encoder")
    re_described(folder)
    with pytest.raises(DamagedGeneration, match="not the one that built"):
        load(config.retriever_dir, device="cpu")


def test_pools_have_indexes_of_their_own(config: Config) -> None:
    generation = load(config.retriever_dir, device="cpu")
    assert {pool: len(index) for pool, index in generation.indexes.items()} == {"p": 7, "q": 4}
    assert {pool: len(ids) for pool, ids in generation.ids.items()} == {"p": 7, "q": 4}
    with open_store(config) as store:
        for pool in ("p", "q"):
            expected = [memory.id for memory in store.iter(pool)]
            assert [item.decode() for item in generation.ids[pool]] == expected
    generation.close()


def test_nothing_published(tmp_path: Path) -> None:
    assert current(tmp_path) is None
    assert load_current(tmp_path) is None
    with pytest.raises(NoGeneration, match="nothing was published"):
        load(tmp_path)
    with pytest.raises(NoGeneration):
        load(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_all_damaged(config: Config) -> None:
    for folder in (config.retriever_dir).glob("0*"):
        flip(folder / "ids.npy")
    with pytest.raises(DamagedGeneration, match="no intact generation"):
        load_current(config.retriever_dir)


@pytest.mark.parametrize("content", [b"", b"two\n", b"2 pin\n", b"\xff"])
def test_a_damaged_current_file(config: Config, content: bytes) -> None:
    (config.retriever_dir / "CURRENT").write_bytes(content)
    with pytest.raises(DamagedGeneration, match="CURRENT"):
        load(config.retriever_dir)
    newest = load_current(config.retriever_dir, device="cpu")
    assert newest is not None and newest.number == 2
    newest.close()


def test_a_damaged_current_file_hides_no_generation(
    config: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Whoever is told to activate one wants to know which there are."""
    file = tmp_path / "config.yaml"
    file.write_text(f"run: {{dir: {config.run.dir}}}\n")
    (config.retriever_dir / "CURRENT").write_bytes(b"")
    assert main(["generations", "list", "--config", str(file), "--json"]) == 2
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["generation"], row["current"]) for row in rows] == [(1, False), (2, False)]
    assert "CURRENT: damaged; activate a generation" in err


def test_command_line(config: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"run: {{dir: {config.run.dir}}}\n")

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["generations", words[0], "--config", str(file), *words[1:]])
        out, err = capsys.readouterr()
        return code, out, err

    code, out, _ = run("list", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["current"] for row in rows] == [False, True]
    assert rows[1]["memories"] == 11 and rows[1]["positions"] == {"p": 7, "q": 4}
    assert run("verify")[0] == 0
    assert run("activate", "1")[0] == 0
    assert current(config.retriever_dir) == 1
    assert "* pinned" in run("list")[1]
    assert "1 is no longer pinned" in run("unpin")[1]
    assert "nothing is pinned" in run("unpin")[1]
    flip(config.retriever_dir / "000002" / "index.faiss")
    code, out, _ = run("verify")
    assert code == 1 and "index.faiss: its SHA-256 differs" in out
    code, _, err = run("activate", "2")
    assert code == 2 and "index.faiss" in err
    assert current(config.retriever_dir) == 1
    assert run("activate", "77")[0] == 2
