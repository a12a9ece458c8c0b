"""What a run is said to need, against the tensors that autograd keeps, and for shipped settings."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from memshare.config import Config, LoRAConfig, TrainingConfig, load_config
from memshare.retrieval import packing
from memshare.retrieval.encoder import Encoder, pool_embeddings
from memshare.retrieval.encoder_format import Settings
from memshare.retrieval.ragged import Ragged
from memshare.training import activations
from memshare.training import estimate as estimate_module
from memshare.training.batching import Batches
from memshare.training.estimate import Estimate, estimate, similarities
from memshare.training.lora import add_adapters
from memshare.training.loss import objective_rows
from memshare.training.precision import Autocast
from memshare.training.select import select
from memshare.training.towers import prepare
from tests.tiny import tiny_encoder
from tests.training_data import examples

CONFIGS = Path(__file__).parents[3] / "configs"
CPU = torch.device("cpu")
GIB = 2**30
BERT_BASE = BertConfig(add_pooling_layer=False)
MINI_LM = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
# What each shipped configuration leaves of the memory that its comments name.
LEFT = {
    "h200.yaml": 141e9 * (1 - 0.3 - 0.2),
    "cluster.yaml": 80e9,
    "paper.yaml": 141e9 * (1 - 0.35 - 0.35),
    "cpu.yaml": 2 * GIB,
    "pocket.yaml": 2 * GIB,
    "eval.yaml": 2 * GIB,
    "eval-vllm.yaml": 2 * GIB,
}


def saved_bytes(model: nn.Module | None, forward: Callable[[], Tensor]) -> int:
    """Of all storages but the weights that autograd keeps of a forward pass."""
    weights = () if model is None else (*model.parameters(), *model.buffers())
    ours = {p.untyped_storage().data_ptr() for p in weights}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in ours)


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize(
    ("packed", "dropout", "attention_dropout"),
    [(True, False, 0.1), (True, True, 0.0), (False, False, 0.1), (False, True, 0.1)],
    ids=["packed", "packed, dropout", "padded", "padded, dropout"],
)
@pytest.mark.parametrize(
    ("width", "hidden", "layers", "adapters"),
    [(16, 64, 2, None), (96, 256, 4, None), (16, 64, 2, 0.0), (16, 64, 2, 0.05)],
    ids=["small", "large", "lora", "lora with dropout"],
)
def test_activations_are_what_autograd_keeps(
    width: int, hidden: int, layers: int, adapters: float | None, packed: bool, dropout: bool,
    attention_dropout: float, half: bool,
) -> None:  # fmt: skip
    config = BertConfig(
        vocab_size=50, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=4 * hidden, attention_probs_dropout_prob=attention_dropout,
    )  # fmt: skip
    encoder = Encoder(BertModel(config, add_pooling_layer=False), None, Settings(), "cpu")
    if adapters is not None:
        add_adapters(encoder, "query", LoRAConfig(enabled=True, dropout=adapters), seed=0)
    model = encoder.model.train(dropout)
    autocast: Autocast = bf16 if half else nullcontext
    rows = [[7] * width] * 5 + [[7] * (width - 4)]
    assert packing.enable([model], CPU, half=half, dropout=dropout) == (
        packed or not (dropout and attention_dropout)
    )

    def forward() -> Tensor:
        with autocast():
            if packed:
                parts = packing.collate(Ragged.of(rows), CPU)
                hidden = packing.forward(model, **parts)
                return packing.pool(hidden, parts["borders"], "mean")
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            output = model(input_ids=ids, attention_mask=(ids > 0).long())
            return pool_embeddings(output.last_hidden_state, (ids > 0).long(), "mean")

    rule = activations.of(model, CPU, half=half, packed=packed, dropout=dropout)
    told = rule.kept(sum(map(len, rows)) if packed else len(rows) * width, width)
    assert told == pytest.approx(saved_bytes(model, forward), rel=0.1)


@pytest.mark.parametrize("distil", [0.0, 0.5], ids=["", "distilled"])
def test_similarities_are_kept_at_every_width(distil: float) -> None:
    """The rest of what is told is worked on: as much at one width as at four."""
    rows, docs = 64, 1024
    queries, texts = (torch.randn(n, 8).requires_grad_() for n in (rows, docs))
    positive, valid = torch.eye(rows, docs).bool(), torch.ones(rows, docs).bool()
    logliks = torch.randn(rows, docs) if distil else None

    def kept_and_told(dims: tuple[int, ...]) -> tuple[int, int]:
        def loss() -> Tensor:
            how = {"temperature": 0.05, "distill_weight": distil}
            return objective_rows(queries, texts, positive, valid, logliks, dims=dims, **how).loss

        config = TrainingConfig(distill_weight=distil, matryoshka=dims)
        return saved_bytes(None, loss), similarities(rows, docs, config)

    (one, told), (four, all_told) = map(kept_and_told, ((), (6, 4, 2)))
    assert one < told and four < all_told
    assert all_told - told == pytest.approx(four - one, rel=0.1)


def told_of(config: Config, shape: BertConfig, folder: Path, *, half: bool, kind: str) -> Estimate:
    """An encoder of this shape, without weights, on texts all of which are as long as can be."""
    encoder = Encoder.from_folder(tiny_encoder(folder), device="cpu")
    prepare(encoder, config.training, seed=0)
    items = select(examples(4 * config.training.batch_size), config.training).items
    size = config.training.batch_size
    data = Batches(items, encoder, global_batch=size, seed=0, settings=config.training)
    data.table.lengths[:] = config.encoder.max_length
    with torch.device("meta"):
        encoder.model = BertModel(shape, add_pooling_layer=False)
    encoder.dim, encoder.device = shape.hidden_size, torch.device(kind)
    return estimate(encoder, data, 1, config.training, 1, bf16 if half else nullcontext)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_fits(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(path)
    gpu = config.encoder.model == "BAAI/bge-base-en-v1.5"
    monkeypatch.setattr(estimate_module, "_free", lambda device: 0)
    # `memshare eval` trains in float32, the loop on a GPU in bf16 (test_gpu_configs).
    half = gpu and path.name != "paper.yaml"
    monkeypatch.setattr(estimate_module, "in_bf16", lambda autocast, kind: half)
    shape, kind = (BERT_BASE, "cuda") if gpu else (MINI_LM, "cpu")
    told = told_of(config, shape, tmp_path, half=half, kind=kind)
    assert told.needed_bytes < LEFT[path.name], str(told)


def test_more_than_there_is_free_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config()
    for free, warned in ((64 * GIB, False), (0, True)):
        monkeypatch.setattr(estimate_module, "_free", lambda device, free=free: free)
        told = told_of(config, MINI_LM, tmp_path, half=False, kind="cpu")
        assert told.free_bytes == free + told.weights_bytes
        assert ("warning: that is more than the" in str(told)) == warned
        assert ("lower training.graph_tokens" in str(told)) == warned


def test_free_memory_is_shared_by_the_processes_of_a_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = type("Memory", (), {"available": 12 * GIB})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    assert estimate_module._free(CPU) == 12 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert estimate_module._free(CPU) == 3 * GIB


@pytest.mark.parametrize("towers", ["shared", "separate", "query-only"])
@pytest.mark.parametrize("adapters", [False, True], ids=["", "lora"])
def test_fsdp_divides_all_weights_of_the_towers_that_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, towers: str, adapters: bool
) -> None:
    """What it costs beside whole weights: gradients whole, and shares (`sharding`)."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    encoder = Encoder.from_folder(tiny_encoder(tmp_path / "tiny"), device="cpu")
    lora = LoRAConfig(enabled=adapters)
    config = TrainingConfig(towers=towers, lora=lora)  # type: ignore[arg-type]
    prepare(encoder, config, seed=0)
    data = Batches(select(examples(8), config).items, encoder, global_batch=8, seed=0)
    alone, told = (estimate(encoder, data, 1, config, processes) for processes in (1, 4))
    learn = alone.trainable
    divided = alone.parameters
    if towers == "query-only":
        divided -= sum(p.numel() for p in encoder.tower("memory").parameters())
    assert alone.optimizer_bytes == 4 * 3 * learn
    # Shares of weights, and of gradients and two moments.
    assert told.optimizer_bytes == 4 * learn + divided + 3 * learn
    assert (divided == learn) != adapters


def test_only_what_is_kept_at_a_time_counts() -> None:
    """Micro-batches that are encoded again come one by one, after those whose graphs were kept."""
    rule = activations.of(
        BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1,
                             num_attention_heads=2, intermediate_size=8)),
        CPU, half=False, packed=True, dropout=False,
    )  # fmt: skip
    config = load_config(None, ["training.batch_tokens=20"]).training
    lengths = torch.full((10,), 10).numpy()
    work = rule.working(20)

    def most(graph_tokens: int) -> tuple[int, int]:
        changed = config.model_copy(update={"graph_tokens": graph_tokens})
        return estimate_module._most(lengths, rule, changed)

    assert most(0) == (rule.kept(20, 10) + work, 100)
    assert most(60) == most(79) == (3 * rule.kept(20, 10) + work, 40)
    assert most(100) == most(10**6) == (rule.kept(100, 10) + work, 0)


def test_what_keeping_all_activations_would_take_is_told(tmp_path: Path) -> None:
    few, all_of_them = (
        told_of(load_config(None, [f"training.graph_tokens={kept}"]), MINI_LM, tmp_path / str(kept),
                half=False, kind="cpu")
        for kept in (8192, 10**6)
    )  # fmt: skip
    assert few.twice > 0 == all_of_them.twice == all_of_them.twice_bytes
    assert few.activation_bytes + few.twice_bytes == all_of_them.activation_bytes
    assert f"about {few.twice:,} tokens of a step are encoded twice" in str(few)
    assert "encoded twice" not in str(all_of_them)
