"""Tables as people have them, each beside the plain file of the same rows."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from rag_jax.data import rows as row_files
from rag_jax.data import tables
from rag_jax.errors import UserError

COLUMNS = {"query": "q", "passage": "p", "answer": "a"}
ROWS = [
    {"q": "Who said it; and when?", "p": "She did, on a Monday.", "a": "she"},
    {"q": 'Which "tin"?', "p": "The green one | of cork.", "a": "green"},
    {"q": "Wo?", "p": "Über den Bergen.", "a": "42"},
]
PLAIN = row_files.Rows([r["q"] for r in ROWS], [[r["p"]] for r in ROWS], [r["a"] for r in ROWS])


def lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def separated(mark, quoting=csv.QUOTE_MINIMAL, first="", rows=ROWS):
    file = io.StringIO()
    file.write(first)
    writer = csv.DictWriter(file, list(rows[0]), delimiter=mark, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def unquoted(rows=ROWS):
    return "\n".join("\t".join(row.values()) for row in [dict(zip(ROWS[0], ROWS[0], strict=True)), *rows]).encode()


FILES = {
    "rows.jsonl.gz": (gzip.compress(lines()), ()),
    "rows.jsonl.bz2": (bz2.compress(lines()), ()),
    "rows.jsonl.xz": (lzma.compress(lines()), ()),
    "rows.ndjson": (lines(), ()),
    "rows.csv": (separated(";"), ("fields between semicolons",)),
    "tabs.csv": (separated("\t"), ("fields between tabs",)),
    "bars.csv": (separated("|"), ("fields between bars",)),
    "excel.csv": (separated(";", first="sep=;\r\n"), ("fields between semicolons",)),
    "quoted.tsv": (separated("\t", csv.QUOTE_ALL), ()),
    "plain.tsv": (unquoted(), ()),
    "rows.tsv.gz": (gzip.compress(separated("\t")), ()),
    "one.json": (json.dumps({"version": 1, "data": ROWS}, indent=2).encode(), ("the rows under 'data'",)),
    "line.json": (json.dumps({"data": ROWS}).encode(), ("the rows under 'data'",)),
    "columns.json": (json.dumps({name: [r[name] for r in ROWS] for name in "qpa"}).encode(), ("an object of columns",)),
    "pandas.json": (pandas.DataFrame(ROWS).to_json().encode(), ("an object of columns, as pandas writes it",)),
    "records.json": (pandas.DataFrame(ROWS).to_json(orient="records").encode(), ()),
}


@pytest.mark.parametrize("name", FILES)
def test_every_way_to_write_them_gives_the_same_rows(tmp_path, name):
    content, notes = FILES[name]
    (tmp_path / name).write_bytes(content)
    rows = row_files.read_rows(str(tmp_path / name), "data.train", COLUMNS)
    assert rows == PLAIN and rows.notes == notes


def test_zstandard(tmp_path):
    with pyarrow.CompressedOutputStream(str(tmp_path / "rows.jsonl.zst"), "zstd") as file:
        file.write(lines())
    assert row_files.read_rows(str(tmp_path / "rows.jsonl.zst"), "data.train", COLUMNS) == PLAIN


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_damaged_archives_are_told(tmp_path, suffix, damage):
    path = tmp_path / f"rows.jsonl{suffix}"
    with (
        tables.OPENERS[suffix](path, "wb")
        if suffix != ".zst"
        else pyarrow.CompressedOutputStream(str(path), "zstd") as file
    ):
        file.write(lines(ROWS * 300))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"no archive at all, but long enough")
    with pytest.raises(UserError, match="is cut off or damaged|cannot be read as jsonl") as error:
        row_files.read_rows(str(path), "data.train", COLUMNS)
    assert "\n" not in str(error.value)


def test_a_quote_that_would_swallow_rows_of_a_tsv_is_text(tmp_path):
    """By the rules of CSV these are two rows, the first over two lines; in a TSV a line is a row."""
    (tmp_path / "r.tsv").write_text('q\tp\ta\n"green\tx\ty\nb"\tp\tc\n')
    rows = row_files.read_rows(str(tmp_path / "r.tsv"), "data.train", COLUMNS)
    assert rows.queries == ['"green', 'b"'] and rows.notes == ("fields between tabs, quotes read as text",)
    (tmp_path / "r.tsv").write_text('q\tp\ta\n"two\nlines"\tp\tc\n')  # as a spreadsheet writes it
    assert row_files.read_rows(str(tmp_path / "r.tsv"), "data.train", COLUMNS).queries == ["two\nlines"]


def test_a_field_of_a_tsv_may_begin_with_a_quote(tmp_path):
    rows = [*ROWS, {"q": '"Green tin" which number?', "p": "It is nine.", "a": "nine"}]
    (tmp_path / "r.tsv").write_bytes(unquoted(rows))
    found = row_files.read_rows(str(tmp_path / "r.tsv"), "data.train", COLUMNS)
    assert found.queries == [row["q"] for row in rows]
    assert found.notes == ("fields between tabs, quotes read as text",)


def test_shards(tmp_path):
    for part, some in enumerate((ROWS[:2], ROWS[2:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), tmp_path / f"part-{part}.parquet")
    (tmp_path / "README.md").write_text("# rows")
    (tmp_path / "dataset_infos.json").write_text("{}")
    names = [str(tmp_path / f"part-{part}.parquet") for part in range(2)]
    for source in (str(tmp_path), f"{tmp_path}/*.parquet", f"{tmp_path}/part-[01].parquet", ",".join(names)):
        rows = row_files.read_rows(source, "data.train", COLUMNS)
        assert rows == PLAIN and rows.notes == ("2 files",)
    pyarrow.parquet.write_table(pyarrow.table({"q": ["x"]}), tmp_path / "part-2.parquet")
    with pytest.raises(UserError, match="part-2.parquet has no column 'p', which others have; give files of one kind"):
        row_files.read_rows(str(tmp_path), "data.train", COLUMNS)
    with pytest.raises(UserError, match="no file matches"):
        row_files.read_rows(f"{tmp_path}/*.csv", "data.train", COLUMNS)
    (tmp_path / "more.csv").write_bytes(separated(","))
    with pytest.raises(UserError, match=r"holds .csv and .parquet; name the files that are meant"):
        row_files.read_rows(str(tmp_path), "data.train", COLUMNS)


@pytest.fixture(params=["saved", "shards", "folders"])
def with_splits(request, tmp_path):
    parts = {"train": ROWS[:2], "validation": ROWS[2:], "test": ROWS[:1]}
    if request.param == "saved":
        splits = {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "ds"))
    for name, rows in parts.items() if request.param != "saved" else ():
        path = (
            tmp_path / "ds" / (f"data/{name}-00000-of-00001.jsonl" if request.param == "shards" else f"{name}/r.jsonl")
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lines(rows))
    return str(tmp_path / "ds")


def test_every_key_reads_its_own_split(with_splits):
    def queries(source, key):
        rows = row_files.read_rows(source, key, COLUMNS)
        assert any(note.startswith("split ") for note in rows.notes)
        return rows.queries

    asked = [row["q"] for row in ROWS]
    assert queries(with_splits, "data.train") == asked[:2]
    assert queries(with_splits, "data.eval") == asked[2:]
    assert queries(f"{with_splits}:test", "data.eval") == asked[:1]
    assert queries(f"{with_splits}:train[1:]", "data.eval") == asked[1:2]
    assert queries(f"{with_splits}[:50%]", "data.train") == asked[:1]
    with pytest.raises(UserError, match="no split 'dev'; it has: (train, validation, test|test, train, validation)$"):
        row_files.read_rows(f"{with_splits}:dev", "data.eval", COLUMNS)
    with pytest.raises(UserError, match=r"leaves none of 2 rows; write \[FROM:TO\]"):
        row_files.read_rows(f"{with_splits}:train[2:]", "data.eval", COLUMNS)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/rows", ("owner/rows", {})),
        ("owner/rows:v1.1", ("owner/rows", "v1.1", {})),
        ("owner/rows:v1.1:test", ("owner/rows", "v1.1", {"split": "test"})),
        ("squad:validation[:1%]", ("squad", {"split": "validation[:1%]"})),
        ("owner/rows@0123abc:de:train[10:20]", ("owner/rows", "de", {"revision": "0123abc", "split": "train[10:20]"})),
    ],
)
def test_names_of_the_hub(monkeypatch, source, asked):
    said = []

    def load_dataset(*words, **more):
        said.append((*words, more))
        rows = datasets.Dataset.from_list(ROWS)
        return rows if "split" in more else datasets.DatasetDict({"train": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert row_files.read_rows(source, "data.train", COLUMNS) == PLAIN
    assert said == [asked]


def test_classes_have_their_names(tmp_path):
    features = datasets.Features(
        {"q": datasets.Value("string"), "p": datasets.Value("string"), "a": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"q": ["x", "y"], "p": ["s", "t"], "a": [1, 0]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.save_to_disk(str(tmp_path / "ds"))
    saved.to_parquet(str(tmp_path / "rows.parquet"))
    for name in ("ds", "rows.parquet"):
        assert row_files.read_rows(str(tmp_path / name), "data.train", COLUMNS).answers == ["yes", "no"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_pointers_of_git_lfs(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(UserError, match="is a Git LFS pointer, not the file itself"):
        row_files.read_rows(str(tmp_path / name), "data.train", COLUMNS)


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.soak)])
def test_no_file_loses_or_merges_rows(tmp_path, count):
    """Files of random texts and dialects, against pandas where the dialect is told to it."""
    draw, path = random.Random(count), tmp_path / "r.csv"
    alphabet = "ab,;\t|\"' \n\r日."
    for number in range(count):
        mark = draw.choice(list(tables.SEPARATORS))
        quoting = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
        texts = ["".join(draw.choices(alphabet, k=draw.randint(1, 8))) for _ in range(3 * draw.randint(1, 5))]
        file = io.StringIO(newline="")
        writer = csv.writer(file, delimiter=mark, quoting=quoting, lineterminator=draw.choice(["\n", "\r\n"]))
        writer.writerows([["q", "p", "a"], *zip(texts[::3], texts[1::3], texts[2::3], strict=True)])
        content = file.getvalue()
        if draw.random() < 0.3:  # a file that breaks the rules
            at = draw.randrange(len(content))
            content = content[:at] + draw.choice(alphabet) + content[at + 1 :]
        path = tmp_path / draw.choice(["r.csv", "r.tsv"])
        path.write_text(content, encoding="utf-8", newline="")
        try:
            rows = row_files.read_rows(str(path), "data.train", COLUMNS)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        quotes = csv.QUOTE_NONE if any("quotes read as text" in note for note in rows.notes) else csv.QUOTE_MINIMAL
        with path.open(encoding="utf-8", newline="") as file:
            expected = [row for row in csv.reader(file, delimiter=mark, quoting=quotes) if row][1:]
        found = [list(row) for row in zip(rows.queries, rows.passages, rows.answers, strict=True)]
        told = [[q, [p] if p.strip() else [], a if a.strip() else ""] for q, p, a in expected]
        assert found == told, (number, content)
