"""``memshare pool``: what it prints, what it returns, and how it refuses."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from memshare.cli import main
from memshare.pool.store import PoolStore

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, url: str | None = "sqlite:///pool.db") -> tuple[int, str, str]:
        code = main(["pool", *arguments, *(["--url", url] if url else [])])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def add(run: Run, prompt: str, *more: str) -> str:
    code, out, _ = run("add", "--pool", "main", "--prompt", prompt, "--answer", "a", *more)
    assert code == 0
    return out.split()[0]


def test_a_pool_from_creation_to_deletion(run: Run) -> None:
    code, out, _ = run("create", "--pool", "main", "--rubric", "logic", "--threshold", "70")
    assert (code, out) == (0, "main: rubric logic, threshold 70\n")
    first = add(run, "what?", "--score", "90", "--agent", "me", "--metadata", '{"k": 1}')
    assert run("add", "--pool", "main", "--prompt", "WHAT?", "--answer", "a")[1] == (
        f"{first} duplicate\n"
    )
    second = add(run, "two\nlines")
    code, out, _ = run("list", "--pool", "main")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        [first, "1", "90", "what?"],
        [second, "2", "-", "two", "lines"],
    ]
    code, out, _ = run("show", first)
    shown = json.loads(out)
    assert (code, shown["prompt"], shown["metadata"], shown["seq"]) == (0, "what?", {"k": 1}, 1)
    assert run("delete", first) == (0, f"{first} deleted\n", "")
    assert run("delete", first) == (2, "", f"memshare pool delete: no memory {first}\n")
    code, out, err = run("show", second, first)
    assert (code, json.loads(out)["id"]) == (2, second) and first in err
    code, out, _ = run("stats", "--json")
    stats = json.loads(out)
    assert (stats["memories"], stats["deleted"], stats["pool"]["last_seq"]) == (1, 1, 3)
    code, out, _ = run("stats", "--pool", "main")
    assert code == 0 and "memories 1 (0 held), deleted 1" in out
    # Settings change only when they are given.
    assert run("create", "--pool", "main", "--threshold", "60")[1] == (
        "main: rubric logic, threshold 60\n"
    )


def test_list_continues_at_the_cursor_that_it_printed(run: Run) -> None:
    run("create", "--pool", "main")
    ids = [add(run, f"p{n}") for n in range(5)]
    seen: list[str] = []
    more: list[str] = []
    while True:
        code, out, err = run("list", "--pool", "main", "--limit", "2", "--json", *more)
        assert code == 0
        seen += [json.loads(line)["id"] for line in out.splitlines()]
        if not err:
            break
        more = err.removeprefix("more: ").split()
    assert seen == ids
    assert run("list", "--pool", "main", "--cursor", "x")[0] == 2
    assert run("list", "--pool", "main", "--limit", "0")[0] == 2
    code, out, err = run("list", "--pool", "main", "--limit", str(10**30))
    assert (code, len(out.splitlines()), err) == (0, 5, "")


def test_import_names_every_bad_row_and_says_so_by_its_exit_code(run: Run) -> None:
    run("create", "--pool", "main")
    Path("rows.csv").write_bytes(b"q,a\nwhy,because\n,x\ncaf\xe9,x\nwhat,that\n")
    arguments = ("import", "rows.csv", "--pool", "main", "--map", "prompt=q,answer=a")
    code, out, err = run(*arguments, "--strict")
    assert (code, out) == (1, "stored 0, duplicates 0, bad rows 2\n")
    assert "nothing was written" in err
    code, out, err = run(*arguments)
    assert (code, out) == (1, "stored 2, duplicates 0, bad rows 2\n")
    assert "rows.csv:3: prompt: is missing\n" in err
    assert "rows.csv:4: not UTF-8\n" in err
    code, out, err = run("export", "--pool", "main")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["why", "what"]
    assert (code, err) == (0, "exported 2\n")
    assert run("export", "out.jsonl", "--pool", "main")[:2] == (0, "")
    assert Path("out.jsonl").read_text() == out
    assert run("import", "out.jsonl")[:2] == (0, "stored 0, duplicates 2, bad rows 0\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "--pool", "nope"], "no pool 'nope' (there: main)"),
        (["stats", "--pool", "nope"], "no pool 'nope'"),
        (["export", "--pool", "nope"], "no pool 'nope'"),
        (["import", "rows.jsonl", "--pool", "nope"], "no pool 'nope'"),
        (["import", "missing.jsonl", "--pool", "main"], "missing.jsonl: can't be read"),
        (["import", "rows.jsonl", "--pool", "main", "--map", "x"], "field=column"),
        (["export", "no/such/folder.jsonl", "--pool", "main"], "can't be written"),
        (["add", "--pool", "main", "--prompt", " ", "--answer", "a"], "prompt: is empty"),
        (["add", "--pool", "main", "--prompt", "a\udce9", "--answer", "a"], "prompt: contains"),
        (["add", "--pool", "main", "--prompt", "p", "--answer", "a", "--metadata", "{"], "JSON"),
        (["add", "--pool", "main", "--prompt", "p", "--answer", "a", "--score", "nan"], "score"),
        (
            ["add", "--pool", "main", "--prompt", "p", "--answer", "a", "--metadata", "[" * 9999],
            "metadata: is no JSON",
        ),
        (["create", "--pool", "x", "--threshold", "200"], "threshold"),
        (["create", "--pool", ""], "pool: is empty"),
    ],
)
def test_refusals_are_one_message_and_exit_code_2(
    run: Run, arguments: list[str], message: str
) -> None:
    run("create", "--pool", "main")
    Path("rows.jsonl").write_text("")
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("action", ["show", "delete", "hold", "release"])
def test_what_can_be_no_id_is_told_so(
    run: Run, action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run("create", "--pool", "main")
    with pytest.raises(SystemExit) as ended:  # bytes that are no UTF-8 come in as surrogates
        run(action, "caf\udce9")
    assert ended.value.code == 2 and "is no id" in capsys.readouterr().err


def test_an_export_is_utf_8_wherever_it_goes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("create", "--pool", "main")
    add(run, "¿qué? 雨")
    assert run("export", "--pool", "main", "whole.jsonl")[0] == 0
    out = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", io.TextIOWrapper(out, "latin-1"))
        assert run("export", "--pool", "main")[0] == 0
        assert out.getvalue() == Path("whole.jsonl").read_bytes()


@pytest.mark.parametrize("url", ["nonsense", "postgresql://me:s3cret@host:port/pool"])
def test_a_url_that_is_none_is_one_message(run: Run, url: str) -> None:
    code, out, err = run("list", "--pool", "main", url=url)
    assert (code, out) == (2, "") and "database URL can't be used" in err and "s3cret" not in err


def test_memories_are_held_reviewed_and_released(run: Run) -> None:
    run("create", "--pool", "main")
    first, second = add(run, "one", "--agent", "ann"), add(run, "two")
    assert run("review", "--pool", "main") == (0, "", "")
    assert run("hold", first, "--reason", "it names a person") == (0, f"{first} on hold\n", "")
    assert run("hold", second) == (0, f"{second} on hold\n", "")
    assert run("hold", second) == (2, "", f"memshare pool hold: no free memory {second}\n")
    code, out, _ = run("review", "--pool", "main")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and lines[0] == [first, "1", "-", "held", "one"]
    assert lines[1] == ["ann:", "it", "names", "a", "person"]
    assert lines[3] == ["unknown:", "no", "reason", "given"]
    (row, _) = run("review", "--pool", "main", "--json")[1].splitlines()
    assert json.loads(row)["hold_reason"] == "it names a person"
    assert run("list", "--pool", "main") == (0, "", "")
    assert run("release", first)[:2] == (0, f"{first} released\n")
    assert run("delete", second)[:2] == (0, f"{second} deleted\n")
    code, _, err = run("release", first, second)
    assert code == 2 and f"no held memory {first}, {second}" in err
    assert run("hold", first, "--reason", " ")[0] == 2
    assert run("review", "--pool", "main") == (0, "", "")


def test_no_memory_steers_the_terminal_that_shows_it(run: Run) -> None:
    """Strangers wrote it: an escape sequence could hide what is reviewed, or worse."""
    run("create", "--pool", "main")
    evil = "a\x1b[2Jb\x9b2Jc \x7f\u200d\u4f60"
    held = add(run, evil, "--agent", f"{evil}\nann")
    run("hold", held, "--reason", evil)
    shows = (["list", "--held", "--pool", "main"], ["review", "--pool", "main"], ["show", held],
             ["review", "--pool", "main", "--json"], ["stats"])  # fmt: skip
    for arguments in shows:
        _, out, _ = run(*arguments)
        assert "\\u001b[2Jb\\u009b2Jc" in out and "\u200d\u4f60" in out
        assert not set(out) & {"\x1b", "\x9b", "\x7f"}, arguments
    assert "    a\\u001b[2Jb\\u009b2Jc \\u007f\u200d\u4f60 ann: a" in run(*shows[1])[1]  # one line
    assert json.loads(run("show", held)[1])["prompt"] == evil


def test_reading_a_misspelt_url_makes_no_database(run: Run, tmp_path: Path) -> None:
    for arguments in (["list", "--pool", "main"], ["stats"], ["show", "x"], ["delete", "x"],
                      ["import", "x.jsonl", "--pool", "main"]):  # fmt: skip
        code, _, err = run(*arguments, url="sqlite:///typo/pool.db")
        assert code == 2 and "no pool database" in err
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_names_database_pools_and_limits(run: Run, tmp_path: Path) -> None:
    Path("run.yaml").write_text(
        "run: {dir: here}\npools: {verse: {rubric: literary, threshold: 65}}\n"
        "gateway: {max_text_chars: 10}\n"
    )
    Path("rows.jsonl").write_text(
        '{"prompt": "short", "answer": "a"}\n{"prompt": "much too long", "answer": "a"}\n'
    )
    code, out, err = run(
        "import", "rows.jsonl", "--pool", "verse", "--config", "run.yaml", url=None
    )
    assert (code, out) == (1, "stored 1, duplicates 0, bad rows 1\n")
    assert "at most 10 allowed" in err
    with PoolStore.open(f"sqlite:///{tmp_path}/here/pool.db", must_exist=True) as store:
        assert (store.pool("verse").rubric, store.pool("verse").threshold) == ("literary", 65)
        store.create_pool("verse", "general", 1)
    code, out, _ = run("create", "--pool", "verse", "--config", "run.yaml", url=None)
    assert out == "verse: rubric literary, threshold 65\n"


def test_a_bad_configuration_lists_every_problem(run: Run) -> None:
    Path("bad.yaml").write_text("colour: red\ntraining: {lr: fast}\n")
    code, out, err = run("stats", "--config", "bad.yaml", url=None)
    assert (code, out) == (2, "")
    assert "colour" in err and "training.lr" in err
    assert run("stats", "--config", "missing.yaml", url=None)[0] == 2
