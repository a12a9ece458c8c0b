"""Imports and exports: what is taken, what is reported, and that both stream."""

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from memshare.pool.errors import TransferError, UnknownPool
from memshare.pool.mapping import parse_mapping
from memshare.pool.readers import MAX_LINE_BYTES
from memshare.pool.store import PoolStore
from memshare.pool.transfer import BATCH, Format, ImportReport, export_jsonl, import_memories
from memshare.records import NewMemory, content_key
from tests.conftest import DATABASES, database_url

ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("MEMSHARE_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no test data in {DATA}")
Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def store(url: str) -> Iterator[PoolStore]:
    with PoolStore.open(url, max_text_chars=5000) as opened:
        opened.create_pool("main")
        yield opened


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def counts(report: ImportReport) -> tuple[int, int, int]:
    return report.stored, report.duplicates, report.bad


def lines(report: ImportReport) -> list[int]:
    return [error.line for error in report.errors]


# Every kind of bad line, and a part of the reason that must be given for it.
BAD = [
    (b"{not json", "bad JSON"),
    (b'{"prompt": "a", "answer": "b"} trailing', "bad JSON"),
    (b'{"prompt": "a", "answer": "b", "score": NaN}', "NaN"),
    (b"[" * 100_000, "bad JSON"),
    (b'["prompt", "answer"]', "object expected, got list"),
    (b'{"prompt": "only"}', "answer: is missing"),
    (b'{"prompt": null, "answer": "b"}', "prompt: is missing"),
    (b'{"prompt": "  ", "answer": "b"}', "prompt: is empty"),
    (b'{"prompt": "a", "answer": 5}', "answer: text expected, got int"),
    (b'{"prompt": "a", "answer": "' + b"x" * 5001 + b'"}', "answer: is 5001 characters long"),
    (b'{"prompt": "caf\xe9", "answer": "b"}', "not UTF-8 (byte 16 of the line)"),
    (b'{"prompt": "a\\u0000b", "answer": "b"}', "NUL"),
    (b'{"prompt": "a\\ud800", "answer": "b"}', "surrogate"),
    (b'{"prompt": "a", "answer": "b", "score": "high"}', "score"),
    (b'{"prompt": "a", "answer": "b", "created_at": "now"}', "created_at"),
    (b'{"prompt": "a", "answer": "b", "metadata": [1]}', "metadata"),
    (b'{"prompt": "a", "answer": "b", "colour": "red"}', "'colour'"),
    (b'{"prompt": "' + b"x" * MAX_LINE_BYTES + b'", "answer": "b"}', "line is longer"),
]


def test_bad_rows_are_reported_by_line_and_the_rest_is_stored(
    store: PoolStore, write: Write
) -> None:
    content = b"\xef\xbb\xbf"  # a byte order mark
    for number, (line, _) in enumerate(BAD):
        content += b'{"prompt": "good %d", "answer": "b"}\r\n' % number + line + b"\n\n"
    path = write("rows.jsonl", content + b'{"prompt": "last, without a newline", "answer": "b"}')
    seen = []
    report = import_memories(store, "main", path, on_error=seen.append)
    assert counts(report) == (len(BAD) + 1, 0, len(BAD))
    assert seen == report.errors
    for number, (error, (_, reason)) in enumerate(zip(report.errors, BAD, strict=True)):
        assert (error.file, error.line) == (str(path), 3 * number + 2)
        assert reason in error.reason
        assert len(error.reason) < 200, "a reason must not carry the row along"
    assert counts(import_memories(store, "main", path)) == (0, len(BAD) + 1, len(BAD))


@pytest.mark.parametrize("line", [line for line, _ in BAD[:-1]])
def test_strict_writes_nothing_if_one_row_is_bad(
    store: PoolStore, write: Write, line: bytes
) -> None:
    good = b"".join(b'{"prompt": "p%d", "answer": "b"}\n' % n for n in range(BATCH + 5))
    path = write("rows.jsonl", good + line + b"\n")
    report = import_memories(store, "main", path, strict=True)
    assert counts(report) == (0, 0, 1)
    assert lines(report) == [BATCH + 6]
    assert store.last_seq("main") == 0
    path.write_bytes(good)
    assert counts(import_memories(store, "main", path, strict=True)) == (BATCH + 5, 0, 0)


def chat(*turns: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})


def test_strict_refuses_what_can_be_read_once_alone(store: PoolStore) -> None:
    """Its second reading found nothing there, and "stored 0" looked like success."""
    for strict in (True, False):
        reading, writing = os.pipe()
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(b'{"prompt": "a", "answer": "b"}\n')
        name = f"/dev/fd/{reading}"
        try:
            if strict:
                with pytest.raises(TransferError, match=f"{name}: .*reads twice.*a file first"):
                    import_memories(store, "main", name, "jsonl", strict=True)
            else:
                assert counts(import_memories(store, "main", name, "jsonl")) == (1, 0, 0)
        finally:
            os.close(reading)


@pytest.mark.parametrize("fmt", ["jsonl", "csv"])
def test_a_named_pipe_is_opened_once(store: PoolStore, tmp_path: Path, fmt: Format) -> None:
    """Opened and closed before, its writer would be told that nobody reads."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    rows = {"jsonl": '{"prompt": "a", "answer": "b"}\n', "csv": "prompt,answer\na,b\n"}
    with ThreadPoolExecutor(1) as thread:
        wrote = thread.submit(path.write_text, rows[fmt])
        assert counts(import_memories(store, "main", path, fmt)) == (1, 0, 0)
        assert wrote.result(timeout=60)


def test_files_packed_by_gzip(store: PoolStore, write: Write) -> None:
    rows = b'{"prompt": "a", "answer": "b"}\n', b"prompt,answer\nc,d\ne,f\n"
    packed = [gzip.compress(content) for content in rows]
    assert counts(import_memories(store, "main", write("f.jsonl.gz", packed[0]))) == (1, 0, 0)
    assert counts(import_memories(store, "main", write("f.csv.gz", packed[1]))) == (2, 0, 0)
    with pytest.raises(TransferError, match=r"g\.csv\.gz: no whole gzip file"):
        import_memories(store, "main", write("g.csv.gz", packed[1][:-9]))


def test_chat_rows_are_one_exchange(store: PoolStore, write: Write) -> None:
    rows = [
        chat(("user", "q1"), ("assistant", "a1")),
        chat(("system", "be brief"), ("user", "q2"), ("assistant", "a2")),
        chat(("user", "q"), ("assistant", "a"), ("user", "more"), ("assistant", "b")),
        chat(("assistant", "a"), ("user", "q")),
        chat(("user", "q")),
        chat(),
        chat(("user", [{"type": "text", "text": "q"}]), ("assistant", "a")),
        '{"messages": "hello"}',
        '{"messages": [["user", "q"]]}',
        '{"messages": [], "tools": []}',
        chat(("user", "q"), ("assistant", None)),
    ]
    path = write("chat.jsonl", "\n".join(rows))
    report = import_memories(store, "main", path)
    assert [(m.prompt, m.answer) for m in store.iter("main")] == [("q1", "a1"), ("q2", "a2")]
    assert lines(report) == list(range(3, 12))
    assert "user, assistant, user, assistant" in report.errors[0].reason
    # A form that is named is the only one taken.
    mixed = write(
        "mixed.jsonl", chat(("user", "x"), ("assistant", "y")) + '\n{"prompt": "n", "answer": "m"}'
    )
    assert lines(import_memories(store, "main", mixed, "chat")) == [2]
    assert lines(import_memories(store, "main", mixed, "jsonl")) == [1]


@needs_data
@pytest.mark.parametrize("domain", ["literary", "logic", "plan", "single"])
def test_the_published_pools_come_in_whole(store: PoolStore, domain: str) -> None:
    path = DATA / "nine" / domain / "pool.jsonl"
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    first: dict[str, tuple[str, str]] = {}
    for messages in rows:
        prompt, answer = (m["content"] for m in messages if m["role"] != "system")
        first.setdefault(content_key("main", prompt, answer), (prompt, answer))
    report = import_memories(store, "main", path)
    assert counts(report) == (len(first), len(rows) - len(first), 0)
    assert [(m.prompt, m.answer) for m in store.iter("main")] == list(first.values())


@needs_data
def test_banking77_comes_in_by_a_column_mapping(store: PoolStore) -> None:
    mapping = parse_mapping(["prompt=text,answer=category", "metadata.label=category"])
    report = import_memories(store, "main", DATA / "banking77" / "test.csv", mapping=mapping)
    assert report.bad == 0
    assert report.stored + report.duplicates == 3080
    first = next(store.iter("main"))
    assert (first.prompt, first.answer) == ("How do I locate my card?", "card_arrival")
    assert first.metadata == {"label": "card_arrival"}


def test_nothing_inside_a_long_field_of_csv_is_a_row(store: PoolStore, write: Write) -> None:
    lines = "a line of it\n" * 20_000 + "of it, too\n" * 3  # as many columns as a row
    path = write("long.csv", f'prompt,answer\nlong,"{lines}"\nshort,b\n')
    report = import_memories(store, "main", path)
    assert [memory.prompt for memory in store.iter("main")] == ["short"]
    assert [(error.line, error.reason[:9]) for error in report.errors] == [(2, "answer: i")]


def test_csv_rows(store: PoolStore, write: Write) -> None:
    content = (
        b"\xef\xbb\xbfprompt,answer,score,agent,metadata\r\n"
        b'"two\nlines","said ""yes""",90,me,"{""k"": 1}"\r\n'
        b"plain,b,,,\r\n"
        b"few,columns\r\n"
        b"a,b,much,,\r\n"
        b"a,b,1,,{\r\n"
        b"caf\xe9,b,1,,\r\n"
        b",b,1,,\r\n"
        b'"a"x,b,1,,\r\n'
        b"\r\n"
        b"last,b,1,,\r\n"
    )
    report = import_memories(store, "main", write("rows.csv", content))
    memories = list(store.iter("main"))
    assert [(m.prompt, m.answer, m.score) for m in memories] == [
        ("two\nlines", 'said "yes"', 90),
        ("plain", "b", None),
        ("last", "b", 1),
    ]
    assert (memories[0].agent, memories[0].metadata) == ("me", {"k": 1})
    assert memories[1].agent is None
    assert [(e.line, e.reason.split(":")[0]) for e in report.errors] == [
        (5, "2 columns, but the header has 5"),
        (6, "score"),
        (7, "metadata"),
        (8, "not UTF-8"),
        (9, "prompt"),
        (10, "bad CSV"),
    ]
    unclosed = write("open.csv", 'prompt,answer\na,b\n"never closed,c\nd,e\n')
    assert lines(import_memories(store, "main", unclosed)) == [3]
    assert counts(import_memories(store, "main", write("empty.csv", ""))) == (0, 0, 0)


@pytest.mark.parametrize(
    ("header", "mapping", "message"),
    [
        ("text,label", [], "map them"),
        ("prompt,answer,extra", [], "map them"),
        ("text,label", ["prompt=text,answer=nope"], "'nope'"),
        ("a,a", ["prompt=a,answer=a"], "two columns"),
    ],
)
def test_a_table_without_the_columns_is_refused_whole(
    store: PoolStore, write: Write, header: str, mapping: list[str], message: str
) -> None:
    path = write("rows.csv", f"{header}\n1,2\n")
    with pytest.raises(TransferError, match=message):
        import_memories(store, "main", path, mapping=parse_mapping(mapping))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["prompt"], "field=column"),
        (["prompt=a,colour=b"], "no field 'colour'"),
        (["prompt=a"], "no column for answer"),
        (["prompt=a,prompt=b,answer=c"], "twice"),
        (["metadata.=a"], "no field"),
    ],
)
def test_a_bad_mapping_is_refused(items: list[str], message: str) -> None:
    with pytest.raises(TransferError, match=message):
        parse_mapping(items)


def test_jsonl_rows_can_be_mapped_and_other_columns_are_left_out(
    store: PoolStore, write: Write
) -> None:
    path = write("qa.jsonl", '{"q": "1", "a": "2", "junk": 3, "n": 4}\n{"q": "1"}\n')
    report = import_memories(
        store, "main", path, mapping=parse_mapping(["prompt=q,answer=a,metadata.n=n"])
    )
    assert [(m.prompt, m.answer, m.metadata) for m in store.iter("main")] == [("1", "2", {"n": 4})]
    assert lines(report) == [2] and "'a' is missing" in report.errors[0].reason


def test_rows_without_a_target_go_to_their_own_pool(store: PoolStore, write: Write) -> None:
    store.create_pool("other")
    row = '{{"pool": {}, "prompt": "p", "answer": "a"}}\n'
    path = write(
        "rows.jsonl",
        row.format('"main"') + row.format('"other"') + row.format('"nope"') + row.format("3")
        + '{"prompt": "p", "answer": "a"}\n',
    )  # fmt: skip
    report = import_memories(store, None, path)
    assert counts(report) == (2, 0, 3)
    assert [e.reason.partition(";")[0] for e in report.errors] == [
        "no pool 'nope'", "pool: text expected, got int", "pool: is missing"
    ]  # fmt: skip
    assert counts(import_memories(store, "other", path)) == (0, 5, 0), "the target wins"
    with pytest.raises(UnknownPool, match="nope"):
        import_memories(store, "nope", path)


def test_what_cannot_be_read_is_refused_whole(store: PoolStore, write: Write) -> None:
    with pytest.raises(TransferError, match="No such file"):
        import_memories(store, "main", "missing.jsonl")
    with pytest.raises(TransferError, match="No such file"):
        import_memories(store, "main", "missing.csv")
    with pytest.raises(TransferError, match="--format"):
        import_memories(store, "main", write("rows.txt", ""))


@pytest.mark.parametrize("through", DATABASES)
def test_an_export_comes_back_byte_for_byte(
    store: PoolStore, tmp_path: Path, request: pytest.FixtureRequest, through: str
) -> None:
    results = store.append(
        [
            NewMemory(
                "main",
                "雨\u2028\x85 line",
                'quote " \\ \t\n',
                33.3,
                "a",
                "m",
                None,
                {"z": 1, "a": 0.1},
            ),
            NewMemory("main", "held", "x"),
            NewMemory("main", "gone", "x"),
            NewMemory("main", "second", "y", 100, metadata={"deep": [{"k": None}, True, 1e300]}),
        ]
    )
    store.hold(results[1].id)
    store.delete(results[2].id)
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    assert export_jsonl(store, "main", first) == 2
    with PoolStore.open(database_url(through, request, tmp_path / "copy.db")) as copy:
        copy.create_pool("main")
        assert counts(import_memories(copy, None, first)) == (2, 0, 0)
        export_jsonl(copy, "main", second)
    assert first.read_bytes() == second.read_bytes()
    assert json.loads(first.read_text().split("\n")[0])["id"] == results[0].id
    with pytest.raises(TransferError, match="No such file"):
        export_jsonl(store, "main", tmp_path / "missing" / "x.jsonl")
    with pytest.raises(UnknownPool):
        export_jsonl(store, "nope", tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()
    assert not list(tmp_path.glob(".*.tmp"))


def test_an_export_replaces_files_alone(store: PoolStore, tmp_path: Path) -> None:
    """What has that name stays what it is: root's export to /dev/stdout made a file of it."""
    store.append([NewMemory("main", "a", "b")])
    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(file)
    assert export_jsonl(store, "main", link) == 1
    assert link.is_symlink() and file.read_text().count("\n") == 1
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as thread:
        read = thread.submit(pipe.read_text)
        assert export_jsonl(store, "main", pipe) == 1
        assert read.result(timeout=60) == file.read_text()
    assert pipe.is_fifo()
    for path in (tmp_path, Path("/"), Path("")):
        with pytest.raises(TransferError, match="can't be written: Is a directory"):
            export_jsonl(store, "main", path)
    assert export_jsonl(store, "main", tmp_path / ("x" * 250)) == 1
    with pytest.raises(TransferError, match="can't be written: File name too long"):
        export_jsonl(store, "main", tmp_path / ("x" * 256))
    assert not list(tmp_path.glob(".*.tmp"))


def test_memory_use_is_flat(store: PoolStore, tmp_path: Path) -> None:
    def peak(action: Callable[[], object]) -> int:
        tracemalloc.start()
        action()
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    def rows(name: str, count: int) -> Path:
        path = tmp_path / name
        with path.open("w") as handle:
            for n in range(count):
                handle.write(json.dumps({"prompt": f"{name} {n}", "answer": "x" * 500}) + "\n")
        return path

    small, large = rows("small.jsonl", 2 * BATCH), rows("large.jsonl", 8 * BATCH)
    import_memories(store, "main", rows("warm.jsonl", 10))
    bases = peak(lambda: import_memories(store, "main", small))
    assert peak(lambda: import_memories(store, "main", large)) < 1.3 * bases
    assert peak(lambda: export_jsonl(store, "main", tmp_path / "out.jsonl")) < 1.3 * bases
