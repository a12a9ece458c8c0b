"""Small sets of scored examples, made on the spot, for the tests of the trainer."""

from __future__ import annotations

import random
from pathlib import Path

from memshare.records import Candidate, Example, answer_key
from memshare.retrieval.text import memory_text
from memshare.training.examples import shard_path, write_marker, write_shard
from memshare.training.select import text_key

TOPICS = ("tea", "rain", "iron", "moss", "salt", "wool", "echo", "fern")


def candidate(
    name: str, text: str, loglik: float | None, answer: str = "", rank: int = 0
) -> Candidate:
    prompt, _, _ = text.partition("\n")
    key = answer_key(answer or text)
    return Candidate(name, text, rank, loglik, key, prompt_key=text_key(prompt))


def example(name: str = "q", **changes: object) -> Example:
    fields: dict[str, object] = {
        "query_id": name,
        "query": f"question {name}",
        "answer": f"answer {name}",
        "pool": "main",
        "principal": None,
        "round": 1,
        "seq": 1,
        "scorer": "made",
        "labels": "likelihood",
        "baseline_loglik": -3.0,
        "candidates": (),
    }
    return Example(**{**fields, **changes})  # type: ignore[arg-type]


def examples(count: int, seed: int = 0, pool: str = "main", start: int = 0) -> list[Example]:
    """Queries about a topic; memories of the same topic are helpful, those of others are not."""
    rng = random.Random(seed)
    made = []
    for i in range(start, start + count):
        topic = TOPICS[i % len(TOPICS)]
        filler = " ".join(
            rng.choices(("ask", "the", "of", "when", "who", "how", "big"), k=3 + i % 9)
        )
        candidates = []
        for rank in range(6):
            other = topic if rank == 2 else TOPICS[(i + 1 + rank) % len(TOPICS)]
            other = "tea" if other == topic and rank != 2 else other
            text = memory_text(f"{other} {filler} {rank} {i}", f"{other} says {i} {rank}")
            score = -1.0 if rank == 2 else -4.0 - 0.1 * rank
            candidates.append(
                candidate(f"{pool}-{i}-{rank}", text, score, f"{other} says {i} {rank}", rank)
            )
        made.append(
            example(
                f"{pool}-{i}",
                query=f"{topic} {filler} {i}",
                answer=f"{topic} answer {i}",
                pool=pool,
                candidates=tuple(candidates),
            )
        )
    return made


def unlearnable(count: int) -> list[Example]:
    """Usable examples without a single negative: all of their memories give one answer."""
    return [
        example(
            f"same-{i}", answer="yes",
            candidates=(candidate(f"yes-{i}", memory_text(f"question {i}", "yes"), -0.5, "yes"),),
        )
        for i in range(count)
    ]  # fmt: skip


def write_round(folder: Path, *shards: list[Example]) -> Path:
    """A finished round."""
    for index, made in enumerate(shards):
        write_shard(shard_path(folder, index), made)
    write_marker(folder, {"shards": len(shards)})
    return folder
