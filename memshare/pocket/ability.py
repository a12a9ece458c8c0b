"""What the pocket LM can do, measured: answers shown in its context against answers that are not.

All of it by one forward pass a conversation: where every token of an answer is the likeliest one
given those before, greedy decoding writes exactly that answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from memshare.pocket.episodes import Episode, EpisodeWriter, Turn
from memshare.pocket.fit import RowMaker, collate, target_logits
from memshare.pocket.recipe import Recipe
from memshare.pocket.world import Task, World, relevant

_ROWS = 16


def measure(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    *,
    count: int = 100,
    world_seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Figures for the last answer of each sort of conversation, over ``count`` of them.

    ``exact``: share of answers that greedy decoding writes exactly; ``tokens``: share of tokens
    that are the likeliest one; ``loglik``: mean log-likelihood a token, in nats; ``above_none``:
    share of answers that are likelier than with no example. Sorts: ``unseen_present`` and
    ``unseen_absent`` are random texts with and without the form in an example; ``world_*`` are
    test questions of the pocket world, shown a memory of the same group (``gold``), the same as
    the last of three shots, a memory of another group of the kind, nothing.
    """
    sorts = {**_unseen(recipe, count), **_world(world_seed, count)}
    logliks: dict[str, list[float]] = {}
    figures: dict[str, dict[str, float]] = {}
    for name, episodes in sorts.items():
        exact, right, logliks[name] = _score(model, tokenizer, recipe, episodes)
        figures[name] = {
            "n": len(episodes),
            "exact": exact,
            "tokens": right,
            "loglik": sum(logliks[name]) / len(episodes),
        }
    for name, values in logliks.items():
        none = logliks["unseen_absent" if name.startswith("unseen") else "world_zero_shot"]
        wins = [a > b for a, b in zip(values, none, strict=True)]
        figures[name]["above_none"] = sum(wins) / len(wins)
    return figures


def last_answer_rows(maker: RowMaker, episodes: Sequence[Episode]) -> list[Any]:
    """Rows in which only the last answer (and its end token) has weight."""
    silent = [
        Episode(
            (*(Turn(t.prompt, t.answer, False) for t in e.turns[:-1]), _known(e.turns[-1])),
            e.system,
        )
        for e in episodes
    ]
    return [
        row._replace(weights=[1.0 if weight == 1.0 else 0.0 for weight in row.weights])
        for row in maker.rows(silent)
    ]


def _known(turn: Turn) -> Turn:
    return Turn(turn.prompt, turn.answer, True)


@torch.no_grad()
def _score(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    episodes: Sequence[Episode],
) -> tuple[float, float, list[float]]:
    """Exact share, token share, and each episode's mean log-likelihood a token."""
    rows = last_answer_rows(RowMaker(tokenizer, recipe), episodes)
    exact: list[bool] = []
    right: list[float] = []
    logliks: list[float] = []
    for start in range(0, len(rows), _ROWS):
        batch = collate(rows[start : start + _ROWS], tokenizer.pad_token_id)
        logits, targets, _ = target_logits(model, batch)
        chosen = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        hits = logits.argmax(-1) == targets
        sizes = (batch.weights[:, 1:] != 0).sum(1).tolist()
        for hit, loglik in zip(torch.split(hits, sizes), torch.split(chosen, sizes), strict=True):
            exact.append(bool(hit.all()))
            right.append(float(hit.float().mean()))
            logliks.append(float(loglik.mean()))
    return sum(exact) / len(exact), sum(right) / len(right), logliks


def _unseen(recipe: Recipe, count: int) -> dict[str, list[Episode]]:
    """Random episodes that training never drew, with the last answer's form shown and not."""
    writer = EpisodeWriter(random.Random(f"{recipe.seed}/unseen"))
    present: list[Episode] = []
    while len(present) < count:
        episode = writer.episode()
        if len(episode.turns) > 1 and episode.turns[-1].learn:
            present.append(episode)
    absent = [Episode(episode.turns[-1:], episode.system) for episode in present]
    return {"unseen_present": present, "unseen_absent": absent}


def _world(seed: int, count: int) -> dict[str, list[Episode]]:
    splits = World(seed).splits()
    pool = (*splits.seed, *splits.problems)
    rng = random.Random(f"{seed}/ability")
    tests = splits.test[:count]

    def turn(task: Task) -> Turn:
        return Turn(task.prompt, task.answer, False)

    out: dict[str, list[Episode]] = {
        name: [] for name in ("world_gold", "world_gold_third", "world_wrong", "world_zero_shot")
    }
    for task in tests:
        gold = rng.choice([t for t in pool if relevant(task, t) and t.subject != task.subject])
        wrong = rng.choice([t for t in pool if t.kind == task.kind and not relevant(task, t)])
        other = rng.choice([t for t in pool if t.kind != task.kind])
        shots = {
            "world_gold": (gold,),
            "world_gold_third": (other, wrong, gold),
            "world_wrong": (wrong,),
            "world_zero_shot": (),
        }
        for name, shown in shots.items():
            out[name].append(Episode((*(turn(shot) for shot in shown), turn(task))))
    return out
