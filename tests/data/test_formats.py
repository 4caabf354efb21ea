"""Layouts that others write, each read to the rows of its plain twin, and columns that lie deeper."""

import json

import pytest

from rag_jax.data import formats
from rag_jax.data import rows as row_files
from rag_jax.errors import UserError

CONFIGURED = {"query": "Question", "passage": "Abstract", "answer": "Answer", "negative": "Wrong"}
QUERIES, PASSAGES, ANSWERS = ["who?", "when?"], ["She did it.", "On a Monday."], ["she", "Monday"]
PLAIN = [
    {"Question": q, "Abstract": p, "Answer": a, "Wrong": ["No.", "Nor that."]}
    for q, p, a in zip(QUERIES, PASSAGES, ANSWERS, strict=True)
]


def rows_as(**parts):
    """A row for each query: functions of (query, passage, answer)."""
    made = zip(QUERIES, PASSAGES, ANSWERS, strict=True)
    return [{name: part(*row) if callable(part) else part for name, part in parts.items()} for row in made]


def query(q, p, a):
    return q


def passage(q, p, a):
    return p


def answer(q, p, a):
    return a


WRONG = [{"title": "", "text": "No."}, {"title": None, "text": "Nor that."}]
LAYOUTS = {
    "dpr": rows_as(
        question=query,
        answers=lambda q, p, a: [a, a.upper()],
        positive_ctxs=lambda q, p, a: [{"title": "", "text": p, "score": 1000}],
        negative_ctxs=[],
        hard_negative_ctxs=WRONG,
    ),
    "tevatron": rows_as(
        query_id="0",
        query=query,
        answers=lambda q, p, a: [a, a.upper()],
        positive_passages=lambda q, p, a: [{"docid": "1", "text": p}],
        negative_passages=WRONG,
    ),
    "ms-marco": rows_as(
        query=query,
        query_id=1,
        answers=lambda q, p, a: [a, a.upper()],
        passages=lambda q, p, a: {
            "is_selected": [0, 1, 0],
            "passage_text": ["No.", p, "Nor that."],
            "url": ["", "", ""],
        },
    ),
    "flagembedding": rows_as(
        query=query, pos=lambda q, p, a: [p], neg=["No.", "Nor that."], answer=lambda q, p, a: [a, a.upper()]
    ),
    "sentence-transformers": rows_as(
        anchor=query, positive=passage, negative_1="No.", negative_2="Nor that.", answer=answer
    ),
    "squad": rows_as(
        id="7",
        title="T",
        context=passage,
        question=query,
        answers=lambda q, p, a: {"text": [a, a.upper()], "answer_start": [0, 0]},
    ),
    "question and answer": rows_as(
        question=query, question_id="x", answer=lambda q, p, a: {"value": a, "aliases": [a.upper()]}
    ),
    "chat": rows_as(
        messages=lambda q, p, a: [
            {"role": "system", "content": "Answer."},
            {"role": "user", "content": "before"},
            {"role": "assistant", "content": "so"},
            {"role": "user", "content": q},
            {"role": "assistant", "content": a},
        ]
    ),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_recognised(tmp_path, name):
    source = write(tmp_path / "r.jsonl", LAYOUTS[name])
    has_negatives = name not in ("question and answer", "chat", "squad")
    rows = row_files.read_rows(source, "data.train", CONFIGURED, with_negatives=has_negatives)
    plain = row_files.read_rows(write(tmp_path / "plain.jsonl", PLAIN), "data.train", CONFIGURED, with_negatives=True)
    assert (rows.queries, rows.answers) == (plain.queries, plain.answers)
    if name not in ("question and answer", "chat"):  # which have no passages
        assert rows.passages == plain.passages
    if has_negatives:
        assert rows.negatives == plain.negatives
    else:  # somebody who names a column of them is told that there is none
        with pytest.raises(UserError, match=r"has no column 'Wrong' \(data.columns.negative\)"):
            row_files.read_rows(source, "data.train", CONFIGURED, with_negatives=True)
    if name not in ("chat", "sentence-transformers"):
        assert rows.accepted == [[a, a.upper()] for a in ANSWERS]
    (note,) = rows.notes
    assert note.startswith(f"recognised as {name}: query from '")
    assert row_files.read_rows(source, "data.train", CONFIGURED, with_negatives=has_negatives, layout=name) == rows
    with pytest.raises(UserError, match="has no column 'Question'"):
        row_files.read_rows(source, "data.train", CONFIGURED, layout="columns")


def test_scores_of_flagembedding(tmp_path):
    rows = rows_as(query=query, pos=lambda q, p, a: [p], neg=["No."], pos_scores=[0.5], neg_scores=[-1.0])
    found = row_files.read_rows(
        write(tmp_path / "r.jsonl", rows), "data.train", CONFIGURED, with_negatives=True, with_answers=False
    )
    assert found.scores == [{p: 0.5, "No.": -1.0} for p in PASSAGES]


def test_named_columns_go_before_what_is_recognised(tmp_path):
    rows = rows_as(
        Question=query, Abstract=passage, Answer=answer, context="other", question="other", answers=["other"]
    )
    found = row_files.read_rows(write(tmp_path / "r.jsonl", rows), "data.train", CONFIGURED)
    assert found.queries == QUERIES and found.answers == ANSWERS and not found.notes


def test_squad_in_its_own_layout(tmp_path):
    asked = [{"id": str(i), "question": q, "answers": [{"text": a, "answer_start": 0}]} for i, (q, a) in enumerate(
        zip(QUERIES, ANSWERS, strict=True)
    )]  # fmt: skip
    paragraphs = [{"context": p, "qas": [each]} for p, each in zip(PASSAGES, asked, strict=True)]
    (tmp_path / "r.json").write_text(json.dumps({"version": "1.1", "data": [{"title": "T", "paragraphs": paragraphs}]}))
    found = row_files.read_rows(str(tmp_path / "r.json"), "data.train", CONFIGURED)
    assert (found.queries, found.passages, found.answers) == (QUERIES, [[p] for p in PASSAGES], ANSWERS)
    assert found.notes[0] == "SQuAD's articles, a row a question"


def test_a_layout_that_it_is_not(tmp_path):
    source = write(tmp_path / "r.jsonl", PLAIN)
    with pytest.raises(
        UserError, match="is not of data.format=dpr, which has columns positive_ctxs, question; it has: Qu"
    ):
        row_files.read_rows(source, "data.train", CONFIGURED, layout="dpr")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("deep.text", ["a", "b"]),
        ("list[1].text", "z"),
        ("list.text", ["y", "z"]),
        ("list[7].text", None),
        ("deep.nothing", None),
        ("{title}: {list[0].text}", "T: y"),
        ("{title}\n{list.text}", ["T\ny", "T\nz"]),
        ("dotted.name", "plain"),
        (("title", "dotted.name"), ["T", "plain"]),
    ],
)
def test_columns_that_lie_deeper(asked, expected):
    row = {"deep": {"text": ["a", "b"]}, "list": [{"text": "y"}, {"text": "z"}], "title": "T", "dotted.name": "plain"}
    columns = {name: [value] for name, value in row.items()}
    assert set(formats.columns_of(asked, list(columns))) <= set(columns)
    assert formats.cells(asked, columns, 1) == [expected]


@pytest.mark.parametrize("asked", ["nothing", "deep", "title.", "{title} {nothing}", "title..text", "{", ""])
def test_columns_that_are_not_there(asked):
    assert formats.columns_of(asked, ["title", "list"]) == []


def test_lists_as_pandas_prints_them(tmp_path):
    (tmp_path / "r.csv").write_text("q,p,a\nx,s,\"['red', 'Red']\"\ny,t,[]\nz,u,\n")
    columns = {"query": "q", "passage": "p", "answer": "a"}
    rows = row_files.read_rows(str(tmp_path / "r.csv"), "data.train", columns)
    assert rows.answers == ["red", "", ""] and rows.accepted == [["red", "Red"], [], []]
    assert rows.notes == ("lists that stand as texts in column 'a'",)
    (tmp_path / "r.csv").write_text("q,p,a\nx,s,\"['red', 'Red']\"\ny,t,[1] of three\n")  # one is none
    assert row_files.read_rows(str(tmp_path / "r.csv"), "data.train", columns).answers[0] == "['red', 'Red']"
    (tmp_path / "r.csv").write_text("q,p,a\nx,s,['red' 'Red']\n")  # numpy's, which Python would join
    assert row_files.read_rows(str(tmp_path / "r.csv"), "data.train", columns).answers == ["['red' 'Red']"]


def test_whole_numbers_of_a_column_with_gaps(tmp_path):
    write(tmp_path / "r.jsonl", [{"q": "x", "p": "s", "a": 1990.0}, {"q": "y", "p": "t", "a": None}])
    columns = {"query": "q", "passage": "p", "answer": "a"}
    rows = row_files.read_rows(str(tmp_path / "r.jsonl"), "data.train", columns)
    assert rows.answers == ["1990", ""] and rows.notes == ("whole numbers in column 'a' without .0",)
    write(tmp_path / "r.jsonl", [{"q": "x", "p": "s", "a": 1990.0}, {"q": "y", "p": "t", "a": 0.5}])
    assert row_files.read_rows(str(tmp_path / "r.jsonl"), "data.train", columns).answers == ["1990.0", "0.5"]


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "nfcorpus"
    (folder / "qrels").mkdir(parents=True)
    texts = [{"_id": f"d{i}", "title": "T" if i else "", "text": p, "metadata": {}} for i, p in enumerate(PASSAGES)]
    write(folder / "corpus.jsonl", texts)
    write(folder / "queries.jsonl", [{"_id": f"q{i}", "text": q} for i, q in enumerate([*QUERIES, "unjudged"])])
    judged = "query-id\tcorpus-id\tscore\nq0\td0\t1\nq0\td1\t2\nq1\td1\t1\nq1\td0\t0\nq1\td9\t1\n"
    (folder / "qrels" / "test.tsv").write_text(judged)
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    return folder


def test_beir(beir):
    read = row_files.read_rows(str(beir), "data.eval", CONFIGURED, with_answers=False)
    first, second = PASSAGES[0], f"T {PASSAGES[1]}"
    assert (read.queries, read.passages) == (QUERIES, [[first, second], [second]])
    assert read.notes[0] == "split test of test, train"
    assert (
        "2 queries with the passages that qrels/test.tsv judges right, 1 judgements of what is not there left out"
        in (read.notes[1])
    )
    assert row_files.read_rows(str(beir), "data.train", CONFIGURED, with_answers=False).queries == QUERIES[1:]
    pairs, notes = row_files.read_corpus(str(beir), "data.passages", CONFIGURED)
    assert pairs == [(first, ""), (second, "")]
    assert notes == ["the corpus of nfcorpus", "recognised as beir: passage from '{title} {text}'"]


def test_ms_marco_without_a_header(tmp_path):
    long = "is a passage of many words that nobody would give to a column as its name"
    (tmp_path / "triples.tsv").write_text(f"who?\tThis {long}\tThat {long}\nwhen?\tHere {long}\tThere {long}\n")
    rows = row_files.read_rows(
        str(tmp_path / "triples.tsv"), "data.train", CONFIGURED, with_answers=False, with_negatives=True
    )
    assert (rows.queries, rows.passages[0], rows.negatives) == (
        ["who?", "when?"],
        [f"This {long}"],
        [[f"That {long}"], [f"There {long}"]],
    )
    assert rows.notes[0] == "no header: query, positive, negative"
    (tmp_path / "collection.tsv").write_text(f"0\tThis {long}\n1\tThat {long}\n")
    pairs, _ = row_files.read_corpus(str(tmp_path / "collection.tsv"), "data.passages", CONFIGURED)
    assert pairs == [(f"This {long}", ""), (f"That {long}", "")]
