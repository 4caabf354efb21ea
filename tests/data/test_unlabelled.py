"""Rows whose passage is not known: of a document, or of the corpus; what they read, and what becomes of bad ones."""

import csv
import json

import numpy as np
import pytest
from data_helpers import byte_tokenizer, word_tokenizer

from rag_jax import data
from rag_jax.errors import UserError

COLUMNS = {"query": "Q", "passage": "P", "answer": "A", "negative": None, "document": "D"}
RETRIEVER = data.RetrieverText(word_tokenizer(["a", "b", "c"]), "", "", query_len=8, passage_len=8)
PROMPT = data.Prompt(byte_tokenizer(), "{passage}", " {query}", " {answer}", 12, 12, 12)
ROWS = [
    ("known", "p0", "yes", "d0"),
    ("chunk", "", "yes", "d1"),  # of two passages
    ("anywhere", " ", "yes", " "),
    ("only one", "", "yes", "d2"),  # its document holds one passage: that is it
    ("known", "", "no", ""),  # the first row's query
    ("lost", "", "yes", "d9"),  # of which there is no passage
]
CORPUS = [("p1", "d1"), ("p2", "d1"), ("p3", "d2"), ("p4", ""), ("p0", ""), ("", "d3"), ("p1", "d3")]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path / "cache"))


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def load(tmp_path, rows=ROWS, corpus=CORPUS, *, always=False, answer=False, **changes):
    given = () if corpus is None else (("data.passages", write(tmp_path / "corpus.csv", "PD", corpus)),)
    gaps = data.Gaps(passage=True, answer=answer, corpus=given, always=always)
    options = dict(key="data.train", columns=COLUMNS, bad_rows="drop", retriever=RETRIEVER, prompt=PROMPT, gaps=gaps)
    return data.load_examples(write(tmp_path / "rows.csv", "QPAD", rows), **options | changes)


def named(examples, keys):
    return [[examples.passages[key] for key in row if key >= 0] for row in np.atleast_2d(keys)]


def test_what_is_known_of_each_row(tmp_path):
    examples, report = load(tmp_path)
    assert examples.passages == ("p0", "p1", "p2", "p3", "p4")
    assert named(examples, examples.own_key) == [["p0"], [], [], ["p3"], ["p0"]]
    assert [examples.documents[key] if key >= 0 else None for key in examples.document_key] == [
        "d0",
        "d1",
        None,
        "d2",
        None,
    ]
    within = {name: named(examples, examples.document_passages[i])[0] for i, name in enumerate(examples.documents)}
    assert within == {"d0": ["p0"], "d1": ["p1", "p2"], "d2": ["p3"], "d9": [], "d3": ["p1"]}
    assert examples.document_of.tolist() == [
        examples.documents.index("d0"),
        -1,
        examples.documents.index("d1"),
        examples.documents.index("d2"),
        -1,
    ]
    assert report.dropped == {"a document that holds no passage": 1}
    assert str(report).startswith(
        "5 rows (3 with a passage, 1 with a document alone, 1 with neither passage nor document), 4 distinct queries, "
        "5 distinct passages, 3 of them of the corpus alone; dropped of 6: 1 with a document that holds no passage"
    )
    with pytest.raises(UserError, match="bad rows among 6: 1 with a document that holds no passage; fix them"):
        load(tmp_path, bad_rows="refuse")


def test_several_passages_answer_one_query(tmp_path):
    """A list in a row, or several rows of the query; copies count once."""
    lines = [("q", ["p1", "p0", "p1", " "], "x"), ("q", "p2", "x"), ("r", ["p0"], "x"), ("s", None, "x")]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(dict(zip("QPA", line, strict=True))) for line in lines))
    options = dict(columns=COLUMNS | {"document": None}, bad_rows="drop", retriever=RETRIEVER, prompt=PROMPT)
    examples, report = data.load_examples(str(path), key="data.train", gaps=data.Gaps(passage=True), **options)
    assert named(examples, examples.own_key) == [["p1", "p0"], ["p2"], ["p0"], []]
    assert named(examples, examples.right_key) == [["p1", "p0", "p2"], ["p0"], []]
    assert report.kinds["neither passage nor document"] == 1
    labelled, report = data.load_examples(str(path), key="data.train", **options)
    assert len(labelled) == 3 and report.dropped == {"an empty passage": 1} and "(" not in str(report)


def test_a_corpus_is_read_where_it_is_needed(tmp_path):
    """Rows that all name their passage do not look at it, unless they are told to."""
    labelled = [row for row in ROWS if row[1].strip()]
    plain, report = load(tmp_path, labelled)
    assert plain.passages == ("p0",) and report.corpus == 0
    whole, report = load(tmp_path, labelled, always=True)
    assert whole.passages == ("p0", "p1", "p2", "p3", "p4") and report.corpus == 4
    assert (tmp_path / "corpus.csv").unlink() is None
    given = data.Gaps(passage=True, corpus=(("data.passages", str(tmp_path / "corpus.csv")),))
    options = dict(columns=COLUMNS, bad_rows="drop", retriever=RETRIEVER, prompt=PROMPT, gaps=given)
    assert data.load_examples(str(tmp_path / "rows.csv"), key="data.train", **options)[0].passages == ("p0",)
    with pytest.raises(UserError, match=r"data.passages='.*corpus.csv': no such file"):
        data.load_examples(write(tmp_path / "rows.csv", "QPAD", ROWS), key="data.train", **options)


def test_the_passage_column_may_be_missing_where_there_is_a_corpus(tmp_path):
    rows = [(q, a, d) for q, _, a, d in ROWS]
    given = data.Gaps(passage=True, corpus=(("data.passages", write(tmp_path / "corpus.csv", "PD", CORPUS)),))
    options = dict(key="data.train", columns=COLUMNS, bad_rows="drop", retriever=RETRIEVER, prompt=PROMPT)
    path = write(tmp_path / "rows.csv", "QAD", rows)
    examples, _ = data.load_examples(path, **options, gaps=given)
    assert named(examples, examples.own_key) == [[], [], ["p3"], []]  # no row names that of d0
    for gaps in (data.Gaps(passage=True), data.Gaps(corpus=given.corpus)):
        with pytest.raises(UserError, match=r"has no column 'P' \(data.columns.passage\); it has: Q, A, D"):
            data.load_examples(path, **options, gaps=gaps)


def test_what_cannot_be_trained_on_is_refused(tmp_path):
    with pytest.raises(UserError, match="names no passage in any row: name the file of passages .* data.passages, or"):
        load(tmp_path, ROWS[2:3], None)
    with pytest.raises(UserError, match=r"data.passages='.*' has no column 'D' \(data.columns.document\); it has: P"):
        write(tmp_path / "other.csv", "P", ["p"])
        load(tmp_path, gaps=data.Gaps(passage=True, corpus=(("data.passages", str(tmp_path / "other.csv")),)))
    with pytest.raises(UserError, match="1 usable row .*5 with an empty passage.*; rows without passages train with"):
        load(tmp_path, gaps=data.Gaps(), min_rows=2)
    with pytest.raises(UserError, match="0 usable rows .*2 with an empty answer.*objective.evidence=question"):
        load(tmp_path, [("known", "p0", "", "d0"), ("who", "p4", " ", "")], min_rows=2)


def test_an_answer_that_is_not_known_has_no_tokens(tmp_path):
    rows = [("known", "p0", "", "d0"), ("chunk", "", " ", "d1"), ("who", "p4", "me", "")]
    examples, _ = load(tmp_path, rows, answer=True)
    assert examples.answers.lengths.tolist() == [0, 0, 4]
    batch = data.collate(examples, [0, 2], data.Batching([data.longest(examples)]))
    assert batch.answer_mask.sum(axis=1).tolist() == [0, 4] and batch.suffix_mask.sum(axis=1).tolist() == [6, 4 + 4]
    assert load(tmp_path, rows)[1].dropped == {"an empty answer": 2}


def pool(batch, group):
    return batch.pool.key[group].ravel().tolist()


def test_groups_hold_each_passage_once_and_rows_read_what_is_theirs(tmp_path):
    examples, _ = load(tmp_path, ROWS[:5])
    p0, p1, p2, p3, p4 = range(5)
    brought = np.array([[p4, -1], [p2, p1], [p1, p2], [-1, -1]])
    batching = data.Batching([data.longest(examples)], group_size=2, negatives=1)
    batch = data.collate(examples, [0, 1, 2, 3], batching, brought=brought)
    # What is right stands beside its row; the rest comes in turn, the nearest of each row first.
    assert batch.pool.key.tolist() == [[p0, p4], [p2, p1], [p1, p2], [p3, -1]]
    assert batch.right_key.tolist() == [[p0], [-1], [-1], [p3]]
    assert batch.document.tolist() == [-1, examples.documents.index("d1"), -1, -1]
    # The second row reads its document's passages alone; the third one whatever its group holds.
    assert batch.readable.astype(int).tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]
    alone = data.Batching(batching.shapes, 2, 1, by_row=True)
    batch = data.collate(examples, [0, 1, 2, 3], alone, brought=brought)
    assert batch.readable.astype(int).tolist() == [[0, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
    # Of what two rows bring there is one copy; where there is no room the last ones are left out.
    both = data.collate(examples, [1, 2], batching, brought=np.array([[p1, p2, p3], [p1, p4, p0]]))
    assert sorted(pool(both, slice(0, 2))) == [p1, p2, p3, p4]


def test_a_group_without_any_passage(tmp_path):
    examples, _ = load(tmp_path, ROWS[:3])
    batch = data.collate(examples, [1, 2], data.Batching([data.longest(examples)], 2), brought=np.full((2, 1), -1))
    assert pool(batch, slice(0, 2)) == [-1, -1] and batch.pool.passage_mask.sum() == 2


def test_known_numbers_of_pairs():
    rng = np.random.default_rng(0)
    table = np.where(rng.random((7, 5)) < 0.5, np.nan, rng.normal(size=(7, 5))).astype(np.float32)
    rows, passages = np.nonzero(~np.isnan(table))
    order = rng.permutation(len(rows))
    known = data.Known.of(rows[order], passages[order], table[rows, passages][order], 5)
    found = known.values(np.arange(7)[:, None], np.arange(-1, 5)[None])
    np.testing.assert_array_equal(found, np.concatenate([np.full((7, 1), np.nan), table], axis=1))
    nothing = data.Known.of(rows[:0], rows[:0], table[rows[:0], 0], 5)
    assert np.isnan(nothing.values(np.array([[3]]), np.array([[2, -1]]))).all()


def test_scores_that_rows_bring(tmp_path):
    """Each text has its own, a blank text and a blank score none, and of what stands twice the first one counts."""
    path = tmp_path / "rows.jsonl"
    lines = [
        {"Q": "q", "P": ["p0", " ", "p1"], "S": [2, 9, 0.5], "N": ["p2", "p0", "p3"], "T": [-1, 7, None]},
        {"Q": "r", "P": "p2", "S": "1.5", "N": [], "T": []},
        {"Q": "s", "P": "p3", "S": None, "N": "p0", "T": 4},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    columns = {"query": "Q", "passage": "P", "negative": "N", "passage_score": "S", "negative_score": "T"}
    options = dict(key="data.train", columns=columns, bad_rows="drop", retriever=RETRIEVER, prompt=None, negatives=2)
    examples, _ = data.load_examples(str(path), **options)
    known = data.given_scores(examples, 0.5).values(np.arange(3)[:, None], np.arange(4)[None])
    at = [examples.passages.index(f"p{i}") for i in range(4)]
    nan = np.nan
    np.testing.assert_array_equal(known[:, at], [[4, 1, -2, nan], [nan, nan, 3, nan], [8, nan, nan, nan]])
    batch = data.collate(
        examples,
        [0, 1],
        data.Batching([data.longest(examples)], negatives=2, evidence=data.given_scores(examples, 0.5)),
    )
    found = {
        (r, int(k)): v for r in range(2) for k, v in zip(batch.pool.key[r], batch.evidence[r], strict=True) if v == v
    }
    assert found == {(0, at[0]): 4, (0, at[1]): 1, (0, at[2]): -2, (1, at[2]): 3}
    for cell, message in (
        ([1, 2], r"row 1 has 1 texts in column 'P' and 2 scores in column 'S'; give each its own"),
        ("much", r"column 'S' holds 'much' in row 1: give a finite number"),
        (float("inf"), r"column 'S' holds inf in row 1: give a finite number"),
        ({}, r"column 'S' holds {} in row 1: give a finite number"),
    ):
        path.write_text(json.dumps({"Q": "q", "P": "p", "S": cell, "N": [], "T": []}))
        with pytest.raises(UserError, match=message):
            data.load_examples(str(path), **options)
