import dataclasses
import itertools
import random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from memshare.pocket import fit
from memshare.pocket.ability import last_answer_rows
from memshare.pocket.episodes import Episode, EpisodeWriter, Turn
from memshare.pocket.recipe import Recipe
from memshare.pocket.tokenizer import train_tokenizer

RECIPE = Recipe(steps=12)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(RECIPE)


def test_rows_are_what_the_chat_template_writes(tokenizer: PreTrainedTokenizerFast) -> None:
    writer = EpisodeWriter(random.Random(3))
    maker = fit.RowMaker(tokenizer, RECIPE)
    for episode in [writer.episode() for _ in range(30)]:
        messages = [{"role": "system", "content": episode.system}] if episode.system else []
        for turn in episode.turns:
            messages += [
                {"role": "user", "content": turn.prompt},
                {"role": "assistant", "content": turn.answer},
            ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        (row,) = maker.rows([episode])
        assert tokenizer.decode(row.ids) == text
        assert row.ids == tokenizer(text, add_special_tokens=False).input_ids


def test_weight_lies_on_the_answer_and_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    maker = fit.RowMaker(tokenizer, RECIPE)
    episode = Episode((Turn("ask", "first", False), Turn("ask again", "the second", True)))
    (row,) = maker.rows([episode])
    learnt = [token for token, weight in zip(row.ids, row.weights, strict=True) if weight == 1.0]
    assert tokenizer.decode(learnt) == "the second<|im_end|>"
    faint = [t for t, w in zip(row.ids, row.weights, strict=True) if 0 < w < 1]
    assert tokenizer.decode(faint) == "first<|im_end|>"
    (last,) = last_answer_rows(maker, [episode])
    assert sum(last.weights) == len(learnt)


def test_repeats_repeat(tokenizer: PreTrainedTokenizerFast) -> None:
    maker = fit.RowMaker(tokenizer, RECIPE)
    rng = random.Random(0)
    for _ in range(50):
        row = maker.repeat(rng, 128)
        assert len(row.ids) == len(row.weights) <= 160
        first = row.weights.index(1.0)
        assert row.ids[first] in row.ids[:first]


def test_batches_are_seeded_and_bounded(tokenizer: PreTrainedTokenizerFast) -> None:
    def some() -> list[fit.Batch]:
        return list(itertools.islice(fit.batches(RECIPE, tokenizer), RECIPE.steps))

    mine, again = some(), some()
    assert len(mine) == RECIPE.steps
    for batch, other in zip(mine, again, strict=True):
        assert torch.equal(batch.ids, other.ids)
        assert batch.ids.numel() <= RECIPE.batch_tokens or len(batch.ids) == 1
    assert mine[0].ids.shape[1] <= 128


def test_a_fresh_model_copies_what_it_saw(tokenizer: PreTrainedTokenizerFast) -> None:
    model = fit.new_model(RECIPE, tokenizer)
    generator = torch.Generator().manual_seed(0)
    block = torch.randperm(2500, generator=generator)[:60] + 300
    ids = torch.cat((block, block))[None]
    with torch.no_grad():
        guesses = model(input_ids=ids).logits[0, 62:-1].argmax(-1)
    assert (guesses == ids[0, 63:]).float().mean() > 0.7


def test_orthogonal_makes_singular_values_alike() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 48), (3, 48, 16)):
        values = torch.linalg.svdvals(fit.orthogonal(torch.randn(*shape)))
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_steps_lower_the_loss_on_one_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    recipe = dataclasses.replace(RECIPE, warmup_steps=1, steps=40, hidden_size=128, mlp_size=128)
    model = fit.new_model(recipe, tokenizer)
    optimizers = fit.Optimizers(model, recipe)
    maker = fit.RowMaker(tokenizer, recipe)
    rng = random.Random(1)
    rows = maker.rows([EpisodeWriter(rng).episode(shots=1) for _ in range(4)])
    batch = fit.collate(rows, tokenizer.pad_token_id)
    losses = []
    for number in range(12):
        losses.append(fit.train_step(model, batch)[0])
        optimizers.step(number)
    assert losses[-1] < 0.8 * losses[0]
