"""The engine's gradient against a plain forward and backward pass over the whole batch."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memshare.config import LoRAConfig, TrainingConfig
from memshare.retrieval import packing
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.encoder_format import Side
from memshare.retrieval.errors import EncoderError
from memshare.training import step as step_module
from memshare.training.batching import Batches
from memshare.training.export import export
from memshare.training.flops import ModelCost
from memshare.training.gather import World
from memshare.training.lora import add_adapters
from memshare.training.loss import objective_rows
from memshare.training.optimizer import lr_factor, make_optimizer, state_tensors, update
from memshare.training.select import select
from memshare.training.step import ContrastiveStep
from memshare.training.step_result import NonFinite
from memshare.training.towers import FrozenMemories, prepare
from tests.tiny import tiny_encoder
from tests.training_data import candidate, example, examples, unlearnable

CPU = torch.device("cpu")
ONE = World(CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny", query_prefix="q: ")


@pytest.fixture
def encoder(folder: Path) -> Encoder:
    return Encoder.from_folder(folder, device="cpu")


def make(encoder: Encoder, count: int = 16, **changes: object) -> tuple[Batches, TrainingConfig]:
    config = TrainingConfig(**{"batch_size": count, "dropout": False, **changes})  # type: ignore[arg-type]
    items = select(examples(count), config).items
    return Batches(items, encoder, global_batch=count, seed=0), config


def gradients(encoder: Encoder) -> dict[str, Tensor]:
    named = encoder.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def engine_gradients(
    encoder: Encoder, data: Batches, config: TrainingConfig, step: int = 0
) -> tuple[float, dict[str, Tensor]]:
    encoder.model.zero_grad(set_to_none=True)
    engine = ContrastiveStep(encoder, data.table, config, ONE, seed=0)
    result = engine.backward(data.batch(0), step)
    return result.loss, gradients(encoder)


def direct_gradients(
    encoder: Encoder, data: Batches, config: TrainingConfig
) -> tuple[float, dict[str, Tensor]]:
    """Every query, then every doc column, in one padded batch; autograd does the rest."""
    encoder.model.zero_grad(set_to_none=True)
    encoder.model.eval()
    batch = data.batch(0)
    vectors = encoder.embed(encoder.collate(data.table.rows(batch.texts)))
    positive, valid = batch.masks(0, len(batch.rows), CPU)
    rows = torch.from_numpy(batch.rows)
    loss = objective_rows(
        vectors[rows], vectors[: batch.docs], positive, valid, batch.measured(0, len(rows), CPU),
        temperature=config.temperature, distill_weight=config.distill_weight,
        distill_temperature=config.distill_temperature, dims=config.matryoshka,
    ).loss.mean()  # fmt: skip
    loss.backward()
    return float(loss.detach()), gradients(encoder)


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys() and left
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize(
    ("batch_tokens", "graph_tokens"),
    [(100_000, 100_000), (256, 100_000), (256, 0), (256, 700), (1, 0)],
    ids=["one micro-batch", "graphs kept", "all cached", "some cached", "one text each"],
)
def test_gradient_equals_the_direct_one(
    encoder: Encoder, batch_tokens: int, graph_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "TILE_ROWS", 5)  # tiles of rows that do not divide the batch
    data, config = make(encoder, batch_tokens=batch_tokens, graph_tokens=graph_tokens)
    loss, got = engine_gradients(encoder, data, config)
    want_loss, want = direct_gradients(encoder, data, config)
    assert loss == pytest.approx(want_loss, abs=1e-5)
    assert difference(got, want) < 1e-5
    assert max(float(g.abs().max()) for g in want.values()) > 1e-3  # there is something to equal


@pytest.mark.parametrize("graph_tokens", [100_000, 700])
def test_gradient_of_a_model_that_can_not_be_packed(
    encoder: Encoder, graph_tokens: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(packing, "_FAMILIES", frozenset())
    data, config = make(encoder, batch_tokens=256, graph_tokens=graph_tokens)
    result = ContrastiveStep(encoder, data.table, config, ONE, seed=0).backward(data.batch(0), 0)
    got = gradients(encoder)
    loss, want = direct_gradients(encoder, data, config)
    assert result.loss == pytest.approx(loss, abs=1e-5)
    assert difference(got, want) < 1e-5
    assert result.tokens < result.padded < 1.1 * result.tokens  # sorted by length: little padding
    assert "texts are padded to the longest; computing in float32\n" in capsys.readouterr().err


def test_parts_of_the_loss_are_told_where_there_are_several(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "TILE_ROWS", 5)
    data, config = make(encoder, distill_weight=0.5)
    got = ContrastiveStep(encoder, data.table, config, ONE, seed=0).backward(data.batch(0), 0)
    assert got.parts["kl"] > 0.01
    assert got.loss == pytest.approx(got.parts["info_nce"] + 0.5 * got.parts["kl"], abs=1e-5)
    _, alone = make(encoder)
    plain = ContrastiveStep(encoder, data.table, alone, ONE, seed=0).backward(data.batch(0), 0)
    assert plain.parts == {}
    assert plain.loss == pytest.approx(got.parts["info_nce"], abs=1e-5)


def test_gradient_with_distillation_and_widths(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "TILE_ROWS", 5)
    more: dict[str, object] = {"distill_weight": 0.5, "matryoshka": (16, 8)}
    data, config = make(encoder, batch_tokens=256, graph_tokens=700, **more)
    loss, got = engine_gradients(encoder, data, config)
    want_loss, want = direct_gradients(encoder, data, config)
    assert loss == pytest.approx(want_loss, abs=1e-5)
    assert difference(got, want) < 1e-5
    plain_loss, plain = engine_gradients(encoder, data, TrainingConfig(dropout=False))
    assert plain_loss != pytest.approx(loss, abs=1e-3) and difference(got, plain) > 1e-4


def test_cached_pass_replays_dropout(encoder: Encoder) -> None:
    data, kept = make(encoder, dropout=True, batch_tokens=256)
    _, cached = make(encoder, dropout=True, batch_tokens=256, graph_tokens=0)
    loss, want = engine_gradients(encoder, data, kept, step=3)
    again, got = engine_gradients(encoder, data, cached, step=3)
    assert again == pytest.approx(loss, abs=1e-6)
    assert difference(got, want) < 1e-5
    assert difference(got, engine_gradients(encoder, data, cached, step=4)[1]) > 1e-4
    assert difference(got, direct_gradients(encoder, data, kept)[1]) > 1e-4  # dropout is on


def test_a_step_does_not_depend_on_the_random_state_before_it(encoder: Encoder) -> None:
    data, config = make(encoder, dropout=True)
    torch.manual_seed(1)
    _, first = engine_gradients(encoder, data, config)
    torch.manual_seed(2)
    assert difference(first, engine_gradients(encoder, data, config)[1]) == 0


def test_one_text_is_encoded_once(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    data, config = make(encoder, batch_tokens=256)
    seen: list[int] = []
    pack = encoder.pack
    monkeypatch.setattr(encoder, "pack", lambda rows: (seen.append(len(rows)), pack(rows))[1])
    engine = ContrastiveStep(encoder, data.table, config, ONE, seed=0)
    result = engine.backward(data.batch(0), 0)
    assert sum(seen) == len(data.batch(0).texts) and len(seen) > 3
    assert result.tokens == data.table.lengths[data.batch(0).texts].sum()
    assert result.tokens == result.padded  # nothing is padded


def test_rows_of_embeddings_do_not_pile_up(encoder: Encoder) -> None:
    """Memory does not grow with the batch: only one micro-batch's rows are kept beside the sum."""
    data, config = make(encoder, batch_tokens=64)
    words = max(
        (item for item in encoder.model.modules() if isinstance(item, torch.nn.Embedding)),
        key=lambda table: table.num_embeddings,
    )
    rows: list[int] = []

    def look(weight: Tensor) -> None:
        assert weight.grad is not None
        rows.append(weight.grad._nnz() if weight.grad.is_sparse else 0)

    words.weight.register_post_accumulate_grad_hook(look)
    _, found = engine_gradients(encoder, data, config)
    assert len(rows) > 10 and 0 < max(rows) <= 64
    assert not any(value.is_sparse for value in found.values())


def test_figures_of_a_step(encoder: Encoder) -> None:
    data, config = make(encoder, batch_tokens=256)
    engine = ContrastiveStep(encoder, data.table, config, ONE, seed=0)
    result = engine.backward(data.batch(0), 0)
    lengths = data.table.lengths[data.batch(0).texts]
    assert result.flops == ModelCost.of(encoder.model).step(lengths) > 0
    assert result.tokens == lengths.sum() <= result.padded
    assert result.peak is None  # nobody knows a CPU's


def test_training_lowers_the_loss(encoder: Encoder) -> None:
    data, config = make(encoder, dropout=True, lr=1e-3)
    engine = ContrastiveStep(encoder, data.table, config, ONE, seed=0)
    optimizer = make_optimizer(encoder.model, config)
    losses = []
    for step in range(20):
        losses.append(engine.backward(data.batch(step), step).loss)
        assert update(optimizer, config.lr, config.max_grad_norm) > 0
    assert losses[-1] < 0.5 * losses[0]


def test_nan_is_named_and_nothing_is_updated(encoder: Encoder) -> None:
    data, config = make(encoder)
    before = copy.deepcopy(encoder.model.state_dict())
    engine = ContrastiveStep(encoder, data.table, config, ONE, seed=0)
    encoder.model.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(NonFinite, match=r"step 8: the loss is not finite.*main-\d+"):
        engine.backward(data.batch(0), 7)

    encoder.model.load_state_dict(before)
    optimizer = make_optimizer(encoder.model, config)
    engine.backward(data.batch(0), 0)
    next(iter(encoder.model.parameters())).grad.fill_(float("inf"))
    assert update(optimizer, 1.0, 1.0) == float("inf")
    assert all(torch.equal(v, before[k]) for k, v in encoder.model.state_dict().items())


def test_a_batch_without_negatives_changes_nothing(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight decays, no moment fades, nothing is encoded; a request to stop is heard."""
    data, config = make(encoder, weight_decay=0.1)
    engine = ContrastiveStep(encoder, data.table, config, ONE, seed=0)
    optimizer = make_optimizer(encoder.model, config)
    engine.backward(data.batch(0), 0)
    assert update(optimizer, 1e-3, 1.0) > 0
    before = copy.deepcopy((encoder.model.state_dict(), state_tensors(optimizer)))
    items = select(unlearnable(6), config).items
    bare = Batches(items, encoder, global_batch=6, seed=0)
    assert not bare.learnable() and data.learnable()
    monkeypatch.setattr(encoder, "embed", None)
    engine = ContrastiveStep(encoder, bare.table, config, ONE, seed=0)
    result = engine.backward(bare.batch(0), 1, stop=True)
    assert (result.loss, result.tokens, result.stop) == (0.0, 0, True)
    assert not engine.backward(bare.batch(1), 2).stop
    assert update(optimizer, 1e-3, 1.0) == 0
    after = (encoder.model.state_dict(), state_tensors(optimizer))
    for now, then in zip(after, before, strict=True):
        assert now.keys() == then.keys()
        assert all(torch.equal(now[name], then[name]) for name in now)


def test_what_an_lm_measured_teaches_without_negatives(encoder: Encoder) -> None:
    """Two positives of one query, alone in its batch: there is a KL divergence to learn from."""
    found = (candidate("a", "one", -0.5, "yes"), candidate("b", "other", -1.0, "yes", 1))
    made = [example(answer="yes", candidates=found)]
    for weight, teaches in ((0.0, False), (0.5, True)):
        config = TrainingConfig(positives=2, distill_weight=weight, dropout=False)
        items = select(made, config).items
        data = Batches(items, encoder, global_batch=1, seed=0, settings=config)
        assert data.learnable() == teaches
        assert bool(engine_gradients(encoder, data, config)[1]) == teaches


def test_clipping_and_decay_groups(encoder: Encoder) -> None:
    data, config = make(encoder, weight_decay=0.1)
    optimizer = make_optimizer(encoder.model, config)
    decays = {
        name: group["weight_decay"]
        for group in optimizer.param_groups
        for name, p in encoder.model.named_parameters()
        if any(p is member for member in group["params"])
    }
    assert set(decays.values()) == {0.0, 0.1}
    assert all((d == 0.0) == ("bias" in n or "LayerNorm" in n) for n, d in decays.items())
    engine = ContrastiveStep(encoder, data.table, config, ONE, seed=0)
    engine.backward(data.batch(0), 0)
    norm = torch.sqrt(sum((g**2).sum() for g in gradients(encoder).values()))  # type: ignore[arg-type]
    assert update(optimizer, 1e-3, 0.01) == pytest.approx(float(norm), rel=1e-5)
    assert not gradients(encoder)


@pytest.mark.parametrize(("most", "kept"), [(None, 1.0), (10.0, 1.0), (1.0, 0.2)])
def test_gradients_are_clipped_where_asked_to(most: float | None, kept: float) -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([param])
    for grad, norm in (([3.0, 4.0], 5.0), ([math.inf, 0.0], math.inf)):
        param.grad = torch.tensor(grad)
        assert update(optimizer, 1.0, most) == norm
        assert param.tolist() == pytest.approx([-3.0 * kept, -4.0 * kept], rel=1e-5)  # both times


@pytest.mark.parametrize(
    ("schedule", "quarters"), [("linear", (0.75, 0.5, 0.25)), ("cosine", (0.854, 0.5, 0.146))]
)
def test_learning_rate(schedule: str, quarters: tuple[float, ...]) -> None:
    factors = [lr_factor(step, 100, 0.1, schedule) for step in range(100)]  # type: ignore[arg-type]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0 and factors[10] == 1.0
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert 0 < factors[-1] < 0.02
    found = [lr_factor(step, 100, 0.0, schedule) for step in (25, 50, 75)]  # type: ignore[arg-type]
    assert found == pytest.approx(quarters, abs=1e-3)
    assert lr_factor(0, 1, 0.1, schedule) == 1.0  # type: ignore[arg-type]


def test_lora_trains_adapters_alone_and_merges_to_the_same_encoder(
    encoder: Encoder, folder: Path, tmp_path: Path
) -> None:
    data, config = make(encoder, lr=1e-2)
    frozen = copy.deepcopy(encoder.model.state_dict())
    add_adapters(encoder, "query", LoRAConfig(enabled=True, r=4, alpha=8, dropout=0.0), seed=1)
    names = [name for name, p in encoder.model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    engine = ContrastiveStep(encoder, data.table, config, ONE, seed=0)
    optimizer = make_optimizer(encoder.model, config)
    for step in range(5):
        engine.backward(data.batch(step), step)
        update(optimizer, config.lr, 1.0)
    texts = ["tea of rain", "iron", "when the moss is big"]
    unmerged = encoder.encode(texts)
    export(encoder, tmp_path / "encoder", {})
    merged = Encoder.from_folder(tmp_path / "encoder", device="cpu")
    assert abs(merged.encode(texts) - unmerged).max() < 1e-4
    assert abs(merged.encode(texts) - Encoder.from_folder(folder, "cpu").encode(texts)).max() > 1e-2
    assert merged.model.state_dict().keys() == frozen.keys()
    assert merged.query_prefix == "q: "


def test_lora_names_modules_that_are_not_there(encoder: Encoder) -> None:
    with pytest.raises(EncoderError, match="no_such_module"):
        config = LoRAConfig(enabled=True, target_modules=("no_such_module",))
        add_adapters(encoder, "query", config, seed=1)


def test_export_replaces_an_earlier_encoder(encoder: Encoder, tmp_path: Path) -> None:
    target = tmp_path / "encoder"
    target.mkdir()
    (target / "old-file").write_text("old")
    export(encoder, target, {})
    assert not (target / "old-file").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


@pytest.mark.parametrize(
    ("towers", "side"),
    [("shared", "query"), ("separate", "query"), ("separate", "memory"), ("query-only", "query")],
)
def test_ruined_weights_are_found_in_every_tower_that_learns(
    encoder: Encoder, towers: str, side: Side
) -> None:
    data, config = make(encoder, towers=towers)
    prepare(encoder, config, seed=0)
    frozen = FrozenMemories.of(encoder, data, ONE, config)
    engine = ContrastiveStep(encoder, data.table, config, ONE, seed=0, frozen=frozen)
    engine.check(1.0, data.batch(0), 7, last=True)
    # Finite all the same: what overflows is what the model computes with them.
    encoder.tower(side).get_input_embeddings().weight.data.fill_(1e38)
    encoder.tower(side).encoder.layer[0].attention.self.query.weight.data.fill_(1e38)
    with pytest.raises(
        NonFinite, match=r"step 8: what the encoder gives after it.*main-\d+"
    ) as told:
        engine.check(1.0, data.batch(0), 7, last=True)
    assert told.value.done == 8
    engine.check(1.0, data.batch(0), 7, last=False)  # the next step's loss will tell
    with pytest.raises(NonFinite, match="step 8: the gradient is not finite") as told:
        engine.check(float("inf"), data.batch(0), 7, last=False)
    assert told.value.done == 7  # nothing was changed by it
