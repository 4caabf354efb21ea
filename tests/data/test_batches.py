"""Rows to batches: what every field holds, in which order, and what becomes of bad rows."""

import csv
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from data_helpers import BOS, EOS, byte_tokenizer, word_tokenizer

from rag_jax import data
from rag_jax.errors import UserError

COLUMNS = {"query": "Question", "passage": "Abstract", "answer": "Answer"}
ROWS = [  # the passages of rows 0, 2 and the queries of rows 1, 3 are equal
    ("why dog", "the dog barks", "so"),
    ("who barks", "cat", "dog does"),
    ("why", "the dog barks", "it does"),
    ("who barks", "the cat", "cat"),
    ("which dog", "dog the cat", "no"),
]
WORDS = word_tokenizer(["the", "dog", "cat", "barks", "who", "why", "which", "P:"])
BYTES = byte_tokenizer()
RETRIEVER = data.RetrieverText(WORDS, query_prefix="", passage_prefix="P: ", query_len=8, passage_len=5)
PROMPT = data.Prompt(BYTES, "{passage}", " Q:{query}", " {answer}", passage_len=13, query_len=16, answer_len=10)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS.values(), *rows])
    return str(path)


def load(tmp_path, rows=ROWS, **changes):
    options = dict(key="data.train", columns=COLUMNS, bad_rows="drop", retriever=RETRIEVER, prompt=PROMPT) | changes
    return data.load_examples(write(tmp_path / "rows.csv", rows), **options)


def assert_equal(left, right):
    for name, a, b in zip(left._fields, left, right, strict=True):
        if isinstance(a, tuple):
            assert_equal(a, b)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


def real(ids, mask):
    """The tokens that the mask keeps, which must be the leading ones."""
    assert (np.diff(mask.astype(int), axis=1) <= 0).all() and ids.shape == mask.shape
    assert ids.dtype == np.int32 and mask.dtype == bool
    return [row[: keep.sum()].tolist() for row, keep in zip(ids, mask, strict=True)]


def test_every_field_of_a_batch(tmp_path):
    examples, _ = load(tmp_path)
    batch = data.collate(examples, [3, 0, 2, 1], data.Batching([data.longest(examples)]))
    rows = [ROWS[i] for i in (3, 0, 2, 1)]
    assert batch.row.tolist() == [3, 0, 2, 1]
    assert real(batch.query_ids, batch.query_mask) == [WORDS(q)["input_ids"] for q, _, _ in rows]
    expected = [WORDS("P: " + p, truncation=True, max_length=5)["input_ids"] for _, p, _ in rows]
    assert real(batch.pool.passage_ids[:, 0], batch.pool.passage_mask[:, 0]) == expected
    assert real(batch.pool.prefix_ids[:, 0], batch.pool.prefix_mask[:, 0]) == [
        [BOS, *p.encode()[:12]] for _, p, _ in rows
    ]
    expected = [[*f" Q:{q} {a}".encode(), EOS] for q, _, a in rows]
    assert real(batch.suffix_ids, batch.suffix_mask) == expected
    for i, (query, _, answer) in enumerate(rows):
        start, length = batch.answer_start[i], batch.answer_mask[i].sum()
        assert start == len(f" Q:{query}")
        assert batch.suffix_ids[i, start : start + length].tolist() == [*f" {answer}".encode(), EOS]
        assert batch.answer_mask[i, :length].all()
    for key, column in ((batch.query_key, 0), (batch.pool.key[:, 0], 1)):
        for i in range(4):
            for j in range(4):
                assert (key[i] == key[j]) == (rows[i][column] == rows[j][column])
    assert batch.string_ids is None and batch.string_answer_start is None
    # Of row 3's query row 1 has another passage.
    assert examples.right_key.shape == (4, 2) and batch.right_key.tolist() == [[1, 2], [0, -1], [0, -1], [1, 2]]
    for name in ("row", "query_key", "right_key", "answer_start"):
        assert getattr(batch, name).dtype == np.int32


def test_fields_of_a_model_that_is_not_used_are_none(tmp_path):
    examples, _ = load(tmp_path, prompt=None)
    batch = data.collate(examples, [0, 1], data.Batching([data.longest(examples)]))
    assert batch.query_ids is not None and batch.pool.prefix_ids is batch.suffix_ids is batch.answer_mask is None
    examples, _ = load(tmp_path, retriever=None)
    batch = data.collate(examples, [0, 1], data.Batching([data.longest(examples)]))
    assert batch.suffix_ids is not None and batch.query_ids is batch.pool.passage_ids is None


def test_the_predecessors_strings_in_a_batch(tmp_path):
    whole = data.WholeString(BYTES, 60)
    examples, report = load(tmp_path, prompt=None, whole_string=whole)
    batch = data.collate(examples, [4, 0], data.Batching([data.longest(examples)]))
    texts = [f"#query# #query# {q} #passage# #passage# {p} #answer# {a}" for q, p, a in (ROWS[4], ROWS[0])]
    assert real(batch.string_ids, batch.string_mask) == [[*text.encode()][:60] for text in texts]
    assert batch.string_answer_start.tolist() == [text.index("#answer#") + len("#answer#") - 1 for text in texts]
    lengths = [len(f"#query# #query# {q} #passage# #passage# {p} #answer# {a}") for q, p, a in ROWS]
    assert report.cut["strings"] == sum(length > 60 for length in lengths) > 0


def test_the_report_counts_rows(tmp_path):
    rows = [*ROWS, ("", "p", "a"), ("q", " ", "a"), ("q", "only in this one row", "an answer too long"), ("q", "p", "")]
    examples, report = load(tmp_path, rows)
    assert (report.rows_read, report.rows, report.queries, report.passages) == (9, 5, 4, 4)
    assert report.dropped == {
        "an empty query": 1,
        "an empty passage": 1,
        "an empty answer": 1,
        "an answer longer than data.answer_len=10 tokens": 1,
    }
    # "P: the dog barks" and "P: dog the cat" are six tokens; "the dog barks" is fourteen with <bos>.
    assert {name: n for name, n in report.cut.items() if n} == {"passages (retriever)": 3, "passages (generator)": 2}
    assert "dropped of 9: 1 with an empty query" in str(report) and "cut: 3 passages (retriever)" in str(report)
    assert examples.rows == load(tmp_path)[0].rows
    assert examples.passages == ("the dog barks", "cat", "the cat", "dog the cat")


def test_dropping_a_row_leaves_the_others_as_they_were(tmp_path):
    clean, _ = load(tmp_path)
    mixed, _ = load(tmp_path, [("x", "new", "an answer too long"), *ROWS[:2], ("", "", ""), *ROWS[2:]])
    shapes = [data.longest(clean)]
    assert_equal(*(data.collate(e, range(5), data.Batching(shapes)) for e in (clean, mixed)))


def test_bad_rows_are_refused_on_demand(tmp_path):
    rows = [*ROWS, ("q", "p", ""), ("q", "p", "an answer too long")]
    message = (
        "data.train='.*' has bad rows among 7: 1 with an empty answer, 1 with an answer longer .*data.bad_rows=drop"
    )
    with pytest.raises(UserError, match=message):
        load(tmp_path, rows, bad_rows="refuse")
    assert load(tmp_path, bad_rows="refuse")[1].rows == 5


@pytest.mark.parametrize(
    ("rows", "min_rows", "message"),
    [
        (ROWS[:1], 8, "has 1 usable row, fewer than a batch of 8: give more rows or lower batch_size"),
        (ROWS, 8, "has 5 usable rows, fewer than a batch of 8"),
        ([*ROWS, ("q", "p", "")], 6, r"has 5 usable rows \(6 read; 1 with an empty answer\), fewer than a batch of 6"),
        ([("q", "p", "")], 1, r"has 0 usable rows \(1 read; 1 with an empty answer\), none to use"),
    ],
)
def test_too_few_rows(tmp_path, rows, min_rows, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, rows, min_rows=min_rows)


def test_one_row_will_do_for_a_batch_of_one(tmp_path):
    examples, _ = load(tmp_path, ROWS[:1])
    batching = data.Batching(data.buckets(examples, 1, 1))
    batches = data.iterate(examples, batching, batch_size=1, seed=0, start_step=0, total_steps=3)
    assert [batch.row.tolist() for batch in batches] == [[0]] * 3


@pytest.mark.parametrize(
    "change",
    [
        {"retriever": dataclasses.replace(RETRIEVER, passage_prefix="Q: ")},
        {"retriever": dataclasses.replace(RETRIEVER, query_len=3)},
        {"prompt": dataclasses.replace(PROMPT, query="{query}")},
        {"prompt": dataclasses.replace(PROMPT, tokenizer=byte_tokenizer(bos=False))},
        {"prompt": None},
        {"rows": ROWS[:4]},
    ],
)
def test_the_cache_knows_texts_settings_and_tokenizers(tmp_path, change):
    assert not load(tmp_path)[1].from_cache
    again, report = load(tmp_path)
    assert report.from_cache
    fresh, report = load(tmp_path, **change)
    assert not report.from_cache
    kept, report = load(tmp_path, **change)
    assert report.from_cache
    shapes = [data.longest(fresh)]
    assert_equal(*(data.collate(e, range(4), data.Batching(shapes)) for e in (fresh, kept)))


# With row 0: its own passage, the other passage of row 1's query, a passage of no row.
GIVEN = [["the dog barks", "who", "cat", "who"], ["the cat", "barks"], [], ["cat"], ["the dog barks", "who", "why"]]


def load_given(tmp_path, given=GIVEN, rows=ROWS, **changes):
    lines = [dict(zip(COLUMNS.values(), row, strict=True)) | {"N": n} for row, n in zip(rows, given, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = dict(key="data.train", columns=COLUMNS | {"negative": "N"}, bad_rows="drop", retriever=RETRIEVER)
    return data.load_examples(str(tmp_path / "rows.jsonl"), **options | dict(prompt=PROMPT, negatives=2) | changes)


def test_given_negatives_in_a_batch(tmp_path):
    """Never a passage of the same query, the first two that are left; one token where there is none."""
    examples, report = load_given(tmp_path)
    expected = [["who", "cat"], ["barks"], [], [], ["the dog barks", "who"]]
    assert str(report).endswith(
        "; given negatives: 2 a row, 3 rows bring fewer, 3 left out as passages of their own query"
    )
    assert report.cut["negatives (retriever)"] == report.cut["negatives (generator)"] == 1
    assert [[examples.passages[key] for key in row if key >= 0] for row in examples.negative_key] == expected
    assert examples.passages[:4] == load(tmp_path)[0].passages and len(examples.passages) == 6
    assert load_given(tmp_path, negatives=3)[0].negative_key.shape == (5, 3)
    order = [3, 0, 4]
    batching = data.Batching([data.longest(examples)], negatives=2)
    batch = data.collate(examples, order, batching)
    plain = data.collate(load(tmp_path)[0], order, data.Batching([data.longest(examples)]))
    for name in plain._fields:
        if name != "pool":
            np.testing.assert_array_equal(getattr(batch, name), getattr(plain, name), err_msg=name)
    assert batch.pool.document is None
    for whole, first in zip(batch.pool[:5], plain.pool[:5], strict=True):
        np.testing.assert_array_equal(whole[:, :1], first)
    found = data.Pool(*(array[:, 1:] for array in batch.pool[:5]))
    np.testing.assert_array_equal(found.key, examples.negative_key[order])
    passages = real(found.passage_ids.reshape(6, -1), found.passage_mask.reshape(6, -1))
    prefixes = real(found.prefix_ids.reshape(6, -1), found.prefix_mask.reshape(6, -1))
    texts = ["", "", *expected[0], *expected[4]]
    for text, passage, prefix in zip(texts, passages, prefixes, strict=True):
        if text:
            assert passage == WORDS("P: " + text, truncation=True, max_length=5)["input_ids"]
            assert prefix == [BOS, *text.encode()[:12]]
        else:
            assert len(passage) == len(prefix) == 1
    half = data.collate(examples, order, batching, own=np.array([2]))
    np.testing.assert_array_equal(half.pool.prefix_ids[:, 1:], found.prefix_ids[2:])
    expected = data.shape_of(data.lengths(batch), 3, 2, right=2)
    assert [(a.shape, a.dtype) for a in batch.pool[:5]] == list(expected.pool[:5])
    assert (batch.right_key.shape, batch.right_key.dtype) == expected.right_key


def test_rows_that_are_dropped_leave_the_negatives_of_others(tmp_path):
    """A passage that only a dropped row had, and another row brings; what only a dropped row brought is gone."""
    rows = [("x", "new", "an answer too long"), *ROWS]
    examples, _ = load_given(tmp_path, [["gone"], *GIVEN[:4], ["new", "who"]], rows)
    assert "gone" not in examples.passages and len(examples) == 5
    named = [[examples.passages[key] for key in row if key >= 0] for row in examples.negative_key]
    assert named == [["who", "cat"], ["barks"], [], [], ["new", "who"]]
    assert [examples.passages[key] for key in examples.passage_key] == [passage for _, passage, _ in ROWS]
    for i, text in enumerate(examples.passages):
        assert examples.prefixes[i].tolist() == [BOS, *text.encode()[:12]]


def test_what_is_given_changes_cache_and_fingerprint(tmp_path):
    first, _ = load_given(tmp_path)
    again, report = load_given(tmp_path)
    assert report.from_cache and data.fingerprint(first) == data.fingerprint(again)
    for change in ({"given": [["who"], *GIVEN[1:]]}, {"negatives": 1}):
        other, report = load_given(tmp_path, **change)
        assert data.fingerprint(other) != data.fingerprint(first), change
    assert not load_given(tmp_path, given=[["new"], *GIVEN[1:]])[1].from_cache


def test_shapes_hold_the_negatives(tmp_path):
    """Given ones count with the row that brings them; of mined ones a batch draws as many passages more."""
    rows = [(f"why {i}", f"the cat {i} " + "dog " * (20 * (i % 40 == 0)), "so") for i in range(400)]
    wide = dict(prompt=dataclasses.replace(PROMPT, passage_len=300), retriever=None)
    examples, _ = load(tmp_path, rows, **wide)
    assert len(data.buckets(examples, 2, 1)) == 2 and len(data.buckets(examples, 2, 1, negatives=30)) == 1
    small, large = data.buckets(examples, 2, 1)
    mined, batching = np.array([[-1, 3], [4, -1]]), data.Batching((small, large), negatives=2)
    assert data.lengths(data.collate(examples, [1, 2], batching, brought=mined)) == small
    batch = data.collate(examples, [1, 2], batching, brought=np.array([[-1, 3], [0, -1]]))
    assert data.lengths(batch) == large
    long = int(batch.pool.prefix_mask[1].sum(axis=1).max())
    assert long == examples.prefixes.lengths[0] > small.prefix
    read = [batch.suffix_mask.sum(), batch.pool.prefix_mask.sum() - 2]
    assert data.padding_share(batch, 1) == pytest.approx(1 - sum(read) / (2 * (3 * large.prefix + large.suffix)))
    given, _ = load_given(tmp_path, [[rows[0][1]] if i % 2 else [] for i in range(400)], rows, **wide)
    assert len(data.buckets(given, 2, 1, negatives=2)) == 1


def test_iteration_brings_what_was_mined(tmp_path):
    examples, _ = load(tmp_path)
    planned, mined = np.array([[0, 3], [4, 1]]), np.array([[[1, 3], [-1, 0]], [[2, 0], [3, 0]]], np.int32)
    settings = dict(batch_size=2, seed=0, start_step=5, total_steps=7, planned=planned, brought=mined)
    batching = data.Batching([data.longest(examples)], negatives=2)
    found = list(data.iterate(examples, batching, **settings))
    assert [batch.row.tolist() for batch in found] == planned.tolist()
    assert [batch.pool.key.tolist() for batch in found] == [[[0, 1, 3], [2, 0, -1]], [[3, 2, 0], [1, 3, 0]]]
    found = list(data.iterate(examples, dataclasses.replace(batching, group_size=2), **settings))
    # Of a group each passage is there once, the rows' own ones in any case.
    assert [batch.pool.key.tolist() for batch in found] == [[[0, 1, 3], [2, -1, -1]], [[3, 2, 0], [1, -1, -1]]]


def test_epochs_are_different_shuffles_of_all_rows():
    rows = data.order(10, 4, seed=0)
    stream = np.concatenate([rows[step] for step in range(25)])
    epochs = stream.reshape(10, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 10
    other = np.concatenate([data.order(10, 4, seed=1)[step] for step in range(25)])
    assert (stream != other).any()


def test_order_is_the_same_in_another_process_and_in_any_sequence():
    code = "from rag_jax import data; print([data.order(50, 8, 7)[step].tolist() for step in (11, 3, 0)])"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    rows = data.order(50, 8, 7)
    assert there.strip() == str([rows[step].tolist() for step in (11, 3, 0)])


def test_iteration_goes_on_where_it_stopped(tmp_path):
    examples, _ = load(tmp_path)
    settings, batching = dict(batch_size=2, seed=3, total_steps=40), data.Batching(data.buckets(examples, 2, 1))
    whole = list(data.iterate(examples, batching, start_step=0, **settings))
    rest = list(data.iterate(examples, batching, start_step=17, **settings))
    assert len(whole) == 40 and len(rest) == 23
    for left, right in zip(whole[17:], rest, strict=True):
        assert_equal(left, right)
    assert [batch.row.tolist() for batch in whole] == [data.order(5, 2, 3)[step].tolist() for step in range(40)]


def test_order_refuses_what_makes_no_batch():
    with pytest.raises(ValueError, match="batches of 6 cannot be made of 5 rows"):
        data.order(5, 6, 0)


def test_batches_take_the_smallest_shape_that_fits(tmp_path):
    rows = [(f"why {i}", f"the cat {i}", "so") for i in range(400)] + [("why " * 20, "dog " * 40, "x" * 60)]
    wide = dict(
        retriever=dataclasses.replace(RETRIEVER, query_len=60, passage_len=60),
        prompt=dataclasses.replace(PROMPT, passage_len=300, query_len=100, answer_len=80),
    )
    examples, _ = load(tmp_path, rows, **wide)
    shapes = data.buckets(examples, 4, 1)
    assert len(shapes) == 2 and shapes[1] == data.longest(examples)
    small = data.collate(examples, [0, 399, 7], data.Batching(shapes))
    large = data.collate(examples, [0, 400, 7], data.Batching(shapes))
    # <bos> + "the cat 399"; " Q:why 399" + " so" + <eos>; " so" + <eos>
    assert (small.pool.prefix_ids[:, 0].shape, small.suffix_ids.shape, small.answer_mask.shape) == (
        (3, 16),
        (3, 16),
        (3, 8),
    )
    # <bos> + "dog " 40 times; " Q:" + "why " 20 times + " " + 60 x + <eos>; " " + 60 x + <eos>
    assert (large.pool.prefix_ids[:, 0].shape, large.suffix_ids.shape, large.answer_mask.shape) == (
        (3, 168),
        (3, 152),
        (3, 64),
    )
    with pytest.raises(ValueError, match="no shape of"):
        data.collate(examples, [400], data.Batching(shapes[:1]))


def test_a_suffix_weighs_as_often_as_it_is_read(tmp_path):
    """A quarter of the answers is longer: for one candidate no shape of their own, for many there is."""
    rows = [(f"why {i}", f"the cat {i} " + "dog " * 30, "so " * (1 + 4 * (i % 4 == 0))) for i in range(64)]
    examples, _ = load(tmp_path, rows, prompt=dataclasses.replace(PROMPT, passage_len=200, answer_len=80))
    one, many = data.buckets(examples, 1, 1), data.buckets(examples, 1, 16)
    assert one[-1] == many[-1] == data.longest(examples)
    assert len(many) == 2 and many[0].suffix < many[1].suffix
    assert len(one) == 1, one


def test_rows_of_one_length_need_one_shape(tmp_path):
    examples, _ = load(tmp_path)
    assert data.buckets(examples, 4, 1) == (data.longest(examples),)


def test_padding_share_counts_what_the_models_read(tmp_path):
    examples, _ = load(tmp_path)
    batch = data.collate(examples, [0, 1, 2], data.Batching(data.buckets(examples, 4, 1)))
    read = [batch.query_mask, batch.pool.passage_mask, batch.pool.prefix_mask, *[batch.suffix_mask] * 5]
    real, all_ = (sum(f(mask) for mask in read) for f in (np.sum, np.size))
    assert data.padding_share(batch, 5) == pytest.approx(1 - real / all_)
    assert 0 < data.padding_share(batch, 1) < 1
    assert data.lengths(batch) == data.longest(examples)
