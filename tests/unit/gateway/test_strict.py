"""What is no JSON text, however Python feels about it, is a 400 with its reason."""

from __future__ import annotations

import json
import time

import pytest

from memshare.gateway.errors import ApiError
from memshare.gateway.strict import parse_json


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -2.5, "x", None, True, {"b": []}]},
        'brackets in text: [[[ {{{ \\ " ',
        {"emoji": "\U0001f600", "escaped": "\\ud83d"},
        [[[[1]]]],
        2**63 - 1,
    ],
)
def test_json_is_read_as_it_is(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a": 1} x', "not JSON"),
        (b'"\xff"', "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'"\\ud800"', "lone surrogate"),
        (b'{"\\udc00": 1}', "lone surrogate"),
        (b"NaN", "NaN is not JSON"),
        (b"[-Infinity]", "Infinity is not JSON"),
        (b"1e999", "out of range"),
        (b"1" * 5000, "out of range"),
        (b"[" * 65 + b"]" * 65, "nested deeper"),
        (b"[" * 1_000_000, "nested deeper"),
    ],
)
def test_what_json_has_not_is_refused(body: bytes, complaint: str) -> None:
    with pytest.raises(ApiError) as refusal:
        parse_json(body)
    assert refusal.value.status_code == 400
    assert complaint in refusal.value.detail


def test_a_surrogate_pair_is_one_character() -> None:
    assert parse_json(b'"\\ud83d\\ude00"') == "\U0001f600"


def test_no_text_makes_the_depth_check_quadratic() -> None:
    started = time.perf_counter()
    for evil in (b'"' + b'\\"' * 500_000, b'"' * 1_000_000, b'"\\' * 500_000):
        with pytest.raises(ApiError):
            parse_json(evil)
    assert time.perf_counter() - started < 20  # quadratic: hours
