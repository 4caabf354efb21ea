"""Rows to examples: what cannot be used is counted and told."""

import csv

import pytest
from data_helpers import byte_tokenizer
from tokenizers import normalizers

from rag_jax import data
from rag_jax.errors import UserError

NOTHING = "\u200b"  # no white space, and a tokenizer may leave it out


def load(tmp_path, queries, template, **changes):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(NOTHING, "")
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("q", "p", "a"), *((q, f"passage {i}", "yes") for i, q in enumerate(queries))])
    options = {
        "key": "data.train",
        "columns": {"query": "q", "passage": "p", "answer": "a"},
        "bad_rows": "drop",
        "retriever": None,
        "prompt": data.Prompt(tokenizer, "{passage}", template, " {answer}", 20, 20, 20),
    }
    return data.load_examples(str(path), **options | changes)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path / "cache"))


def test_a_query_without_tokens_for_the_generator_is_dropped_and_counted(tmp_path):
    """Its last state, from which the answer's first token is predicted, would be that of another token."""
    queries = ["who?", NOTHING, "when?", NOTHING * 2]
    examples, report = load(tmp_path, queries, "{query}")
    assert examples.queries == ("who?", "when?") and report.rows == 2
    assert examples.prompt_queries is not None and examples.prompt_queries.lengths.tolist() == [4, 5]
    assert report.dropped == {"a query that has no tokens for the generator": 2}
    assert "dropped of 4: 2 with a query that has no tokens for the generator" in str(report)
    with pytest.raises(UserError, match="bad rows among 4: 2 with a query that has no tokens for the generator; fix"):
        load(tmp_path, queries, "{query}", bad_rows="refuse")


def test_the_prompts_own_text_makes_such_a_query_readable(tmp_path):
    examples, report = load(tmp_path, ["who?", NOTHING], "Q:{query}")
    assert len(examples) == 2 and not report.dropped


def test_a_row_with_two_faults_is_counted_once(tmp_path):
    prompt = data.Prompt(byte_tokenizer(), "{passage}", "{query}", " {answer}", 20, 20, 3)
    prompt.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(NOTHING, "")
    with pytest.raises(UserError, match="1 with a query that has no tokens.*, 1 with an answer longer") as error:
        load(tmp_path, ["who?", NOTHING], "{query}", prompt=prompt)
    assert "has 0 usable rows (2 read;" in str(error.value)
