"""Training with a tower each for queries and memories, against plain autograd."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import metrics

from memshare.config import ConfigError, LoRAConfig, TrainingConfig
from memshare.retrieval.encoder import SIDES, Encoder
from memshare.retrieval.errors import EncoderError
from memshare.training import checkpoint
from memshare.training import towers as towers_module
from memshare.training.batching import Batches
from memshare.training.estimate import estimate
from memshare.training.export import export
from memshare.training.gather import World
from memshare.training.loss import info_nce_rows
from memshare.training.optimizer import make_optimizer, update
from memshare.training.select import select
from memshare.training.step import ContrastiveStep
from memshare.training.towers import FrozenMemories, compile_layers, prepare
from tests.tiny import tiny_encoder
from tests.training_data import examples

ONE = World(torch.device("cpu"))
PAIRS = [("tea of rain", "a cup"), ("iron", "rust")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny", query_prefix="q: ")


@pytest.fixture
def encoder(folder: Path) -> Encoder:
    return Encoder.from_folder(folder, device="cpu")


def make(encoder: Encoder, towers: str, **changes: object) -> tuple[Batches, TrainingConfig]:
    base = {"batch_size": 16, "dropout": False, "batch_tokens": 256, "graph_tokens": 700}
    config = TrainingConfig(**{**base, "towers": towers, **changes})  # type: ignore[arg-type]
    prepare(encoder, config, seed=1)
    items = select(examples(16), config).items
    return Batches(items, encoder, global_batch=16, seed=0), config


def engine(encoder: Encoder, data: Batches, config: TrainingConfig) -> ContrastiveStep:
    frozen = FrozenMemories.of(encoder, data, ONE, config)
    return ContrastiveStep(encoder, data.table, config, ONE, seed=0, frozen=frozen)


def gradients(encoder: Encoder) -> dict[str, Tensor]:
    named = encoder.model.named_parameters()
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    encoder.model.zero_grad(set_to_none=True)
    return found


def apart(encoder: Encoder) -> None:
    """Move the memories' tower away, so that mixing up the two would be seen."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in encoder.tower("memory").parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


@pytest.mark.parametrize("towers", ["separate", "query-only"])
def test_gradient_equals_the_direct_one(encoder: Encoder, towers: str) -> None:
    data, config = make(encoder, towers)
    apart(encoder)
    batch = data.batch(0)
    result = engine(encoder, data, config).backward(batch, 0)
    got = gradients(encoder)
    texts, docs, table = batch.texts, batch.docs, data.table
    memories = encoder.embed(encoder.collate(table.rows(texts[:docs])), "memory")
    queries = encoder.embed(encoder.collate(table.rows(texts[docs:])), "query")
    positive, valid = batch.masks(0, len(batch.rows), ONE.device)
    rows = torch.from_numpy(batch.rows) - docs
    loss = info_nce_rows(queries[rows], memories, positive, valid, config.temperature).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    want = gradients(encoder)
    assert result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    assert got.keys() == want.keys()
    sides = {name.split(".")[0] for name in got}
    assert sides == ({"query"} if towers == "query-only" else {"query", "memory"})
    assert max(float((got[n] - want[n]).abs().max()) for n in want) < 1e-5
    assert max(float(value.abs().max()) for value in want.values()) > 1e-3
    lengths = data.table.lengths[batch.texts[docs:] if towers == "query-only" else batch.texts]
    assert result.tokens == lengths.sum()
    told = estimate(encoder, data, 1, config, 1)
    assert told.tokens_per_step == lengths.sum()
    assert (told.trainable < told.parameters) == (towers == "query-only")


@pytest.mark.parametrize("towers", ["shared", "separate", "query-only"])
def test_an_estimate_has_the_vectors_that_a_run_keeps(encoder: Encoder, towers: str) -> None:
    data, config = make(encoder, towers)
    told = estimate(encoder, data, 1, config, 1)
    frozen = FrozenMemories.of(encoder, data, ONE, config)
    kept = [v for v in vars(frozen).values() if isinstance(v, Tensor)] if frozen else []
    assert told.frozen_bytes == sum(v.untyped_storage().nbytes() for v in kept)
    if towers == "query-only":
        assert told.frozen_bytes == len(data.doc_rows) * 32 * 4 > 0
    wide = replace(told, frozen_bytes=told.frozen_bytes + 7 * 2**20)
    before, after = (int(re.findall(r"about ([\d,]+) MiB", str(e))[0]) for e in (told, wide))
    assert after - before == 7 and ("frozen" in str(told)) == (towers == "query-only")


def test_an_estimate_knows_what_fsdp_divides(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 bytes a weight on each process, or 8 + 16 / W (memshare/training/sharding.py)."""
    data, config = make(encoder, "shared")

    def bytes_a_weight(processes: int) -> float:
        told = estimate(encoder, data, 1, config, processes)
        return (told.weights_bytes + told.optimizer_bytes) / told.parameters

    assert bytes_a_weight(4) == 16
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert bytes_a_weight(4) == 8 + 16 / 4
    assert bytes_a_weight(1) == 16  # nobody to share with


def train(encoder: Encoder, data: Batches, config: TrainingConfig) -> None:
    step, optimizer = engine(encoder, data, config), make_optimizer(encoder.model, config)
    for number in range(4):
        step.backward(data.batch(number), number)
        update(optimizer, 1e-2, 1.0)


@pytest.mark.parametrize("lora", [False, True])
def test_query_only_leaves_every_memory_vector_alone(
    encoder: Encoder, folder: Path, tmp_path: Path, lora: bool
) -> None:
    adapters = LoRAConfig(enabled=lora, r=4, alpha=8, dropout=0.0)
    data, config = make(encoder, "query-only", dropout=True, lora=adapters)
    train(encoder, data, config)
    export(encoder, tmp_path / "encoder", {})
    before = Encoder.from_folder(folder, device="cpu")
    after = Encoder.from_folder(tmp_path / "encoder", device="cpu")
    assert after.memory_fingerprint() == before.memory_fingerprint()
    assert (after.encode_memories(PAIRS) == before.encode_memories(PAIRS)).all()
    moved = abs(after.encode_queries(["iron"]) - before.encode_queries(["iron"])).max()
    assert moved > 1e-2
    assert abs(after.encode_queries(["iron"]) - encoder.encode_queries(["iron"])).max() < 1e-4


def test_two_towers_learn_apart_and_go_on_from_their_folder(
    encoder: Encoder, tmp_path: Path
) -> None:
    data, config = make(encoder, "separate")
    train(encoder, data, config)
    export(encoder, tmp_path / "encoder", {})
    again = Encoder.from_folder(tmp_path / "encoder", device="cpu")
    pairs = zip(again.tower("query").parameters(), again.tower("memory").parameters(), strict=True)
    assert any(not torch.equal(q, m) for q, m in pairs)
    middle = again.memory_fingerprint()
    data, config = make(again, "query-only")  # a later round may freeze what was trained before
    train(again, data, config)
    assert again.memory_fingerprint() == middle
    with pytest.raises(EncoderError, match=r"training\.towers"):
        prepare(again, TrainingConfig(), seed=0)


def no_dropout(encoder: Encoder) -> None:
    for module in encoder.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize(
    ("towers", "lora", "dropout"),
    [("shared", False, False), ("separate", False, True), ("query-only", True, False)],
    ids=["packed", "padded towers", "adapters"],
)
def test_compiled_layers_have_the_same_gradient_and_names(
    folder: Path, tmp_path: Path, towers: str, lora: bool, dropout: bool
) -> None:
    """Traced, but not made into kernels, which takes a compiler and a minute."""
    made: list[tuple[float, dict[str, Tensor]]] = []
    for compiled in (False, True):
        encoder = Encoder.from_folder(folder, device="cpu")
        adapters = LoRAConfig(enabled=lora, r=4, alpha=8, dropout=0.0)
        data, config = make(encoder, towers, dropout=dropout, lora=adapters)
        no_dropout(encoder)  # random numbers are drawn in another order: see the next test
        if compiled:
            for side in SIDES:
                compile_layers(encoder.tower(side), backend="aot_eager")
        loss = engine(encoder, data, config).backward(data.batch(0), 0).loss
        made.append((loss, gradients(encoder)))
        names = checkpoint.trainable(encoder.model).keys()
        assert not any("_orig_mod" in name for name in names)
    (want_loss, want), (loss, got) = made
    assert loss == pytest.approx(want_loss, abs=1e-5)
    assert got.keys() == want.keys() == names
    assert max(float((got[name] - want[name]).abs().max()) for name in want) < 1e-5
    export(encoder, tmp_path / "encoder", {})
    again = Encoder.from_folder(tmp_path / "encoder", device="cpu")
    assert abs(again.encode_queries(["iron"]) - encoder.encode_queries(["iron"])).max() < 1e-5


def test_compiled_layers_replay_their_dropout(folder: Path) -> None:
    found = []
    for kept in (100_000, 0):
        encoder = Encoder.from_folder(folder, device="cpu")
        data, config = make(encoder, "shared", dropout=True, graph_tokens=kept)
        compile_layers(encoder.model, backend="aot_eager")
        engine(encoder, data, config).backward(data.batch(0), 0)
        found.append(gradients(encoder))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_kernels_replay_their_dropout(encoder: Encoder) -> None:
    """By inductor, as a user gets it: the pass without gradients runs a graph of its own."""
    torch._dynamo.reset()  # a layer that other tests compiled too often is not compiled any more
    counters.clear()
    metrics.reset()
    data, config = make(encoder, "shared", dropout=True, compile=True)
    found = []
    for kept, step in ((100_000, 0), (0, 0), (0, 1)):
        settings = config.model_copy(update={"graph_tokens": kept})
        engine(encoder, data, settings).backward(data.batch(0), step)
        found.append(gradients(encoder))
    assert counters["stats"]["unique_graphs"] == 2 and metrics.generated_kernel_count > 10
    graphs, again, other = found
    assert all(torch.equal(graphs[name], again[name]) for name in graphs)
    assert max(float((graphs[name] - other[name]).abs().max()) for name in graphs) > 1e-2


def test_compiling_is_off_unless_asked_for(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(towers_module, "compile_layers", seen.append)
    prepare(encoder, TrainingConfig(), seed=1)
    assert not seen
    prepare(encoder, TrainingConfig(towers="separate", compile=True), seed=1)
    assert seen == [encoder.tower("query"), encoder.tower("memory")]


@pytest.mark.parametrize("towers", ["shared", "separate", "query-only"])
def test_widths_that_are_no_part_of_the_vectors_are_refused(encoder: Encoder, towers: str) -> None:
    """They would be the whole vectors once more."""
    prepare(encoder, TrainingConfig(towers=towers, matryoshka=(8, 31)), seed=1)  # type: ignore[arg-type]
    wide = TrainingConfig(towers=towers, matryoshka=(8, 32, 500))  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"training\.matryoshka: \[32, 500\] must be less than 32"
    ):
        prepare(encoder, wide, seed=1)
