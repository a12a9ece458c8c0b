"""Training the pocket LM: the model's first weights, its batches, and one step.

Copying by example is done by induction heads (Olsson et al. 2022): a head that looks one token
back, and a later one that looks for the same past and copies what followed it. They form late in
small trainings, so the first layer's heads begin as look-back heads, repeated random sequences
demand nothing but copying, and rows are short at first.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from memshare.pocket.episodes import Episode, EpisodeWriter
from memshare.pocket.recipe import Recipe
from memshare.pocket.tokenizer import END, START, train_tokenizer
from memshare.progress import log, track


class Row(NamedTuple):
    """Token ids, and the weight in the loss of predicting each of them."""

    ids: list[int]
    weights: list[float]


class Batch(NamedTuple):
    """``ids`` and ``weights``, both (rows, length); padding has weight 0."""

    ids: torch.Tensor
    weights: torch.Tensor


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A fresh Qwen2 whose attention starts as a copying circuit."""
    torch.manual_seed(recipe.seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.mlp_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        initializer_range=recipe.init_std,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=recipe.embedding_std)
    _copying_start(model, recipe)
    return model


@torch.no_grad()
def _copying_start(model: Qwen2ForCausalLM, recipe: Recipe) -> None:
    """Set the first two layers' attention to a copying circuit; every other output to zero.

    First layer: head n writes a sketch of the token n back (n = 1, 2, ...) into a subspace of its
    own. With rotary positions a constant key is nearest to itself turned back n positions, so
    biases do that. Second layer: the sketches of this token and of those just before it are
    compared with those that stand before each earlier token, in the slowly turning dimensions,
    which distance hardly changes; the best match's token is copied to the output, each head
    passing on its part of the embedding.
    """
    size, heads = recipe.hidden_size, recipe.heads
    dim = size // heads
    half = dim // 2
    turns = recipe.rope_theta ** (-torch.arange(half) / half)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    basis = torch.linalg.qr(torch.randn(size, size))[0]
    sketches = [basis[:, n * dim : (n + 1) * dim] for n in range(min(heads, 4))]
    first: Any = model.model.layers[0].self_attn
    for head, place in enumerate(sketches[1:]):
        rows = slice(head * dim, (head + 1) * dim)
        first.k_proj.bias[rows] = torch.cat((torch.ones(half), torch.zeros(half)))
        angle = -(head + 1) * turns
        first.q_proj.bias[rows] = torch.cat((angle.cos(), angle.sin()))
        first.k_proj.bias[rows] *= recipe.look_back
        first.q_proj.bias[rows] *= recipe.look_back
        first.v_proj.weight[rows] = sketches[0].T
        first.o_proj.weight[:, rows] = place * 2 * recipe.embedding_std
    second: Any = model.model.layers[1].self_attn
    slow = [n + side for n in range(half) if turns[n] < recipe.slow for side in (0, half)]
    pairs = list(itertools.pairwise(sketches))
    copies = torch.linalg.qr(torch.randn(size, size))[0]
    for head in range(heads):
        start = head * dim
        rows = slice(start, start + dim)
        for number, (now, before) in enumerate(pairs):
            slots = slow[number :: len(pairs)]
            picked = torch.randperm(dim)[: len(slots)]
            at = torch.tensor(slots) + start
            second.q_proj.weight[at] = now.T[picked] * recipe.match
            second.k_proj.weight[at] = before.T[picked] * recipe.match
        second.v_proj.weight[rows] = copies[:, rows].T
        second.o_proj.weight[:, rows] = copies[:, rows] * recipe.copy


class RowMaker:
    """Turns episodes and random repeats into rows of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
        """Look up the fixed pieces of the chat form once."""
        self.tokenizer = tokenizer
        self.recipe = recipe
        self._start = tokenizer.convert_tokens_to_ids(START)
        self._end = tokenizer.convert_tokens_to_ids(END)
        self._line = self._encode(["\n"])[0]
        self._heads = {
            role: [self._start, *self._encode([f"{role}\n"])[0]]
            for role in ("system", "user", "assistant")
        }
        self._first_plain = max(tokenizer.all_special_ids) + 1

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False).input_ids
        return encoded

    def rows(self, episodes: Sequence[Episode]) -> list[Row]:
        """One row an episode, as the chat template writes it; answers carry weight."""
        texts = [
            text
            for episode in episodes
            for text in (
                episode.system,
                *(t for turn in episode.turns for t in (turn.prompt, turn.answer)),
            )
        ]
        pieces = iter(self._encode(texts))
        return [self._row(episode, pieces) for episode in episodes]

    def _row(self, episode: Episode, pieces: Iterator[list[int]]) -> Row:
        ids: list[int] = []
        weights: list[float] = []

        def add(tokens: list[int], weight: float) -> None:
            ids.extend(tokens)
            weights.extend([weight] * len(tokens))

        system = next(pieces)
        if episode.system:
            add([*self._heads["system"], *system, self._end, *self._line], 0.0)
        for turn in episode.turns:
            add([*self._heads["user"], *next(pieces), self._end, *self._line], 0.0)
            add(self._heads["assistant"], 0.0)
            add([*next(pieces), self._end], 1.0 if turn.learn else self.recipe.unknown_weight)
            add(self._line, 0.0)
        return Row(ids, weights)

    def repeat(self, rng: random.Random, limit: int) -> Row:
        """Random tokens, now and then others between, and the same tokens again."""
        size = rng.randint(6, max(8, min(limit // 2 - 8, 100)))
        vocab = range(self._first_plain, len(self.tokenizer))
        some = rng.choices(vocab, k=rng.choice((12, 50, len(vocab))))
        block = rng.choices(some, k=size)
        gap = rng.choices(some, k=rng.randint(0, 12)) if rng.random() < 0.5 else []
        times = 2 if rng.random() < 0.7 else min(4, limit // (size + len(gap)))
        ids, weights = list(block), [0.0] * size
        for _ in range(max(times, 2) - 1):
            ids += gap + block
            weights += [0.0] * (len(gap) + 2) + [1.0] * (size - 2)
        return Row(ids, weights)


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[Batch]:
    """The training batches in order: stage by stage, rows of like length together."""
    rng = random.Random(f"{recipe.seed}/batches")
    maker = RowMaker(tokenizer, recipe)
    made = 0
    done = 0.0
    for share, limit in recipe.stages:
        done += share
        until = round(recipe.steps * done)
        while made < until:
            progress = made / recipe.steps
            first, last = recipe.repeats
            portion = first + (last - first) * progress
            long = recipe.long_answers if limit > 512 else 0.0
            block = _block(rng, maker, portion, limit, long)
            chosen = _cut(block, recipe.batch_tokens)
            rng.shuffle(chosen)
            for rows in chosen[: until - made]:
                made += 1
                yield collate(rows, tokenizer.pad_token_id)


def _block(
    rng: random.Random, maker: RowMaker, portion: float, limit: int, long: float
) -> list[Row]:
    """Rows for some dozens of batches, none of them longer than ``limit``."""
    writer = EpisodeWriter(rng)
    shots = 1 if limit <= 160 else None
    budget = 40 * maker.recipe.batch_tokens
    rows: list[Row] = []
    total = 0
    while total < budget * (1 - portion):
        for row in maker.rows([writer.episode(long, shots) for _ in range(200)]):
            if len(row.ids) <= limit:
                rows.append(row)
                total += len(row.ids)
    while total < budget:
        rows.append(maker.repeat(rng, limit))
        total += len(rows[-1].ids)
    return rows


def _cut(rows: list[Row], batch_tokens: int) -> list[list[Row]]:
    """Batches of rows of like length, each at most ``batch_tokens`` with padding."""
    out: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if out[-1] and (len(out[-1]) + 1) * len(row.ids) > batch_tokens:
            out.append([])
        out[-1].append(row)
    return out


def collate(rows: Sequence[Row], pad: int) -> Batch:
    """Rows padded on the right to the longest."""
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad)
    weights = torch.zeros(len(rows), length)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        weights[number, : len(row.ids)] = torch.tensor(row.weights)
    return Batch(ids, weights)


def target_logits(
    model: Qwen2ForCausalLM, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (n, vocabulary), targets (n,) and weights (n,) where the weight is not zero.

    Padding stands on the right and attention is causal, so no mask is needed.
    """
    hidden = model.model(input_ids=batch.ids[:, :-1], use_cache=False).last_hidden_state
    weights = batch.weights[:, 1:]
    picked = weights != 0
    return model.lm_head(hidden[picked]), batch.ids[:, 1:][picked], weights[picked]


class Muon:
    """Momentum whose update is made orthogonal (Jordan et al. 2024), in float32.

    Matrices of one shape are handled as one stack, which on a CPU is several times as fast as
    torch's own, made for bfloat16 and one matrix at a time.
    """

    def __init__(self, matrices: Sequence[torch.Tensor], momentum: float = 0.95) -> None:
        """Group the matrices by shape; each group keeps one stacked momentum."""
        shapes: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for matrix in matrices:
            shapes.setdefault(tuple(matrix.shape), []).append(matrix)
        self._groups = [(group, torch.zeros(len(group), *shape)) for shape, group in shapes.items()]
        self._momentum = momentum

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients, which are cleared."""
        for group, velocity in self._groups:
            gradient = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            velocity.lerp_(gradient, 1 - self._momentum)
            update = orthogonal(gradient.lerp(velocity, self._momentum))
            scale = lr * max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            for matrix, change in zip(group, update, strict=True):
                matrix.sub_(change, alpha=scale)
                matrix.grad = None


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices of a stack (n, rows, columns), roughly: five rounds."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x: torch.Tensor = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


class Optimizers:
    """Muon for the layers' matrices, AdamW for the rest, one schedule."""

    def __init__(self, model: Qwen2ForCausalLM, recipe: Recipe) -> None:
        """Sort the parameters by optimizer."""
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self.recipe = recipe
        self._muon = Muon(matrices)
        self._adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, number: int) -> None:
        """Take step ``number`` (from 0) and clear the gradients."""
        recipe = self.recipe
        left = (recipe.steps - number) / (recipe.decay * recipe.steps)
        scale = min(1.0, (number + 1) / recipe.warmup_steps, left)
        self._muon.step(recipe.muon_lr * scale)
        for group in self._adam.param_groups:
            group["lr"] = recipe.adam_lr * scale
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)


def train_step(model: Qwen2ForCausalLM, batch: Batch) -> tuple[float, float]:
    """Gradients of one batch; returns the loss (nats a token) and the share of right tokens."""
    logits, targets, weights = target_logits(model, batch)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    known = weights == 1.0
    right = (logits.argmax(-1) == targets)[known].float().mean()
    return float(loss.detach()), float(right)


def train(
    recipe: Recipe,
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast, dict[str, Any]]:
    """The whole training: tokenizer, fresh model, every step. Returns figures of it besides.

    Uses at most two threads, as many cores as the recipe was made for.
    """
    started, used = time.monotonic(), time.process_time()
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    try:
        tokenizer = train_tokenizer(recipe)
        model = new_model(recipe, tokenizer)
        model.train()
        optimizers = Optimizers(model, recipe)
        tokens = 0
        recent: list[tuple[float, float]] = []
        steps = track(batches(recipe, tokenizer), "pocket LM", recipe.steps)
        for number, batch in enumerate(steps):
            recent.append(train_step(model, batch))
            optimizers.step(number)
            tokens += batch.ids.numel()
            if (number + 1) % 100 == 0:
                last = recent[-100:]
                loss, right = (sum(values) / len(last) for values in zip(*last, strict=True))
                log(f"pocket LM: step {number + 1}, loss {loss:.3f}, tokens right {right:.3f}")
    finally:
        torch.set_num_threads(threads)
    figures = {
        "steps": recipe.steps,
        "tokens": tokens,
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - used,
        "torch": torch.__version__,
    }
    return model, tokenizer, figures
