"""Metrics of rankings against ir-measures, intervals against what is known of them, answers against SQuAD by hand."""

import functools

import ir_measures
import numpy as np
import pytest
from command import TINY
from ir_measures import AP, RR, P, R, Success, nDCG

from rag_jax import config, pair
from rag_jax.evaluation import evaluation, metrics
from rag_jax.inference import search

THEIRS = {f"recall@{k}": R @ k for k in (1, 5, 10)} | {f"precision@{k}": P @ k for k in (1, 5, 10)}
THEIRS |= {f"hit_rate@{k}": Success @ k for k in (1, 5, 10)}
# RR @ 10 comes from another program, which orders equals the other way round: cut by hand.
THEIRS |= {"mrr@10": RR, "ndcg@10": nDCG @ 10, "map@100": AP @ 100}


def compare(queries, passages, query_key, relevant):
    """Both on all queries; among equal scores ir-measures puts the larger name first, so lower indices get those."""
    score, retrieved = search.top_k(queries, passages, 100)
    right = [sorted({int(p) for q, p in zip(*relevant, strict=True) if q == key}) for key in query_key]
    padded = np.array([row + [-1] * (max(map(len, right)) - len(row)) for row in right])
    hits, num_relevant = metrics.relevant_hits(retrieved, padded)
    ours = metrics.ranking(hits, num_relevant)
    names = [f"{999_999 - p:06}" for p in range(len(passages))]
    qrels = [ir_measures.Qrel(str(row), names[p], 1) for row, passages in enumerate(right) for p in passages]
    run = [
        ir_measures.ScoredDoc(str(row), names[p], float(s))
        for row in range(len(queries))
        for p, s in zip(retrieved[row], score[row], strict=True)
    ]
    theirs = {(m.query_id, m.measure): m.value for m in ir_measures.iter_calc(THEIRS.values(), qrels, run)}
    assert set(ours) == set(THEIRS) == {name for name, m in metrics.METRICS.items() if m.ranking}
    for name, measure in THEIRS.items():
        expected = [theirs[str(row), measure] for row in range(len(queries))]
        expected = [value if measure != RR or value >= 0.1 else 0.0 for value in expected]
        np.testing.assert_allclose(ours[name], expected, atol=1e-9, err_msg=name)
    return ours, score


@pytest.mark.parametrize(("num_passages", "each"), [(12, 1), (60, 3), (300, 14)])
def test_ranking_metrics_are_those_of_ir_measures(num_passages, each):
    """Scores are small whole numbers: nearly all of them have equals. Queries share rows, rows share passages."""
    rng = np.random.default_rng(num_passages)
    query_key = rng.integers(0, 20, 40)
    queries = rng.integers(-2, 3, (20, 3))[query_key].astype(np.float32)
    passages = rng.integers(-2, 3, (num_passages, 3)).astype(np.float32)
    keys = np.concatenate([np.arange(20), rng.integers(0, 20, 20 * (each - 1))])
    relevant = (keys, rng.integers(0, num_passages, len(keys)))
    ours, score = compare(queries, passages, query_key, relevant)
    assert (np.diff(score, axis=1) == 0).mean() > 0.5
    assert 0 < ours["mrr@10"].mean() < 1 and len(set(ours["map@100"])) > 5


@pytest.mark.slow
def test_real_rankings_too(real_models, tmp_path, monkeypatch):
    """MiniLM's of the project's rows, embeddings rounded to whole numbers: real neighbours, some of them equal."""
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path))
    overrides = {"retriever.path": str(real_models / "minilm"), "generator.path": None, "objective.name": "none"}
    opened = pair.open_pair(config.load(TINY, overrides))
    rows, _ = evaluation.load_rows(opened.config, opened.retriever_text, None)
    embed = functools.partial(search.embed, opened.model, pair.pretrained_params(opened), batch_size=16, label="")
    queries, passages = (
        np.round(16 * embed(tokens)) for tokens in (rows.examples.retriever_queries, rows.examples.retriever_passages)
    )
    query_key, passage_key = rows.examples.query_key, rows.examples.passage_key
    ours, score = compare(queries[query_key], passages, query_key, (query_key, passage_key))
    assert ours["recall@1"].mean() > 0.8 and (np.diff(score, axis=1) == 0).any()


def test_a_corpus_smaller_than_k_by_hand():
    hits, num_relevant = np.array([[False, True, True], [False, False, False]]), np.array([2, 1])
    found = metrics.ranking(hits, num_relevant)
    assert found["recall@1"].tolist() == [0, 0] and found["recall@10"].tolist() == [1, 0]
    np.testing.assert_allclose(found["precision@10"], [2 / 3, 0])  # of those retrieved
    assert found["mrr@10"].tolist() == [0.5, 0]
    ideal = 1 + 1 / np.log2(3)
    np.testing.assert_allclose(found["ndcg@10"], [(1 / np.log2(3) + 1 / 2) / ideal, 0])
    np.testing.assert_allclose(found["map@100"], [(1 / 2 + 2 / 3) / 2, 0])


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = {"rate": 0, "ratio": 0}
    for _ in range(100):
        lengths = rng.integers(1, 9, 80).astype(float)
        columns = {
            "eval/rate": ((rng.random(80) < 0.3).astype(float), np.ones(80)),
            "eval/ratio": (lengths * rng.normal(2.0, 1.0, 80), lengths),
        }
        values, intervals = metrics.summarise(columns)
        assert values["eval/ratio"] == pytest.approx(columns["eval/ratio"][0].sum() / lengths.sum())
        held["rate"] += intervals["eval/rate"][0] <= 0.3 <= intervals["eval/rate"][1]
        held["ratio"] += intervals["eval/ratio"][0] <= 2.0 <= intervals["eval/ratio"][1]
    assert all(86 <= number <= 99 for number in held.values()), held
    again = metrics.summarise(columns)[1]
    assert again == intervals
    few = metrics.summarise({"eval/em": (np.ones(3), np.ones(3)), **columns})[1]
    assert few["eval/em"] == [1, 1] and few["eval/rate"] == intervals["eval/rate"]


@pytest.mark.parametrize(
    ("answer", "gold", "em", "f1"),
    [
        ("The Cat!", "cat", 1, 1),
        ("a  red   fish", "red fish.", 1, 1),
        ("the red cat", "red fish", 0, 0.5),
        ("red red fish", "red fish", 0, 0.8),  # precision 2/3, recall 1
        ("", "cat", 0, 0),
        ("the", "a", 1, 1),
        ("theatre", "atre", 0, 0),
        ("u.s.", "US", 1, 1),
    ],
)
def test_exact_match_and_f1(answer, gold, em, f1):
    assert metrics.exact_match(answer, gold) == em
    assert metrics.f1(answer, gold) == pytest.approx(f1)


def test_a_metric_is_its_function_and_a_row(monkeypatch):
    def first_word(answer, gold):
        return float(answer.split()[:1] == gold.split()[:1])

    row = metrics.Metric("share of first words", True, frozenset({"generator", "answers"}), False, None, first_word)
    monkeypatch.setitem(metrics.METRICS, "first_word", row)
    found = metrics.answers(["a cat", "the dog"], [["a dog"], ["fox", "dog"]])
    assert found["first_word"].tolist() == [1, 0] and set(found) == {"em", "f1", "first_word"}
    assert metrics.definitions()["eval/first_word"] == "share of first words"
    assert "first_word" in metrics.needing("answers") and "first_word" not in metrics.needing("retriever")


def test_an_answer_is_looked_for_as_dpr_does():
    """Words in lower case with their accents taken apart, marks one by one; a part of a word is none."""
    passage = metrics.dpr_tokens("The Café, 3.5 km away\u00a0-- isn't it?")
    assert passage == ["the", "cafe\u0301", ",", "3", ".", "5", "km", "away", "-", "-", "isn", "'", "t", "it", "?"]
    for answer, held in (
        ("CAFÉ", True), ("cafe", False), ("3.5 km", True), ("5 km", True), ("km 5", False), ("is", False),
        ("isn't", True), ("it?", True), ("", False), ("the caf", False), ("it ? yes", False),
    ):  # fmt: skip
        assert metrics.holds(passage, metrics.dpr_tokens(answer)) == held, answer


def test_cut_offs_are_defined_once_and_every_metric_is():
    defined = metrics.definitions()
    assert {"eval/recall@k", "eval/hit_rate@k", "eval/precision@k", "eval/mrr@10", "eval/answer_nll_none"} <= set(
        defined
    )
    assert len(defined) == len(metrics.METRICS) - 2 * 5
    worse = {name for name, metric in metrics.METRICS.items() if not metric.higher_is_better}
    assert worse == {"answer_nll", "answer_nll_gold", "answer_nll_top1", "answer_nll_none", "retrieval_utility"}
