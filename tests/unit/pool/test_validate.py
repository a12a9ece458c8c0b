"""What text and provenance a pool takes."""

from dataclasses import replace

import pytest

from memshare.pool.errors import InvalidMemory
from memshare.pool.validate import canonical_time, check_memory, check_score, now
from memshare.records import NewMemory

GOOD = NewMemory("main", "a prompt", "an answer")
DEEP: list = []
for _ in range(100_000):
    DEEP = [DEEP]


def nested(levels: int) -> dict[str, object]:
    """An object with ``levels`` of objects in all."""
    return {"a": 1} if levels == 1 else {"a": nested(levels - 1)}


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("prompt", "", "empty"),
        ("prompt", " \t\n\u3000", "empty"),
        ("answer", "a\x00b", "NUL"),
        ("answer", "a\ud800b", "surrogate"),
        ("prompt", "x" * 101, "101 characters long, at most 100"),
        ("prompt", 7, "int"),
        ("answer", None, "NoneType"),
        ("pool", "", "empty"),
        ("pool", " main", "space"),
        ("pool", "a\x1bb", "unprintable"),
        ("score", float("nan"), "0..100"),
        ("score", 100.5, "0..100"),
        ("score", -1, "0..100"),
        ("score", 10**400, "0..100"),  # JSON has such numbers, and no float is as large
        ("score", True, "number"),
        ("score", "80", "number"),
        ("agent", "", "empty"),
        ("agent", "x" * 257, "257"),
        ("model", 3, "int"),
        ("created_at", "yesterday", "ISO 8601"),
        ("created_at", 20240101, "ISO 8601"),
        ("metadata", [1], "object"),
        ("metadata", {1: 2}, "object"),
        ("metadata", {"a": float("inf")}, "JSON"),
        ("metadata", {"a": {1, 2}}, "JSON"),
        ("metadata", {"a": DEEP}, "JSON"),
        ("metadata", {"a": "\x00"}, "NUL"),
        ("metadata", {"a\x00": 1}, "NUL"),
        ("metadata", {"a": "\udfff"}, "surrogate"),
        ("metadata", {"a": "x" * 200}, "at most 100"),
        ("id", "a b", "letters"),
        ("id", "x" * 65, "letters"),
    ],
)
def test_what_is_refused_names_its_field(field: str, value: object, problem: str) -> None:
    with pytest.raises(InvalidMemory, match=problem) as caught:
        check_memory(replace(GOOD, **{field: value}), 100)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert str(caught.value).startswith(field)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 100,
        " kept as it is \n",
        "雨后景象",
        "👩‍🚀",
        "a\u200bb",
        "\\u0000",
        "<|im_end|>",
        "日" * 100,
    ],
)
def test_text_is_stored_unchanged(text: str) -> None:
    memory = check_memory(NewMemory("main", text, text, metadata={"t": text[:80]}), 100)
    assert (memory.prompt, memory.answer, memory.metadata) == (text, text, {"t": text[:80]})


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("2024-01-02", "2024-01-02T00:00:00.000000Z"),
        ("2024-01-02T03:04:05", "2024-01-02T03:04:05.000000Z"),
        ("2024-01-02T03:04:05.6Z", "2024-01-02T03:04:05.600000Z"),
        ("2024-01-02T03:04:05-05:30", "2024-01-02T08:34:05.000000Z"),
    ],
)
def test_times_become_utc_and_sort_as_text(text: str, canonical: str) -> None:
    assert canonical_time(text) == canonical
    assert canonical_time(canonical) == canonical
    assert canonical < now()


def test_a_time_that_utc_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidMemory, match="created_at"):
        canonical_time("0001-01-01T00:00:00+10:00")


def test_scores_become_floats() -> None:
    assert check_score(80) == 80.0 and isinstance(check_score(80), float)
    assert check_score(None) is None


def test_metadata_is_as_deep_as_any_reader_can_follow() -> None:
    """Python's reading of JSON ends at its limit of recursion, less the calls that led there."""
    deep = nested(64)
    assert check_memory(replace(GOOD, metadata=deep)).metadata == deep
    for levels in (65, 500):
        with pytest.raises(InvalidMemory, match="metadata: is nested deeper than 64 levels"):
            check_memory(replace(GOOD, metadata=nested(levels)))
