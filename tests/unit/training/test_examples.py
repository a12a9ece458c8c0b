"""Training examples on disk: what is written comes back, and what is broken is named."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memshare.records import Candidate, Example, answer_key
from memshare.training.erasing import erase
from memshare.training.examples import (
    SCHEMA,
    held_out_dir,
    read_examples,
    read_shard,
    read_training,
    round_dir,
    round_dirs,
    shard_path,
    to_example,
    write_marker,
    write_shard,
)
from memshare.training.shard import ExamplesError, read_table
from tests.training_data import write_round


def example(query_id: str, candidates: tuple[str, ...] = ("c1", "c2"), text: str = "t") -> Example:
    return Example(
        query_id=query_id,
        query=f"question {query_id} 春雨",
        answer="an answer",
        pool="main",
        principal=None,
        round=1,
        seq=7,
        scorer="tiny",
        labels="likelihood",
        baseline_loglik=-2.5,
        candidates=tuple(
            Candidate(name, f"{text} {name}", rank, -1.25 if rank else None, answer_key(name))
            for rank, name in enumerate(candidates)
        ),
    )


def test_round_trip(tmp_path: Path) -> None:
    rows = [example("a"), example("b", ()), example("c", ("x",))]
    folder = write_round(round_dir(tmp_path, 1), rows[:2], [], rows[2:])
    assert list(read_examples(folder)) == rows
    assert list(read_training([folder, folder])) == rows * 2


def test_the_schema_is_what_datasets_makes_of_these_features() -> None:
    features = datasets.Features.from_arrow_schema(SCHEMA)
    text, number = datasets.Value("string"), datasets.Value("int64")
    assert features == {
        "query_id": text, "query": text, "answer": text, "pool": text, "principal": text,
        "round": number, "seq": number, "scorer": text, "labels": text,
        "baseline_loglik": datasets.Value("float64"),
        "candidates": datasets.List({
            "id": text, "text": text, "bm25_rank": number, "loglik": datasets.Value("float64"),
            "answer_key": text, "dense_rank": number, "prompt_key": text, "principal": text,
                "label_key": text,
        }),
    }  # fmt: skip
    assert features.arrow_schema.equals(SCHEMA, check_metadata=True)


def test_datasets_reads_the_shards(tmp_path: Path) -> None:
    folder = write_round(round_dir(tmp_path, 1), [example("a")])
    loaded = datasets.load_dataset(
        "parquet", data_files=str(shard_path(folder, 0)), cache_dir=str(tmp_path / "c")
    )
    assert loaded["train"].features == datasets.Features.from_arrow_schema(SCHEMA)
    assert to_example(loaded["train"][0]) == example("a")


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",))), st.floats(allow_nan=False))
def test_any_text_and_number_survives(
    tmp_path_factory: pytest.TempPathFactory, text, value
) -> None:
    path = tmp_path_factory.mktemp("t") / "shard-00000.parquet"
    row = Example(
        text, text, text, text, text, 1, 2, text, "reward", value,
        (Candidate(text, text, -1, value, text),),
    )  # fmt: skip
    write_shard(path, [row])
    assert read_shard(path) == [row]


def test_shards_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """Without the columns that came later, which are null then."""
    now, path = example("a"), shard_path(tmp_path / "000001", 0)
    write_shard(path, [now, example("b", ())])
    rows = pq.read_table(path).to_pylist()
    kept = ("id", "text", "bm25_rank", "loglik", "answer_key", "dense_rank")
    for row in rows:
        row["candidates"] = [{name: item[name] for name in kept} for item in row["candidates"]]
    types = {field.name: field.type for field in SCHEMA}
    struct = types["candidates"].value_type
    types["candidates"] = pa.list_(pa.struct([struct.field(name) for name in kept]))
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(list(types.items()))), path)
    assert read_shard(path) == [now, example("b", ())]
    assert erase(tmp_path, ["c1"]) == 1  # written anew, with all columns
    assert [c.id for c in read_shard(path)[0].candidates] == ["c2"]
    assert pq.read_schema(path).equals(SCHEMA)
    write_marker(path.parent, {"shards": 2})
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(list(types.items()))),
                   shard_path(path.parent, 1))  # fmt: skip
    assert len(list(read_examples(path.parent))) == 4


def test_equal_examples_give_equal_bytes(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [example("a")])
    write_shard(tmp_path / "b", [example("a")])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_folders_have_no_examples() -> None:
    assert list(read_training([])) == []


def test_unfinished_round_is_refused(tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, 0), [example("a")])
    with pytest.raises(ExamplesError, match=r"no finished round.*train/mine\.py"):
        list(read_examples(tmp_path))
    assert round_dirs(tmp_path.parent) == []


@pytest.mark.parametrize(
    ("name", "again"), [("000007", "run train/mine.py --round 000007"), ("mine", "write it again")]
)
def test_missing_shard_is_named(tmp_path: Path, name: str, again: str) -> None:
    folder = write_round(tmp_path / name, [example("a")], [example("b")])
    shard_path(folder, 1).unlink()
    told = rf"shard-00001\.parquet: there is no such file; put it back or {again}$"
    with pytest.raises(ExamplesError, match=told):
        list(read_examples(folder))


def test_a_missing_shard_of_a_later_iteration_is_named_with_it(tmp_path: Path) -> None:
    folder = write_round(tmp_path / "000007" / "iteration-2", [example("a")], [example("b")])
    shard_path(folder, 1).unlink()
    again = r"run train/mine\.py --round 000007 --iteration 2 --proposer FOLDER, with the encoder"
    with pytest.raises(ExamplesError, match=again):
        list(read_examples(folder))


def _polars(kind: pa.DataType) -> pa.DataType:
    """What polars writes for the same values."""
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_list(kind):
        return pa.large_list(_polars(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _polars(field.type)) for field in kind])
    return kind


def test_columns_in_another_order_and_of_other_types_are_read(tmp_path: Path) -> None:
    path, rows = tmp_path / "shard", [example("a"), example("b", ()), example("c")]
    write_shard(path, rows)
    table = pq.read_table(path)
    table = pa.table({name: table[name].cast(_polars(table[name].type))
                      for name in reversed(table.column_names)})  # fmt: skip
    kind = table.schema.field("candidates").type.value_type
    mixed = pa.large_list(pa.struct(list(reversed(list(kind)))))
    table = table.set_column(0, "candidates", table["candidates"].cast(mixed))
    pq.write_table(table, path, row_group_size=2)
    assert read_shard(path) == rows
    write_marker(write_round(tmp_path, rows), {"shards": 1})
    path.rename(shard_path(tmp_path, 0))
    assert list(read_examples(tmp_path)) == rows
    assert read_table(shard_path(tmp_path, 0), SCHEMA).schema.equals(SCHEMA, check_metadata=True)


def test_columns_that_differ_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    write_shard(path, [example("a")])
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["seq", "labels"]).append_column("x", [[1]]), path)
    told = r"not a shard .*\(missing: labels, seq; not one of its columns: x\)$"
    with pytest.raises(ExamplesError, match=told):
        read_shard(path)
    pq.write_table(table.set_column(6, "seq", [["seven"]]), path)
    with pytest.raises(ExamplesError, match="column seq has type string instead of int64"):
        read_shard(path)
    rows = table.to_pylist()
    del rows[0]["candidates"][0]["text"], rows[0]["candidates"][1]["text"]
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(ExamplesError, match=r"\(missing: candidates\.text\)$"):
        read_shard(path)


@pytest.mark.parametrize("name", ["query_id", "query", "answer", "pool", "scorer", "labels",
                                  "candidates", "round", "seq"])  # fmt: skip
def test_null_is_told_where_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / "shard"
    write_shard(path, [example("a"), replace(example("b"), **{name: None})])  # type: ignore[arg-type]
    with pytest.raises(ExamplesError, match=rf"{path}: row 2, column {name}: null$"):
        read_shard(path)


@pytest.mark.parametrize("name", ["id", "text", "answer_key"])
def test_null_in_a_candidate_is_told_where_it_is(tmp_path: Path, name: str) -> None:
    path, good = tmp_path / "shard", example("a")
    first, second = good.candidates
    bad = replace(good, candidates=(first, replace(second, **{name: None})))  # type: ignore[arg-type]
    write_shard(path, [good, good, bad])
    with pytest.raises(ExamplesError, match=rf"row 3, column candidates\.{name}: null$"):
        read_shard(path)


def test_a_candidate_that_is_null(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    rows = [{**asdict(example("a")), "candidates": [None]}]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    with pytest.raises(ExamplesError, match=r"row 1, column candidates: null$"):
        read_shard(path)


def test_labels_of_a_kind_that_there_is_not(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard", [example("a"), replace(example("b"), labels="wat")])
    told = "row 2, column labels: 'wat' is none of none, given, likelihood, prompted, reward$"
    with pytest.raises(ExamplesError, match=told):
        read_shard(tmp_path / "shard")


@pytest.mark.parametrize("column", ["query", "labels", "candidates.text"])
def test_text_that_is_not_utf_8_is_told_where_it_is(tmp_path: Path, column: str) -> None:
    path, good, labels = tmp_path / "shard", example("a"), "b@d" if column == "labels" else "given"
    bad = replace(good.candidates[0], text="b@d")
    write_shard(path, [good, replace(good, query="b@d", labels=labels, candidates=(bad,))])
    table = pq.read_table(path)

    def spoilt(values: pa.Array) -> pa.Array:
        return pa.array([v.encode().replace(b"@", b"\xed\xa0") for v in values.to_pylist()],
                        pa.binary()).view(pa.string())  # fmt: skip

    outer, _, inner = column.partition(".")
    place, old = table.column_names.index(outer), table[outer].combine_chunks()
    if inner:
        names = [field.name for field in old.type.value_type]
        parts = [spoilt(old.values.field(n)) if n == inner else old.values.field(n) for n in names]
        new = pa.ListArray.from_arrays(old.offsets, pa.StructArray.from_arrays(parts, names))
    else:
        new = spoilt(old)
    pq.write_table(table.set_column(place, outer, new), path)
    with pytest.raises(ExamplesError, match=rf"row 2, column {column}: text that is not UTF-8 "):
        read_shard(path)


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    folder = write_round(tmp_path, [example("a")], [example("b")])
    path = shard_path(folder, 1)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(ExamplesError, match=r"shard-00001\.parquet"):
        list(read_examples(folder))


def test_a_damaged_held_out_shard_names_its_round(tmp_path: Path) -> None:
    folder = held_out_dir(round_dir(tmp_path, 7))
    write_round(folder, [example("a")])
    shard_path(folder, 0).write_bytes(b"PAR1")
    with pytest.raises(ExamplesError, match=r"shard-00000\.parquet.*--round 000007"):
        list(read_examples(folder))


def test_several_rounds_to_train_on(tmp_path: Path) -> None:
    first = write_round(round_dir(tmp_path, 1), [example("a"), example("b")])
    again = example("a", text="as it is now")
    second = write_round(round_dir(tmp_path, 2), [again])
    write_round(held_out_dir(second), [example("never")])
    assert list(read_training([first, second])) == [example("a"), example("b"), again]
    with pytest.raises(ExamplesError, match="never trained on"):
        read_training([first, held_out_dir(second)])


def test_a_flipped_byte_is_never_read_as_data(tmp_path: Path) -> None:
    path, rows = tmp_path / "shard", [example(f"q{i}", text=f"text {i} " * 50) for i in range(50)]
    write_shard(path, rows)
    content, refused = path.read_bytes(), 0
    for position in range(0, len(content), 97):
        flipped = bytearray(content)
        flipped[position] ^= 0xFF
        path.write_bytes(flipped)
        try:
            assert read_shard(path) == rows  # a byte that no reader needs
        except ExamplesError:
            refused += 1
    assert refused > len(content) / 97 / 3


def test_damaged_marker_is_named(tmp_path: Path) -> None:
    folder = write_round(tmp_path, [example("a")])
    (folder / "round.json").write_text("{}")
    with pytest.raises(ExamplesError, match=r"round\.json"):
        list(read_examples(folder))
