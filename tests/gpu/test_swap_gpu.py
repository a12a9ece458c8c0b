"""On a GPU: searches beside swaps, with encoder and index copies there, give what a CPU gives, and
a hundred swaps leave no memory behind."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
import torch

from memshare.retrieval.encoder import Encoder
from memshare.retrieval.publish import activate
from memshare.retrieval.searcher import Searcher
from tests.retrieving import fill, make_config, open_store, publish_now, sentence
from tests.swapping import Expected, mixed
from tests.tiny import tiny_encoder

pytestmark = pytest.mark.gpu


def test_swaps_on_a_gpu(tmp_path: Path) -> None:
    folders = [tiny_encoder(tmp_path / str(seed), seed=seed, dim=64) for seed in range(2)]
    encoders = [Encoder.from_folder(folder, device="cpu") for folder in folders]
    config = make_config(tmp_path / "run", folders[0], gpu="on")
    config = config.model_copy(
        update={"encoder": config.encoder.model_copy(update={"device": "cuda"})}
    )
    rng = random.Random(0)
    questions = [sentence(rng) for _ in range(16)]
    problems: list[str] = []
    stop = threading.Event()
    with open_store(config) as store:
        memories = fill(store, "p", 5000)
        for encoder in encoders:
            publish_now(store, config, encoder, keep=9)
        late = fill(store, "p", 50, seed=1)
        triples = [(m.id, m.prompt, m.answer) for m in memories + late]
        expected = {i + 1: Expected.of(e, questions, triples) for i, e in enumerate(encoders)}

        def search(searcher: Searcher, seed: int) -> None:
            mine = random.Random(seed)
            while not stop.is_set():
                question = mine.randrange(len(questions))
                answer = searcher.search("p", questions[question], 10, timeout=60)
                problem = mixed(answer, question, expected, 10)
                if problem is not None:
                    problems.append(problem)

        def swap_to(searcher: Searcher, number: int) -> None:
            activate(config.retriever_dir, number)
            deadline = time.monotonic() + 60
            while searcher.stats().generation != number:
                assert time.monotonic() < deadline
                time.sleep(0.005)

        with Searcher(store, config) as searcher:
            searcher.wait_ready(60)
            for i in range(10):
                swap_to(searcher, 1 + i % 2)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.mem_get_info()[0]
            threads = [threading.Thread(target=search, args=(searcher, i)) for i in range(4)]
            for thread in threads:
                thread.start()
            for i in range(100):
                swap_to(searcher, 1 + i % 2)
            stop.set()
            for thread in threads:
                thread.join()
            torch.cuda.empty_cache()
            grown = before - torch.cuda.mem_get_info()[0]
            answered = searcher.stats().answered
    assert problems == []
    assert answered > 100
    # FAISS keeps scratch space a resource; one leaked generation a swap would be far more.
    assert grown < 256 * 2**20, f"{grown} bytes of GPU memory more after 100 swaps"


def test_without_room_for_two_the_next_one_moves_up_after_the_swap(tmp_path: Path) -> None:
    folders = [tiny_encoder(tmp_path / str(seed), seed=seed, dim=64) for seed in range(2)]
    config = make_config(tmp_path / "run", folders[0], gpu="on", gpu_memory_gib=0.8)
    config = config.model_copy(
        update={"encoder": config.encoder.model_copy(update={"device": "cuda"})}
    )
    with open_store(config) as store:
        memories = fill(store, "p", 200)
        for folder in folders:
            publish_now(store, config, Encoder.from_folder(folder, device="cpu"), keep=9)
        activate(config.retriever_dir, 1)
        with Searcher(store, config) as searcher:
            searcher.wait_ready(60)
            activate(config.retriever_dir, 2)
            deadline = time.monotonic() + 60
            while searcher.stats().generation != 2:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            serving = searcher._worker.serving
            assert serving is not None
            while str(serving.encoder.device) == "cpu":
                assert time.monotonic() < deadline
                time.sleep(0.005)
            answer = searcher.search("p", memories[0].prompt, 200)
            assert answer.generation == 2 and len(answer.hits) == 200
