"""The pocket LM's tokenizer: byte-level BPE, so that any Unicode text has tokens, and ChatML."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memshare.pocket import words
from memshare.pocket.episodes import EpisodeWriter
from memshare.pocket.recipe import Recipe

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
QUOTES = ("“", "”")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Learn merges from everyday words and random episodes; the hidden ways are never shown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size - len(QUOTES),
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(recipe.seed), trainer)
    # Never merged with the punctuation beside them, so that a quoted subject always looks alike.
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in QUOTES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=recipe.max_positions,
        clean_up_tokenization_spaces=False,
    )


def _corpus(seed: int) -> Iterator[str]:
    rng = random.Random(f"{seed}/tokenizer")
    for _ in range(3):
        yield " " + " ".join(words.ENGLISH)
        yield " ".join(word.capitalize() for word in words.ENGLISH)
    yield "system\nuser\nassistant\n " + " ".join(str(number) for number in range(100))
    writer = EpisodeWriter(rng)
    for _ in range(1500):
        for turn in writer.episode().turns:
            yield turn.prompt
            yield turn.answer
