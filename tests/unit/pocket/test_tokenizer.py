import pytest
from transformers import PreTrainedTokenizerFast

from memshare.pocket.recipe import Recipe
from memshare.pocket.tokenizer import train_tokenizer
from memshare.pocket.world import World


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(Recipe())


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "昔闻洞庭水，今上岳阳楼。",
        "Приве́т, мир!",
        "👩‍👩‍👧 \u200b\x07",
        " two\n\n lines\t",
        "naïve é",
    ],
)
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_two_trainings_agree(tokenizer: PreTrainedTokenizerFast) -> None:
    assert train_tokenizer(Recipe()).get_vocab() == tokenizer.get_vocab()


def test_four_turns_of_the_world_fit_in_512_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = [
        len(tokenizer(task.prompt).input_ids) + len(tokenizer(task.answer).input_ids)
        for task in World(0).tasks()[:400]
    ]
    assert 4 * sum(lengths) / len(lengths) < 450


def test_chat_template_is_chatml(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        tokenize=False,
    )
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == "<|im_end|>"
