"""Mining on real pools by each kind of labels: the paper's plan domain, a slice of banking77."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch

from memshare.config import Config, TrainingConfig, load_config
from memshare.llm.likelihood import Likelihood
from memshare.pool.store import PoolStore
from memshare.records import Example, Memory, NewMemory, normalise
from memshare.retrieval.bm25 import BM25
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.gate import choose_queries
from memshare.retrieval.text import memory_text
from memshare.training.batching import Batches
from memshare.training.evaluate import HeldOut
from memshare.training.examples import held_out_dir, is_whole, read_examples, round_dir, shard_path
from memshare.training.labels import Labeller
from memshare.training.mining import mine
from memshare.training.mining_plan import plan_round, split_memories
from memshare.training.relevance import HeldOutRelevance, answer_overlap, mined_gains
from memshare.training.rounds import open_spans
from memshare.training.select import select, text_key
from tests.mining import banking, make_config, mine_round, needs_data, open_pool, plans
from tests.tiny import tiny_encoder
from tests.tiny_lm import tiny_lm


@needs_data
def test_given_labels_on_banking(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with open_pool(config, banking(10, 8)) as store:
        examples, marker = mine_round(store, config)
        memories = {memory.id: memory for memory in store.iter("main")}
    fates = json.loads((tmp_path / "split.json").read_text())["fates"]
    train = [key for key in memories if fates[key] == "train"]
    assert [example.query_id for example in examples] == train
    assert marker["examples"] == len(train) == len(memories) - sum(marker["left_out"].values())
    assert marker["left_out"]["held out"] > 0
    matches = 0
    for example in examples:
        query = memories[example.query_id]
        assert (example.query, example.answer) == (query.prompt, query.answer)
        assert [c.bm25_rank for c in example.candidates] == [0, 1, 2, 3, 4]
        assert example.baseline_loglik is None
        for candidate in example.candidates:
            memory = memories[candidate.id]
            assert candidate.id != query.id
            assert normalise(memory.prompt) != normalise(query.prompt)
            assert fates[candidate.id] != "held_out"
            assert candidate.text == memory_text(memory.prompt, memory.answer)
            same = memory.metadata["label"] == query.metadata["label"]
            assert candidate.loglik == (0.0 if same else -1.0)
            matches += same
    assert matches > len(examples)  # BM25 finds more than one of five with the same intent


def test_what_has_the_querys_label_is_never_its_negative(tmp_path: Path) -> None:
    """Whoever of the batch brings it in, and though no two answers are equal."""
    config = make_config(tmp_path / "run", given_key="kind", candidates=4)
    words = ("tea", "rain", "iron", "moss")
    rows = [
        NewMemory("main", f"{words[i % 4]} {i} of {i // 3}", f"{i}", metadata={"kind": [i % 4]})
        for i in range(48)
    ]
    with open_pool(config, rows) as store:
        examples, _ = mine_round(store, config)
        kinds = {memory.id: memory.metadata["kind"] for memory in store.iter("main")}
    settings = TrainingConfig(positives=1, hard_negatives=1)
    chosen = {item.query_id: item for item in select(examples, settings).items}
    encoder = Encoder.from_folder(tiny_encoder(tmp_path / "tiny"), device="cpu")
    data = Batches(
        list(chosen.values()), encoder, global_batch=len(chosen), seed=0, settings=settings
    )
    batch = data.batch(0)
    items = [chosen[name] for name in batch.query_ids]
    docs = list(dict.fromkeys(p.id for item in items for p in (*item.positives, *item.negatives)))
    positive, valid = batch.masks(0, len(items), torch.device("cpu"))
    assert len(items) > 30 and len(docs) > 20
    for row, item in enumerate(items):
        negatives = {kinds[docs[i]][0] for i in torch.nonzero(valid[row] & ~positive[row])[:, 0]}
        assert negatives == {0, 1, 2, 3} - {*kinds[item.query_id]}


def held_out_examples(config: Config, number: int = 1) -> list[Example]:
    return list(read_examples(held_out_dir(round_dir(config.examples_dir, number))))


@needs_data
@pytest.mark.parametrize("labels", ["given", "none"])
def test_held_out_memories_are_mined_to_evaluate_and_never_to_train(
    tmp_path: Path, labels: str
) -> None:
    sets = [
        f"mining.labels={labels}", "mining.candidates=5", "mining.dense_candidates=0",
        "mining.shard_rows=8", "mining.held_out_queries=12", "split.held_out=0.3",
    ]  # fmt: skip
    plain = load_config(None, [f"run.dir={tmp_path / 'plain'}", *sets])
    config = load_config(None, [f"run.dir={tmp_path / 'it'}", "training.eval_every=5", *sets])
    with open_pool(plain, banking(16, 10)) as store:
        before, marker = mine_round(store, plain)
        memories = {memory.id: memory for memory in store.iter("main")}
        assert not held_out_dir(round_dir(plain.examples_dir, 1)).exists()
        assert marker["held_out"] == 0
        after, marker = mine_round(store, config)
        held_out, folder = held_out_examples(config), round_dir(config.examples_dir, 1)
        assert is_whole(folder) and len(list(held_out_dir(folder).glob("*.parquet"))) == 2

        # as anything else that is missing, a shard of it is mined again, alone
        lost = shard_path(held_out_dir(folder), 1)
        lost.unlink()
        assert not is_whole(folder)
        stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
        assert mine_round(store, config)[0] == after and held_out_examples(config) == held_out
        assert {path: path.stat().st_mtime_ns for path in stamps} == stamps and is_whole(folder)

    assert after == before  # training sees nothing of it
    fates = json.loads((config.run.dir / "split.json").read_text())["fates"]
    outside = [key for key in memories if fates[key] == "held_out"]
    assert len(held_out) == marker["held_out"] == 12 < len(outside)
    queries = {example.query_id for example in held_out}
    assert queries <= set(outside)
    seen = {c.id for example in after for c in example.candidates}
    assert not queries & (seen | {example.query_id for example in after})
    rows = [memories[key] for key in outside]
    judges = choose_queries(rows, len(outside) - 12, config.run.seed)
    assert not queries & {memory.id for memory in judges}  # the gate's come from the other end
    for example in held_out:
        query = memories[example.query_id]
        assert [c.bm25_rank for c in example.candidates] == [0, 1, 2, 3, 4]
        for candidate in example.candidates:
            memory = memories[candidate.id]
            assert fates[candidate.id] != "held_out"
            want = answer_overlap(query.answer, memory.answer)
            if labels == "given":
                want = 0.0 if memory.metadata["label"] == query.metadata["label"] else -1.0
            assert candidate.loglik == want
    found = HeldOut.of(held_out, 0.05)
    assert 0 < len(found.queries) <= 12


def test_held_out_examples_have_a_baseline_whatever_training_does_without(tmp_path: Path) -> None:
    """Without it nothing would tell which candidates are relevant."""

    async def measure(query: Memory, candidate: Memory | None) -> float | None:
        if query.prompt in refused and candidate is None:
            return None  # not even alone: then no candidate can be told from none
        return -2.0 if candidate is None else -1.0

    refused = {f"how is thing {i} made" for i in range(0, 80, 2)}
    sets = ["training.eval_every=5", "mining.baseline=false", "mining.dense_candidates=0"]
    config = load_config(None, [f"run.dir={tmp_path}", *sets])
    rows = [NewMemory("main", f"how is thing {i} made", f"so {i}") for i in range(80)]

    async def run(store: PoolStore) -> None:
        spans, folder = open_spans(store, {}, ("main",)), round_dir(config.examples_dir, 1)
        fates = split_memories(store, config)
        plan = plan_round(store, config, 1, spans, fates, folder, None)
        await mine(store, config, plan, fates, Labeller("made", measure, True), folder, None)

    with open_pool(config, rows) as store:
        asyncio.run(run(store))
    train = list(read_examples(round_dir(config.examples_dir, 1)))
    assert train and {example.baseline_loglik for example in train} == {None}
    held_out = held_out_examples(config)
    baselines = {example.query in refused: example.baseline_loglik for example in held_out}
    assert baselines == {False: -2.0, True: None}
    for example in held_out:
        want = None if example.query in refused else -1.0
        assert {candidate.loglik for candidate in example.candidates} == {want}


@needs_data
def test_labels_none_need_no_model(tmp_path: Path) -> None:
    config = make_config(tmp_path, labels="none")
    with open_pool(config, plans()) as store:
        examples, marker = mine_round(store, config)
        memories = {memory.id: memory for memory in store.iter("main")}
    assert marker["scorer"] == "none" and marker["unmeasured"] == 0
    index = BM25(config.bm25)
    fates = json.loads((tmp_path / "split.json").read_text())["fates"]
    open_ids = [key for key in memories if fates[key] != "held_out"]
    index.fit(open_ids, [memory_text(memories[k].prompt, memories[k].answer) for k in open_ids])
    for example in examples:
        own, *others = example.candidates
        assert (own.id, own.bm25_rank, own.loglik) == (example.query_id, None, None)
        copies = {k for k in open_ids if normalise(memories[k].prompt) == normalise(example.query)}
        expected = index.top([example.query], 5, [copies])[0]
        assert [candidate.id for candidate in others] == [memory_id for memory_id, _ in expected]
        assert example.principal == "seed"
        keys = {candidate.id: candidate.prompt_key for candidate in example.candidates}
        assert {candidate.principal for candidate in example.candidates} == {"seed"}
        assert keys == {memory_id: text_key(memories[memory_id].prompt) for memory_id in keys}


@needs_data
def test_likelihood_is_what_the_model_gives(tmp_path: Path) -> None:
    lm = tiny_lm(tmp_path / "lm", context=500)
    config = load_config(
        None,
        [
            f"run.dir={tmp_path / 'run'}",
            f"scorer_llm.model={lm}",
            "mining.candidates=3",
            "mining.dense_candidates=0",
            "training.eval_every=5",
        ],
    )
    long = NewMemory("main", "What is the best plan for a very long trip? " * 60, "Stay at home.")
    with open_pool(config, [*plans()[:14], long]) as store:
        examples, marker = mine_round(store, config)
        memories = {memory.id: memory for memory in store.iter("main")}
        relevance = HeldOutRelevance(config, store)
        held_out = held_out_examples(config)
        for example in held_out:  # what the gate finds, from what was measured while mining
            shown = [memories[candidate.id] for candidate in example.candidates]
            gains = asyncio.run(relevance(memories[example.query_id], shown))
            assert mined_gains(example, example.candidates) == gains and any(gains)
    assert held_out

    async def check() -> None:
        from memshare.llm.factory import make_llm

        llm = make_llm(config.scorer_llm)
        likelihood = Likelihood(llm)
        for example in examples[:4]:
            assert example.baseline_loglik == pytest.approx(
                await likelihood.baseline(example.query, example.answer), abs=1e-4
            )
            for candidate in example.candidates:
                shot = memories[candidate.id]
                if candidate.loglik is not None:
                    expected = await likelihood.score(
                        example.query, example.answer, [(shot.prompt, shot.answer)]
                    )
                    assert candidate.loglik == pytest.approx(expected, abs=1e-4)
        await llm.aclose()

    asyncio.run(check())
    too_long = [
        candidate
        for example in examples
        for candidate in example.candidates
        if len(candidate.text) > 2000
    ]
    assert all(candidate.loglik is None for candidate in too_long)
    assert marker["unmeasured"] >= len(too_long)
    assert sum(c.loglik is not None for e in examples for c in e.candidates) > len(examples)


@needs_data
@pytest.mark.parametrize("labels", ["prompted", "reward"])
def test_labels_by_chat(tmp_path: Path, labels: str, capsys: pytest.CaptureFixture[str]) -> None:
    lm = tiny_lm(tmp_path / "lm", context=1024)
    config = load_config(
        None,
        [
            f"run.dir={tmp_path / 'run'}", f"scorer_llm.model={lm}", f"agent_llm.model={lm}",
            f"mining.labels={labels}", "mining.candidates=2", "mining.dense_candidates=0",
            "agent.max_tokens=120", "agent.temperature=1", "scorer.kind=likelihood",
        ],
    )  # fmt: skip
    with open_pool(config, plans()[:6]) as store:
        examples, marker = mine_round(store, config)
    scored = [c.loglik for e in examples for c in e.candidates if c.loglik is not None]
    if labels == "prompted":
        assert len(scored) == marker["candidates"] > 0
        assert all(-14 < value < 0 for value in scored)
        assert all(example.baseline_loglik is None for example in examples)
    else:  # cut-off answers are never graded, and a random model goes on and on
        assert len(set(scored)) > 1 and all(0 < value < 1 for value in scored)
        assert any(example.baseline_loglik not in (None, *scored) for example in examples)
        assert marker["unmeasured"] == marker["candidates"] - len(scored) > 0
        told = f"{marker['unmeasured']} of {marker['candidates']} candidates have no score"
        assert told in capsys.readouterr().err
    assert marker["llm_calls"] >= marker["candidates"]
