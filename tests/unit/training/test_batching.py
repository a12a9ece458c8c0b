from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memshare.config import EncoderConfig, TrainingConfig
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.text import memory_text
from memshare.training.batching import Batches, cut, cut_packed, deal
from memshare.training.select import select
from memshare.training.step_batch import StepBatch
from memshare.training.token_table import TokenTable
from tests.tiny import lists, tiny_encoder
from tests.training_data import candidate, example, examples

CPU = torch.device("cpu")
DRAWN = {"positives": 2, "positives_per_step": 1, "max_principal_share": 0.3,
         "pool_temperature": 2.0}  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tiny_encoder(
        tmp_path_factory.mktemp("encoder") / "tiny", query_prefix="q: ", memory_prefix="m: "
    )
    return Encoder.from_folder(folder, device="cpu")


def batches(encoder: Encoder, made: list, global_batch: int = 8, seed: int = 0) -> Batches:  # type: ignore[type-arg]
    items = select(made, TrainingConfig()).items
    return Batches(items, encoder, global_batch=global_batch, seed=seed)


def epoch(data: Batches, number: int = 0) -> list[StepBatch]:
    return [data.batch(number * data.steps_per_epoch + i) for i in range(data.steps_per_epoch)]


def test_an_epoch_sees_every_example_once_in_even_batches(encoder: Encoder) -> None:
    data = batches(encoder, examples(35))
    seen = [batch.query_ids for batch in epoch(data)]
    assert sorted(len(ids) for ids in seen) == [7, 7, 7, 7, 7]  # not 8, 8, 8, 8, 3
    assert sorted(q for ids in seen for q in ids) == sorted(f"main-{i}" for i in range(35))
    assert seen != [batch.query_ids for batch in epoch(data, 1)]
    assert seen == [batch.query_ids for batch in epoch(batches(encoder, examples(35)))]
    assert seen != [batch.query_ids for batch in epoch(batches(encoder, examples(35), seed=1))]


@pytest.mark.parametrize(("epochs", "steps"), [(0.3, 2), (1.5, 6), (2, 8)])
def test_epochs_may_be_parts_of_one(encoder: Encoder, epochs: float, steps: int) -> None:
    config = TrainingConfig(epochs=epochs)
    items = select(examples(32), config).items
    assert Batches(items, encoder, global_batch=8, seed=0, settings=config).steps == steps


def test_no_step_more_than_was_asked_for(encoder: Encoder) -> None:
    items = select(examples(50), TrainingConfig()).items
    asked = TrainingConfig(epochs=1.1)  # times 50 that is 55.00000000000001 in floats
    assert Batches(items, encoder, global_batch=1, seed=0, settings=asked).steps == 55


def test_a_batch_is_of_one_pool(encoder: Encoder) -> None:
    data = batches(encoder, examples(20) + examples(12, pool="other"))
    pools = [{q.split("-")[0] for q in batch.query_ids} for batch in epoch(data)]
    assert all(len(pool) == 1 for pool in pools)
    assert {"main", "other"} == set().union(*pools)


@pytest.mark.parametrize(
    ("prefixes", "settings", "digest", "content"),
    [
        (("", ""), {}, "17abecd23473393e", "7e673e39fdc7c7f7"),
        (("", ""), DRAWN, "2a795c3e3e8e556b", "de16a86f2e65a7f0"),
        (("query: ", "passage: "), {}, "57647344ac387851", "c454ad29128883f2"),
        (("query: ", "passage: "), DRAWN, "de8db6b4b9c979ff", "3f4a7cf55422565b"),
    ],
)
def test_batches_are_those_of_when_all_of_it_was_in_memory(
    tmp_path: Path, prefixes: tuple[str, str], settings: dict[str, Any], digest: str, content: str
) -> None:
    """The batches' hashes are those of the code before examples and tokens went to disk.

    The digest has come to tell of more since.
    """
    where = {"model": str(tiny_encoder(tmp_path / "tiny")), "max_length": 24, "device": "cpu"}
    encoder = Encoder.load(EncoderConfig(**where))
    encoder.query_prefix, encoder.memory_prefix = prefixes
    made = [*examples(40), *examples(23, seed=1, pool="other", start=40)]
    config = TrainingConfig(**settings)
    data = Batches(select(made, config).items, encoder, global_batch=12, seed=5, settings=config)
    found = hashlib.sha256()
    for step in range(7):
        batch = data.batch(step)
        masks = (mask.numpy() for mask in batch.masks(0, len(batch.rows), CPU))
        for array in (batch.texts, batch.rows, batch.positives, batch.logliks, *masks):
            found.update(repr((array.shape, array.dtype, array.tolist())).encode())
        found.update(repr((batch.query_ids, batch.docs)).encode())
        for row in lists(data.table.rows(batch.texts)):
            found.update(repr(row).encode())
    found.update(repr(data.table.lengths.tolist()).encode())
    found.update(repr(data.doc_rows.tolist()).encode())
    assert (data.digest[:16], found.hexdigest()[:16]) == (digest, content)


def test_digest_tells_other_data_order_and_prefix(encoder: Encoder, tmp_path: Path) -> None:
    digest = batches(encoder, examples(9)).digest
    plain = Encoder.from_folder(tiny_encoder(tmp_path / "plain"), device="cpu")
    others = [
        batches(encoder, examples(9)[::-1]),
        batches(encoder, examples(10)),
        batches(encoder, examples(9), seed=1),
        batches(encoder, examples(9), global_batch=4),
        batches(plain, examples(9)),
    ]
    assert digest == batches(encoder, examples(9)).digest
    assert len({digest, *(other.digest for other in others)}) == 6


@pytest.mark.parametrize("towers", [1, 2])
def test_a_query_that_is_anothers_text_stands_once_as_well(tmp_path: Path, towers: int) -> None:
    """As in pairs of paraphrases; but not where queries and memories have a tower each."""
    same = Encoder.from_folder(tiny_encoder(tmp_path / "tiny"), device="cpu")
    if towers == 2:
        same.split()
    words = [f"word {i}" for i in range(6)]
    made = [
        example(f"q{i}", query=words[i], candidates=(candidate(f"c{i}", words[i - 1], -0.5),))
        for i in range(6)
    ]
    made += [example("q6", query="alone", candidates=(candidate("c6", "answers", -0.5),))]
    data = batches(same, made)
    batch = data.batch(0)
    assert batch.docs == 7 and len(batch.texts) == (8 if towers == 1 else 14)
    for place, name in zip(batch.rows, batch.query_ids, strict=True):
        asked = made[int(name[1:])].query
        found = data.table.rows(batch.texts[[place]])
        assert lists(found) == same.tokenize_to_ids([asked])
        assert (place < batch.docs) == (towers == 1 and asked != "alone")


def test_each_distinct_text_stands_once(encoder: Encoder) -> None:
    shared = candidate("shared", "a memory that all share", -0.5, "it")
    made = [
        example(
            str(i), query="one question", candidates=(shared, candidate(f"n{i}", f"neg {i}", -4.0))
        )
        for i in range(5)
    ]
    batch = batches(encoder, made).batch(0)
    assert len(batch.texts) == len(set(batch.texts.tolist())) == 1 + 5 + 1
    assert batch.docs == 6 and len(set(batch.rows.tolist())) == 1


def docs_of(encoder: Encoder, data: Batches, batch: StepBatch) -> list[str]:
    """The text in each column of the batch's masks."""
    texts = [p.text for item in data.items for p in (*item.positives, *item.negatives)]
    queries = [("q: ", item.query) for item in data.items]
    table = TokenTable([*queries, *(("m: ", text) for text in texts)], encoder)  # the same again
    assert np.array_equal(table.lengths, data.table.lengths)
    names = {table.row("m: ", text): text for text in texts}
    return [names[row] for row in batch.texts[: batch.docs].tolist()]


def test_masks(encoder: Encoder) -> None:
    made = [
        example(
            "a", answer="own a",
            candidates=(
                candidate("pa", "positive of a", -0.5, "good"),
                candidate("near", "almost as good for a", -0.5, "near", rank=1),
                candidate("na", "negative of a", -5.0, "bad"),
            ),
        ),
        example("b", candidates=(candidate("pb", "POSITIVE of a", -0.5, "b1"),)),  # a copy
        example("c", candidates=(candidate("a", "a's own memory", -0.5, "c1"),)),
        example("d", candidates=(candidate("pd", "same answer as a's", -0.5, "OWN a"),)),
        example("e", candidates=(candidate("pe", "same answer as pa's", -0.5, "good"),)),
        example("f", candidates=(candidate("near", "almost as good for a", -0.5, "near"),)),
        example("g", candidates=(candidate("pg", "fair game", -0.5, "g1"),)),
    ]  # fmt: skip
    data = batches(encoder, made)
    batch = data.batch(0)
    columns = docs_of(encoder, data, batch)
    row = batch.query_ids.index("a")
    positive, valid = batch.masks(row, row + 1, CPU)
    assert [c for c, on in zip(columns, positive[0], strict=True) if on] == ["positive of a"]
    negatives = {c for c, on in zip(columns, valid[0] & ~positive[0], strict=True) if on}
    assert negatives == {"negative of a", "fair game"}
    # The others see each other's positives, whatever counts for "a".
    row = batch.query_ids.index("g")
    positive, valid = batch.masks(row, row + 1, CPU)
    assert int(positive.sum()) == 1 and bool(valid.all())
    # A tile's masks are rows of the whole's.
    whole = batch.masks(0, len(batch.rows), CPU)
    for part, full in zip(batch.masks(2, 5, CPU), whole, strict=True):
        assert torch.equal(part, full[2:5])


def test_copies_of_a_query_are_no_negatives_and_it_shares_what_its_copies_know(
    encoder: Encoder,
) -> None:
    """Memories that answer the same question otherwise, and that question asked again."""
    other = memory_text("Write  a POEM", "of rain")
    made = [
        example(
            "a", query="write a poem",
            candidates=(
                candidate("pa", "good for a", -0.5, "as a"),
                candidate("bad", "bad for a", -5.0, "b"),
            ),
        ),
        example("b", candidates=(candidate("other", other, -0.5, "of rain"),)),
        example(
            "c", query="Write a poem", answer="quite another",
            candidates=(
                candidate("pc", "good for c", -0.5, "as c"),
                candidate("near", "as good for c", -0.5, "near", rank=1),
            ),
        ),
        example("h", query="WRITE a poem", candidates=(candidate("bad", "bad for a", -0.5, "b"),)),
        example("d", candidates=(candidate("near", "as good for c", -0.5, "near"),)),
        example("e", candidates=(candidate("pe", "answers as c", -0.5, "Quite another"),)),
        example("f", candidates=(candidate("pf", "answers as pc", -0.5, "AS c"),)),
        example("g", candidates=(candidate("pg", "fair game", -0.5, "g"),)),
    ]  # fmt: skip
    data = batches(encoder, made)
    batch = data.batch(0)
    columns = docs_of(encoder, data, batch)
    positive, valid = batch.masks(0, len(batch.rows), CPU)
    negatives = {
        name: {c for c, on in zip(columns, row, strict=True) if on}
        for name, row in zip(batch.query_ids, valid & ~positive, strict=True)
    }
    assert negatives["a"] == negatives["c"] == negatives["h"] == {"fair game"}
    assert negatives["g"] == set(columns) - {"fair game"}
    assert other in negatives["e"] and "good for a" in negatives["b"]
    for start in range(len(batch.rows) - 1):  # tiles that divide the two and that don't
        for part, full in zip(batch.masks(start, start + 2, CPU), (positive, valid), strict=True):
            assert torch.equal(part, full[start : start + 2])


def test_what_is_told_of_the_batches(encoder: Encoder) -> None:
    made = [
        *examples(6),
        example("long", query="x " * 500, candidates=(candidate("p", "p", -0.5),)),
    ]
    items = [
        replace(item, principal=who)
        for item, who in zip(select(made, TrainingConfig()).items, "aaaaabc", strict=True)
    ]
    plain = Batches(items, encoder, global_batch=7, seed=0)
    assert str(plain) == "1 step an epoch; 1 texts have too many tokens and are cut off"
    settings = TrainingConfig(max_principal_share=0.34)
    capped = Batches(items, encoder, global_batch=7, seed=0, settings=settings)
    assert capped.counts() == {"truncated": 1, "unknown_tokens": 0, "left_out": 4}
    assert "; 4 examples left out of the first: over training.max_principal_share" in str(capped)


def test_an_encoder_that_can_not_read_the_texts_is_told(encoder: Encoder) -> None:
    """Of its own alphabet and no other: each word of another one is an unknown token."""
    unreadable = candidate("p", "\u5e8a\u524d\u660e\u6708\u5149", -0.5)  # five tokens
    made = [*examples(6), example("poem", query="a poem", candidates=(unreadable,))]
    data = batches(encoder, made)
    assert data.counts()["unknown_tokens"] == 5
    assert "unknown" not in str(data)
    poems = batches(encoder, made[-1:])
    share = 5 / int(poems.table.lengths.sum())
    assert f"; warning: {share:.0%} of the texts' tokens are unknown to this encoder" in str(poems)


def test_a_token_that_is_more_than_unknown_is_not_counted(tmp_path: Path) -> None:
    encoder = Encoder.from_folder(tiny_encoder(tmp_path / "tiny"), device="cpu")
    texts = [("", "\u5e8a a")]
    assert TokenTable(texts, encoder).unknown == 1
    encoder.tokenizer.pad_token = encoder.tokenizer.unk_token
    assert TokenTable(texts, encoder).unknown == 0
    encoder.tokenizer.unk_token = None
    assert TokenTable(texts, encoder).unknown == 0


def test_texts_longer_than_the_model_are_cut_and_counted(encoder: Encoder) -> None:
    made = [
        example("a", query="x " * 500, candidates=(candidate("p", "fine", -0.5),)),
        example(
            "b",
            query="y " * (encoder.max_length - 3 - 2),
            candidates=(candidate("p", "fine", -0.5),),
        ),
    ]
    named = [*(("q: ", item.query) for item in made), ("m: ", "fine")]
    table = TokenTable(named * 2, encoder)
    assert batches(encoder, made).table.truncated == table.truncated == 1
    assert table.lengths.max() == encoder.max_length
    assert (
        sorted(table.row(*text) for text in named) == [0, 1, 2] == list(range(len(table.lengths)))
    )
    for prefix, text in named:
        want = encoder.tokenize_to_ids([text], prefix)[0]
        assert lists(table.rows(np.array([table.row(prefix, text)]))) == [want]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_texts_are_dealt_evenly(processes: int) -> None:
    lengths = np.random.default_rng(0).lognormal(4.0, 0.6, size=101).astype(np.int64)
    shares = deal(lengths, processes)
    assert sorted(np.concatenate(shares).tolist()) == list(range(101))
    tokens = [int(lengths[share].sum()) for share in shares]
    assert max(tokens) - min(tokens) <= lengths.max()
    assert all((np.diff(lengths[share]) <= 0).all() for share in shares)


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096, 10**9])
def test_micro_batches_keep_the_budget_and_little_padding(batch_tokens: int) -> None:
    lengths = np.random.default_rng(0).lognormal(4.0, 0.6, size=500).astype(np.int64)
    lengths = -np.sort(-np.minimum(lengths, 256))
    pieces = cut(lengths, batch_tokens)
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(500))
    sizes = [len(lengths[piece]) * int(lengths[piece].max()) for piece in pieces]
    assert all(
        size <= batch_tokens or len(lengths[piece]) == 1
        for size, piece in zip(sizes, pieces, strict=True)
    )
    if batch_tokens == 4096:
        assert lengths.sum() > 0.9 * sum(sizes) and len(pieces) < 40


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096, 10**9])
def test_packed_micro_batches_keep_the_budget_and_fill_it(batch_tokens: int) -> None:
    lengths = np.random.default_rng(0).lognormal(4.0, 0.6, size=500).astype(np.int64)
    lengths = -np.sort(-np.minimum(lengths, 256))
    pieces = cut_packed(lengths, batch_tokens)
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(500))
    sizes = [int(lengths[piece].sum()) for piece in pieces]
    assert all(
        size <= batch_tokens or len(lengths[piece]) == 1
        for size, piece in zip(sizes, pieces, strict=True)
    )
    if batch_tokens == 4096:
        assert len(pieces) <= 1 + lengths.sum() / (batch_tokens - 256)


def test_micro_batches_of_nothing() -> None:
    assert cut(np.zeros(0, dtype=np.int64), 4096) == []
    assert cut_packed(np.zeros(0, dtype=np.int64), 4096) == []


def test_no_examples_is_an_error(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="no examples"):
        batches(encoder, [])


def test_positives_are_drawn_afresh_and_the_others_are_no_negatives(encoder: Encoder) -> None:
    made = [
        example(
            f"{number}",
            candidates=tuple(
                candidate(f"{number}-{n}", f"text {number} {n}", -1.0 - n / 10) for n in range(6)
            ),
        )
        for number in range(4)
    ]
    config = TrainingConfig(positives=5, positives_per_step=2, hard_negatives=1)
    items = select(made, config).items
    data = Batches(items, encoder, global_batch=4, seed=0, settings=config)
    seen: set[tuple[str, ...]] = set()
    for step in range(12):
        batch = data.batch(step)
        positive, valid = batch.masks(0, 4, CPU)
        assert positive.sum(dim=1).tolist() == [2, 2, 2, 2] and batch.docs == 4 * 3
        assert (valid & ~positive).sum(dim=1).tolist() == [1 + 3 * 3] * 4
        again = data.batch(step)
        assert np.array_equal(batch.texts, again.texts)
        seen.add(tuple(map(str, batch.texts[: batch.docs])))
    assert len(seen) > 1
    whole = Batches(items, encoder, global_batch=4, seed=0, settings=TrainingConfig())
    assert whole.batch(0).masks(0, 4, CPU)[0].sum(dim=1).tolist() == [5] * 4
    assert whole.digest != data.digest
