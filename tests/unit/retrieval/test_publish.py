"""Publishing: order, links, pins, pruning, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memshare.config import Config, IndexConfig
from memshare.pool.store import PoolStore
from memshare.retrieval.blobs import PoorIndex
from memshare.retrieval.build import Built, build_generation
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.generation import best, current, generations, load, verify_generation
from memshare.retrieval.manifest import DamagedGeneration, NoGeneration, read_manifest
from memshare.retrieval.publish import PublishError, activate, publish, unpin
from memshare.retrieval.shelf import Lease, numbers
from tests.retrieving import fill, make_config, open_store, publish_now


@pytest.fixture
def config(tmp_path: Path, folders: list[Path]) -> Config:
    return make_config(tmp_path / "run", folders[0])


@pytest.fixture
def store(config: Config) -> Iterator[PoolStore]:
    with open_store(config) as opened:
        fill(opened, "p", 12)
        yield opened


@pytest.fixture
def encoder(folders: list[Path]) -> Encoder:
    return Encoder.from_folder(folders[0], device="cpu")


def leftovers(config: Config) -> list[str]:
    temporary = (".tmp", ".trash", ".CURRENT")
    return [item.name for item in config.retriever_dir.iterdir() if item.name.startswith(temporary)]


def test_what_is_published_is_loaded(store: PoolStore, config: Config, encoder: Encoder) -> None:
    built = build_generation(store, config, encoder)
    number = publish_now(store, config, encoder, metrics={"gate": {"passed": True}})
    assert number == 1 == current(config.retriever_dir)
    generation = load(config.retriever_dir, device="cpu")
    assert generation.manifest.positions == {"p": 12}
    assert [item.decode() for item in generation.ids["p"]] == built.ids
    assert np.array_equal(generation.indexes["p"].reconstruct(np.arange(12)), built.vectors)
    assert np.allclose(generation.encoder.encode_queries(["x"]), encoder.encode_queries(["x"]))
    assert json.loads((generation.folder / "metrics.json").read_text())["gate"]["passed"] is True
    generation.close()
    assert leftovers(config) == []


def test_no_pickle_in_ids(store: PoolStore, config: Config, encoder: Encoder) -> None:
    publish_now(store, config, encoder)
    ids = np.load(config.retriever_dir / "000001" / "ids.npy", allow_pickle=False)
    assert ids.dtype.kind == "S"


def test_an_empty_pool_is_published(config: Config, encoder: Encoder) -> None:
    with open_store(config) as store:
        publish_now(store, config, encoder)
    generation = load(config.retriever_dir, device="cpu")
    assert len(generation.ids["p"]) == 0
    generation.close()


def test_unchanged_files_are_links_and_changed_ones_are_not(
    store: PoolStore, config: Config, encoder: Encoder, folders: list[Path]
) -> None:
    publish_now(store, config, encoder)
    publish_now(store, config, encoder, parent=1)
    fill(store, "p", 1, seed=9)
    publish_now(store, config, encoder, parent=2)
    other = Encoder.from_folder(folders[1], device="cpu")
    publish_now(store, config, other, parent=3, keep=9)

    def same(name: str, a: int, b: int) -> bool:
        first, second = (config.retriever_dir / f"{number:06d}" / name for number in (a, b))
        return first.samefile(second)

    weights = "encoder/model.safetensors"
    assert same("index.faiss", 1, 2) and same("ids.npy", 1, 2) and same(weights, 1, 2)
    assert same(weights, 2, 3) and not same("index.faiss", 2, 3)
    assert not same(weights, 3, 4)
    for number in (2, 3, 4):
        verify_generation(config.retriever_dir, number)


def test_vectors_of_the_same_memory_tower_are_copied(
    store: PoolStore, config: Config, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_now(store, config, encoder)
    added = fill(store, "p", 3, seed=9)
    gone = next(iter(store.iter("p")))
    store.delete(gone.id)
    want = build_generation(store, config, encoder)
    encoder.split()
    with torch.no_grad():
        encoder.tower("query").get_input_embeddings().weight.mul_(-1)
    encoded: list[str] = []
    real = Encoder.encode_memories

    def counted(self: Encoder, pairs: Any) -> Any:
        encoded.extend(prompt for prompt, _ in pairs)
        return real(self, pairs)

    monkeypatch.setattr(Encoder, "encode_memories", counted)
    built = build_generation(store, config, encoder)
    assert encoded == [memory.prompt for memory in added]
    assert built.ids == want.ids and gone.id not in built.ids
    assert np.allclose(built.vectors, want.vectors, rtol=0, atol=1e-6)
    (config.retriever_dir / "000001" / "ids.npy").write_bytes(b"torn")
    encoded.clear()
    again = build_generation(store, config, encoder)  # damaged: nothing is copied from it
    assert len(encoded) == len(built.ids)
    assert np.allclose(again.vectors, want.vectors, rtol=0, atol=1e-6)
    with torch.no_grad():
        encoder.tower("memory").get_input_embeddings().weight.mul_(-1)
    encoded.clear()
    build_generation(store, config, encoder)
    assert len(encoded) == len(built.ids)


def test_a_damaged_parent_is_not_linked(store: PoolStore, config: Config, encoder: Encoder) -> None:
    publish_now(store, config, encoder)
    weights = config.retriever_dir / "000001" / "encoder" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    publish_now(store, config, encoder, parent=1)
    verify_generation(config.retriever_dir, 2)
    with pytest.raises(DamagedGeneration):
        verify_generation(config.retriever_dir, 1)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_recall_is_in_the_manifest_and_a_floor_refuses_the_build(
    store: PoolStore, config: Config, encoder: Encoder, kind: str
) -> None:
    with open_store(config) as more:
        fill(more, "p", 400, seed=3)
    good = {"kind": kind, "approximate_from": 100, "nprobe": 100, "ef_search": 200}
    index = IndexConfig.model_validate(good)
    one = publish_now(store, config, encoder, index=index)
    generation = load(config.retriever_dir, device="cpu")
    assert generation.indexes["p"].kind == generation.manifest.index["kind"] == kind
    assert 0.9 <= generation.manifest.recall_at_10["p"] <= 1.0
    generation.close()
    verify_generation(config.retriever_dir, one)
    again = publish_now(store, config, encoder, parent=one, index=index)  # linked, figure and all
    manifest = read_manifest(config.retriever_dir / f"{again:06d}")
    assert manifest.recall_at_10 == generation.manifest.recall_at_10
    files = [config.retriever_dir / f"{number:06d}" / "index.faiss" for number in (one, again)]
    assert files[0].samefile(files[1])
    poor = {**good, "nprobe": 1, "nlist": 10, "links": 4, "ef_search": 1, "ef_construction": 1}
    strict = IndexConfig.model_validate({**poor, "recall_floor": 1.0})
    with pytest.raises(PoorIndex, match=r"recall_floor 1: p 0\.\d+\. Raise .*nprobe"):
        publish_now(store, config, encoder, parent=again, index=strict)
    assert current(config.retriever_dir) == again and leftovers(config) == []
    flat = publish_now(store, config, encoder, parent=again)
    assert read_manifest(config.retriever_dir / f"{flat:06d}").recall_at_10 == {}


def test_half_precision_is_not_copied_into_full(
    store: PoolStore, config: Config, encoder: Encoder
) -> None:
    publish_now(store, config, encoder, index=IndexConfig(precision="float16"))
    halved = load(config.retriever_dir, device="cpu")
    kept = halved.indexes["p"].reconstruct(np.arange(12))
    halved.close()
    built = build_generation(store, config, encoder)
    assert 0 < np.abs(kept - built.vectors).max() < 5e-4
    assert (halved.folder / "index.faiss").stat().st_size < 12 * encoder.dim * 4


def test_vectors_of_another_encoder_are_refused(
    store: PoolStore, config: Config, encoder: Encoder, folders: list[Path]
) -> None:
    built = build_generation(store, config, Encoder.from_folder(folders[1], device="cpu"))
    with pytest.raises(PublishError, match="another encoder"):
        publish(
            config.retriever_dir, encoder=encoder, parent=None, metrics={}, keep=3,
            **built.parts(),
        )  # fmt: skip
    assert current(config.retriever_dir) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ["a"]}, "vectors are"),
        ({"ids": ["a"] * 12}, "distinct"),
        ({"positions": {"q": 3}}, "positions"),
        ({"spans": {"p": (0, 11)}}, "rows end at 11"),
        ({"spans": {"p": (1, 12)}}, r"\[1, 12\) but 0"),
        ({"vectors": np.zeros((12, 32), np.float32)}, "unit"),
        ({"vectors": np.full((12, 32), np.nan, np.float32)}, "unit"),
        ({"vectors": np.eye(12, 32)}, "float64"),
        ({"metrics": {"x": float("nan")}}, "JSON"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    store: PoolStore, config: Config, encoder: Encoder, change: dict[str, Any], message: str
) -> None:
    built = build_generation(store, config, encoder)
    parts = {**built.parts(), "metrics": {}, **change}
    with pytest.raises(PublishError, match=message):
        publish(config.retriever_dir, encoder=encoder, parent=None, keep=3, **parts)
    assert numbers(config.retriever_dir) == []


def test_publishers_obey_the_pin(
    store: PoolStore, config: Config, encoder: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_now(store, config, encoder)
    publish_now(store, config, encoder)
    activate(config.retriever_dir, 1)
    assert current(config.retriever_dir) == 1
    assert publish_now(store, config, encoder) == 3
    assert current(config.retriever_dir) == 1 and "pinned" in capsys.readouterr().err
    assert unpin(config.retriever_dir) == 1 and current(config.retriever_dir) == 1
    assert unpin(config.retriever_dir) is None
    publish_now(store, config, encoder)
    assert current(config.retriever_dir) == 4


def test_only_whole_generations_are_activated(
    store: PoolStore, config: Config, encoder: Encoder
) -> None:
    publish_now(store, config, encoder)
    publish_now(store, config, encoder)
    (config.retriever_dir / "000001" / "ids.npy").write_bytes(b"torn")
    with pytest.raises(DamagedGeneration):
        activate(config.retriever_dir, 1)
    with pytest.raises(NoGeneration):
        activate(config.retriever_dir, 7)
    assert current(config.retriever_dir) == 2
    assert publish_now(store, config, encoder) == 3 == current(config.retriever_dir)


def test_pruning_keeps_the_newest_current_best_and_leased(
    store: PoolStore, config: Config, encoder: Encoder
) -> None:
    publish_now(store, config, encoder, keep=9)  # 1: the best
    publish_now(store, config, encoder, keep=9, best=1)  # 2: leased
    publish_now(store, config, encoder, keep=9, best=1)  # 3: pinned
    lease = Lease(config.retriever_dir, 2)
    activate(config.retriever_dir, 3)
    for _ in range(3):
        publish_now(store, config, encoder, keep=1, best=1)
    assert numbers(config.retriever_dir) == [1, 2, 3, 6]
    assert best(config.retriever_dir) == 1
    lease.release()
    publish_now(store, config, encoder, keep=1)
    assert numbers(config.retriever_dir) == [3, 7]
    assert [manifest.number for manifest in generations(config.retriever_dir)] == [3, 7]


def test_a_killed_reader_leaves_no_lease(
    store: PoolStore, config: Config, encoder: Encoder
) -> None:
    publish_now(store, config, encoder, keep=1)
    code = (
        "import sys, time; from pathlib import Path; from memshare.retrieval.shelf import Lease\n"
        "lease = Lease(Path(sys.argv[1]), 1); print('held', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(config.retriever_dir)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        publish_now(store, config, encoder, keep=1)
        assert numbers(config.retriever_dir) == [1, 2]
    finally:
        child.kill()
        child.wait()
    publish_now(store, config, encoder, keep=1)
    assert numbers(config.retriever_dir) == [3]


def test_a_lease_never_loses_to_pruning(store: PoolStore, config: Config, encoder: Encoder) -> None:
    """Readers lease CURRENT over and over while a publisher that keeps one goes on and on."""
    publish_now(store, config, encoder, keep=1)
    stop, problems, loads = threading.Event(), [], []

    def reader() -> None:
        while not stop.is_set():
            try:
                lease = None
                number = current(config.retriever_dir)
                assert number is not None
                try:
                    lease = Lease(config.retriever_dir, number)
                except NoGeneration:
                    continue  # pruned before the lease was taken: allowed
                stop.wait(0.002)
                if not (config.retriever_dir / f"{number:06d}" / "manifest.json").is_file():
                    problems.append(f"{number} was deleted under its lease")
                loads.append(number)
                lease.release()
            except BaseException as error:
                problems.append(repr(error))
                raise

    threads = [threading.Thread(target=reader) for _ in range(3)]
    for thread in threads:
        thread.start()
    built = build_generation(store, config, encoder)
    for _ in range(25):
        publish(
            config.retriever_dir, encoder=encoder, parent=None, metrics={}, keep=1, **built.parts()
        )
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(set(loads)) > 5, "the race was not exercised"
    loaded = load(config.retriever_dir, device="cpu")
    assert loaded.number == 26
    loaded.close()


def test_two_publishers_at_once(store: PoolStore, config: Config, folders: list[Path]) -> None:
    """Neither loses its generation, nor sweeps the other's temporary folder away."""
    made: list[int] = []

    def work(seed: int) -> None:
        mine = Encoder.from_folder(folders[seed], device="cpu")
        for _ in range(3):
            made.append(publish_now(store, config, mine, keep=9))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [1, 2, 3, 4, 5, 6]
    for number in made:
        verify_generation(config.retriever_dir, number)


def test_a_folder_left_by_a_crash_is_swept(
    store: PoolStore, config: Config, encoder: Encoder
) -> None:
    publish_now(store, config, encoder)
    (config.retriever_dir / ".tmp-dead").mkdir()
    (config.retriever_dir / ".tmp-dead.lock").touch()
    (config.retriever_dir / ".tmp-renamed.lock").touch()
    (config.retriever_dir / ".tmp-unlocked").mkdir()
    (config.retriever_dir / ".trash-000009").mkdir()
    (config.retriever_dir / ".CURRENT.99.tmp").write_text("9\n")
    publish_now(store, config, encoder)
    assert leftovers(config) == []


def test_built_rows_are_those_of_living_memories(
    store: PoolStore, config: Config, encoder: Encoder
) -> None:
    memories = fill(store, "p", 3, seed=5)
    store.delete(memories[0].id)
    store.hold(memories[1].id)
    built: Built = build_generation(store, config, encoder)
    assert memories[2].id in built.ids and len(built.ids) == 13
    assert built.positions == {"p": store.last_seq("p")} and built.spans == {"p": (0, 13)}
