"""Reading rows: every kind of source gives the same rows, every mistake one clear line."""

import csv
import json
import pathlib

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rag_jax.data import rows as row_files
from rag_jax.errors import UserError

COLUMNS = {"query": "Question", "passage": "Abstract", "answer": "Answer"}
QUERIES = ['Who said "yes"?', "Wo, bitte?", "When?"]
PASSAGES = ["Two lines\nof text, with a comma.", "Über den Bergen\t(weit).", "NA"]
ANSWERS = ["she", "42", "null"]
TABLE = {"Question": QUERIES, "Abstract": PASSAGES, "Answer": ANSWERS, "Other": ["1", "2", "3"]}


def separated(separator):
    lines = [list(TABLE), *zip(*TABLE.values(), strict=True)]
    return "\r\n".join(separator.join('"' + f.replace('"', '""') + '"' for f in line) for line in lines)


def records():
    return [dict(zip(TABLE, row, strict=True)) for row in zip(*TABLE.values(), strict=True)]


def write_arrow_file(path):
    table = pyarrow.table(TABLE)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def write_arrow_stream(path):
    table = pyarrow.table(TABLE)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_dict(path):
    other = datasets.Dataset.from_dict({"Question": ["no"], "Abstract": ["no"], "Answer": ["no"]})
    datasets.DatasetDict({"test": other, "training": datasets.Dataset.from_dict(TABLE)}).save_to_disk(str(path))


WRITERS = {
    "rows.csv": lambda path: path.write_text(separated(","), encoding="utf-8"),
    "bom.CSV": lambda path: path.write_text("\ufeff" + separated(",") + "\r\n\r\n", encoding="utf-8"),
    "rows.tsv": lambda path: path.write_text(separated("\t"), encoding="utf-8"),
    "rows.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, records())) + "\n"),
    "rows.json": lambda path: path.write_text(json.dumps(records(), ensure_ascii=False), encoding="utf-8"),
    "rows.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.table(TABLE), path),
    "file.arrow": write_arrow_file,
    "stream.arrow": write_arrow_stream,
    "saved": lambda path: datasets.Dataset.from_dict(TABLE).save_to_disk(str(path)),
    "saved_dict": write_dict,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_source_gives_the_same_rows(name, tmp_path):
    WRITERS[name](tmp_path / name)
    rows = row_files.read_rows(str(tmp_path / name), "data.train", COLUMNS)
    assert rows == row_files.Rows(QUERIES, [[text] if text else [] for text in PASSAGES], ANSWERS)


def test_a_hub_name_is_read_through_datasets(monkeypatch):
    asked = []

    def load_dataset(name):
        asked.append(name)
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict(TABLE)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert row_files.read_rows("owner/rows", "data.train", COLUMNS).queries == QUERIES
    assert asked == ["owner/rows"]


def test_the_answer_column_may_be_absent_where_nobody_asks_for_it(tmp_path):
    (tmp_path / "r.csv").write_text("Question,Abstract\nq,p\n")
    rows = row_files.read_rows(str(tmp_path / "r.csv"), "data.train", COLUMNS, with_answers=False)
    assert rows == row_files.Rows(["q"], [["p"]], [""])


# Of one row each: what stands in the column, and what is read.
NEGATIVES = {
    "r.jsonl": ([["b", " ", "c"], "d", None, []], [["b", "c"], ["d"], [], []]),
    "r.parquet": ([["b", None, "c"], [""], None, ["d"]], [["b", "c"], [], [], ["d"]]),
    "r.arrow": (["b", "", None, "c\nd"], [["b"], [], [], ["c\nd"]]),
    "r.csv": (["b", "", " ", '["c", "d"]'], [["b"], [], [], ['["c", "d"]']]),
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_given_negatives_are_a_text_or_a_list_of_texts(tmp_path, name):
    values, expected = NEGATIVES[name]
    path, table = tmp_path / name, {part: list("wxyz") for part in COLUMNS.values()} | {"Wrong": values}
    if path.suffix == ".jsonl":
        lines = (dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True))
        path.write_text("\n".join(map(json.dumps, lines)))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([list(table), *zip(*table.values(), strict=True)])
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(table), path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, pyarrow.table(table).schema) as writer:
            writer.write_table(pyarrow.table(table))
    rows = row_files.read_rows(str(path), "data.train", COLUMNS | {"negative": "Wrong"}, with_negatives=True)
    assert rows.queries == list("wxyz") and rows.negatives == expected
    assert rows.take([3, 0]).negatives == [expected[3], expected[0]]
    assert row_files.read_rows(str(path), "data.train", COLUMNS).negatives is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 1}, "column 'Wrong' holds a dict in row 2: make it one text per row"),
        (["b", ["c"]], "column 'Wrong' holds a list in row 2"),
        (["b", "a\0"], "column 'Wrong' holds a NUL character in row 2"),
    ],
)
def test_given_negatives_that_are_no_texts(tmp_path, value, message):
    (tmp_path / "r.jsonl").write_text(
        "\n".join(json.dumps(dict.fromkeys("qpa", "x") | {"Wrong": v}) for v in ("y", value))
    )
    columns = {"query": "q", "passage": "p", "answer": "a", "negative": "Wrong"}
    with pytest.raises(UserError, match=message):
        row_files.read_rows(str(tmp_path / "r.jsonl"), "data.train", columns, with_negatives=True)
    with pytest.raises(UserError, match=r"no column 'Other' \(data.columns.negative\); it has: q, p, a, Wrong"):
        columns["negative"] = "Other"
        row_files.read_rows(str(tmp_path / "r.jsonl"), "data.train", columns, with_negatives=True)


def test_numbers_are_texts_and_nothing_is_empty(tmp_path):
    lines = ['{"Question": 1, "Abstract": 2.5, "Answer": true}', '{"Question": null, "Answer": NaN}']
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    rows = row_files.read_rows(str(tmp_path / "r.jsonl"), "data.train", COLUMNS)
    assert rows == row_files.Rows(["1", ""], [["2.5"], []], ["True", ""])


def test_empty_fields_are_counted_by_the_first_one():
    rows = row_files.Rows(["q", " ", "q", "q"], [["p"], [], [], ["p"]], ["a", "a", "a", ""])
    kept, empty = row_files.empty_fields(rows, ("passage", "answer"))
    assert kept == [0]
    assert empty == {"an empty query": 1, "an empty passage": 1, "an empty answer": 1}
    assert row_files.empty_fields(rows, ("passage",))[0] == [0, 3]


def test_passages_are_distinct_and_in_order(tmp_path):
    (tmp_path / "p.csv").write_text('Abstract\nb\na\nb\n""\nc\n')
    assert row_files.read_passages(str(tmp_path / "p.csv"), {"passage": "Abstract"}, "data.passages") == ["b", "a", "c"]


HEADER = "Question,Abstract,Answer\n"
BAD = {
    "empty file": ("r.csv", b"", r"is an empty file"),
    "header only": ("r.csv", HEADER.encode(), r"has no rows"),
    "one missing column": ("r.csv", b"Question,Text,Answer\nq,p,a\n", r"no column 'Abstract' \(data.columns.passage\)"),
    "names those present": (
        "r.csv",
        b"Question,Text,Answer\nq,p,a\n",
        r"; it has: Question, Text, Answer; rows that name",
    ),
    "two missing columns": (
        "r.csv",
        b"Question,x\nq,p\n",
        r"'Abstract' \(.*\) nor 'Answer' \(.*\); it has: Question, x",
    ),
    "missing json key": (
        "r.jsonl",
        b'{"Question": "q", "Answer": "a"}',
        r"no column 'Abstract'.* it has: Question, An",
    ),
    "too many fields": ("r.csv", (HEADER + "q,p,a\nq,p, p,a\n").encode(), r"line 3 has 4 fields, the header has 3"),
    "not utf-8": ("r.csv", (HEADER + "q,p,\xfc\n").encode("latin-1"), r"line 2 is not UTF-8: byte 0xfc at position 29"),
    "not json": ("r.jsonl", b'{"Question": "q"}\n{oops\n', r"line 2 is not a JSON object: "),
    "not an object": ("r.jsonl", b"3\n", r"line 1 is not a JSON object with"),
    "not parquet": ("r.parquet", b"nothing of the kind", r"cannot be read as parquet: "),
    "not arrow": ("r.arrow", b"nothing of the kind", r"cannot be read as arrow: "),
    "unknown kind": ("r.xlsx", b"PK", r"is of an unknown kind: name it .csv, .tsv"),
    "a list": ("r.jsonl", b'{"Question": ["q"], "Abstract": "p", "Answer": "a"}', r"'Question' holds a list in row 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_give_one_clear_line(case, tmp_path):
    name, content, message = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        row_files.read_rows(str(tmp_path / name), "data.train", COLUMNS)
    assert str(error.value).startswith(f"data.train={str(tmp_path / name)!r}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["missing.csv", "./missing", "../missing.jsonl", "/no/such/folder", "a/b/c"])
def test_a_missing_file_is_not_asked_of_the_hub(source, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="^data.eval='.*': no such file or folder"):
        row_files.read_rows(source, "data.eval", COLUMNS)


def test_a_name_unknown_to_the_hub():
    with pytest.raises(UserError, match=r"^data.train='no_such_rows' is neither a file or folder here nor") as error:
        row_files.read_rows("no_such_rows", "data.train", COLUMNS)
    assert "\n" not in str(error.value)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("no rows")
    with pytest.raises(UserError, match="is a folder that save_to_disk did not write"):
        row_files.read_rows(str(tmp_path), "data.train", COLUMNS)


def test_the_rows_that_come_along():
    path = pathlib.Path(__file__).parent / "rows.csv"
    rows = row_files.read_rows(str(path), "data.train", COLUMNS)
    assert row_files.empty_fields(rows, ("passage", "answer"))[0] == list(range(30))
    assert 20 <= len({own for own, *_ in rows.passages}) < 30
