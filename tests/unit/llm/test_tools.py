"""Prompts with tools in them: counted as the server will render them, so that shots give way."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from memshare.gateway.prompt import compose
from memshare.gateway.schemas import ChatMessage
from memshare.llm.base import LLMError
from memshare.llm.hf import TransformersBackend
from memshare.llm.prompts import few_shot, fit_shots
from memshare.llm.tokens import ChatTokenizer
from memshare.records import Memory
from tests.tiny_lm import CHATML
from tests.unit.llm.test_tokens import with_template

# As models' own templates have them: the schemas first, and calls with one line an argument.
TOOLS = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
CALLS = (
    "{% for message in messages if 'tool_calls' in message %}{% for call in message.tool_calls %}"
    "<{{ call.function.name }}>{% for name, value in call.function.arguments | items %}"
    "{{ name }}={{ value }};{% endfor %}{% endfor %}{% endfor %}"
)
STYLE = "{% if style is defined %}{{ style }}\n{% endif %}"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place. " * 20,
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}


def called(arguments: Any) -> list[Any]:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "Is it raining in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "no"},
    ]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory, lm_folder: Path) -> ChatTokenizer:
    return with_template(tmp_path_factory.mktemp("t"), lm_folder, TOOLS + STYLE + CALLS + CHATML)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"place": "Paris", "days": 2}', "place=Paris;days=2;"),
        ({"place": "Paris"}, "place=Paris;"), ("", ""), (None, ""), ("{}", ""), ('{"place": ', ""),
        ("[1]", ""), ("5", ""), ([1], ""), ("[" * 100_000, ""),
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_arguments_of_calls_are_read_for_the_template_and_sent_as_they_are(
    chat: ChatTokenizer, arguments: Any, shown: str
) -> None:
    turns = called(arguments)
    before = copy.deepcopy(turns)
    assert chat.render(turns).startswith(f"<weather>{shown}<|im_start|>")
    assert turns == before == chat.clean(turns)


@pytest.mark.parametrize("calls", [None, []])
def test_no_calls_are_none_for_the_template(chat: ChatTokenizer, calls: Any) -> None:
    said: Any = {"role": "assistant", "content": "no"}
    assert chat.render([{**said, "tool_calls": calls}]) == chat.render([said])


@pytest.mark.parametrize("calls", ["x", 5, [1], [{"type": "custom"}]])
def test_calls_of_another_form_are_left_to_the_template(chat: ChatTokenizer, calls: Any) -> None:
    with pytest.raises(LLMError, match="refuses the messages"):
        chat.render([{"role": "assistant", "content": "", "tool_calls": calls}])  # type: ignore[typeddict-unknown-key]


def test_tools_and_the_templates_own_settings_are_counted(chat: ChatTokenizer) -> None:
    ask = few_shot("", [], "why?")
    bare = chat.count(ask)
    assert chat.count(ask, {"tools": None, "chat_template_kwargs": None, "top_p": 1.0}) == bare
    schema = len(chat.encode(json.dumps(WEATHER)))
    assert chat.count(ask, {"tools": [WEATHER]}) - bare == pytest.approx(schema, abs=5)
    style = {"chat_template_kwargs": {"style": "brief"}}
    assert chat.render(ask, style) == "brief\n" + chat.render(ask)
    ours = {"tokenize": True, "chat_template": "x", "tools": [WEATHER], "conversation": []}
    assert chat.render(ask, {"chat_template_kwargs": ours}) == chat.render(ask)
    for odd in ({"tools": 5}, {"tools": ["x"]}, {"chat_template_kwargs": "x"}):
        with pytest.raises(LLMError, match="refuses the messages"):
            chat.render(ask, odd)


def test_shots_give_way_to_tools(backend: TransformersBackend, chat: ChatTokenizer) -> None:
    shots = [(f"q{i}", "verse " * 150) for i in range(6)]
    ask, tools = few_shot("", [], "now"), {"tools": [WEATHER] * 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "chat_tokenizer", chat)
        _, alone = fit_shots(backend, ask, shots, 100)
        messages, kept = fit_shots(backend, ask, shots, 100, tools)
        assert 0 < kept < alone
        assert backend.count_tokens(messages, tools) + 100 <= backend.context_length
        memories = [
            Memory(f"m{i}", "p", *shot, None, None, None, "2026", {}, i)
            for i, shot in enumerate(shots)
        ]
        turns = [ChatMessage(role="user", content="now")]
        assert len(compose(backend, turns, memories, "", 100, tools)[1]) == kept
