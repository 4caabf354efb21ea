"""Retrieval against numpy by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_jax import models, progress, rag
from rag_jax.data import segments
from rag_jax.distributed import sharding
from rag_jax.inference import search

BERT = models.BertConfig(61, 2, 2, 16, 32, 64, 2, 1e-12, "gelu", 0.0, 0.0)


def tiny_retriever():
    """A random one: its module, the composite around it, its parameters."""
    module = models.Bert(BERT, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    objective = rag.Objective("none", 1, 1.0, 1.0, 1.0, 0.0)
    return module, rag.Rag(objective, graphdef, None, "mean", 1), {"retriever": nnx.to_pure_dict(state)}


@pytest.fixture(scope="module")
def retriever():
    return tiny_retriever()


def test_embeddings_are_in_order_normalised_free_of_padding_and_counted(retriever, monkeypatch, capsys):
    module, model, params = retriever
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 61, length).tolist() for length in (3, 17, 1, 3, 30, 17, 1)]
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0)
    found = search.embed(model, params, segments.Ragged.of(texts), batch_size=3, label="texts")
    told = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == ["texts: 3 of 7", "texts: 6 of 7"]
    forward = jax.jit(lambda ids: module(ids, jnp.ones_like(ids, bool)))
    for text, emb in zip(texts, found, strict=True):
        hidden = np.asarray(forward(jnp.asarray([text])))[0]
        expected = hidden.mean(axis=0) / np.linalg.norm(hidden.mean(axis=0))
        np.testing.assert_allclose(emb, expected, atol=2e-6)


def whole_numbers(seed, *shape):
    """Small ones: sums are exact in any order, and many scores are equal."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


def by_numpy(queries, passages, k):
    scores = queries @ passages.T
    index = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    assert (np.diff(np.sort(scores, axis=1)) == 0).any()
    return np.take_along_axis(scores, index, axis=1), index


@pytest.fixture(params=[True, False], ids=["lies there", "read in blocks"])
def room(request, monkeypatch):
    """Whether several devices have memory for the corpus."""
    if not request.param:
        monkeypatch.setattr(search, "PLACED_BYTES", 0.0)
    return request.param


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize(("num_passages", "k"), [(40, 12), (39, 39), (5, 12), (1037, 7)])
def test_top_k_is_exact_in_blocks_and_ties_go_to_the_lower_index(monkeypatch, room, num_devices, num_passages, k):
    monkeypatch.setattr(search, "BLOCK_SCORES", 120)
    monkeypatch.setattr(search, "QUERIES_AT_A_TIME", 3)  # 10 is no multiple of 3
    monkeypatch.setattr(search, "RUN", 2)
    some = jax.devices()[:num_devices]
    monkeypatch.setattr(jax, "devices", lambda: some)
    queries, passages = whole_numbers(1, 10, 4), whole_numbers(2, num_passages, 4)
    expected = by_numpy(queries, passages, k)
    for recall_target in (1.0, 0.9):  # a CPU misses none of the latter, but promises nothing of equals
        score, index = search.top_k(queries, passages, k, recall_target=recall_target)
        np.testing.assert_array_equal(score, expected[0])
        if recall_target == 1:
            np.testing.assert_array_equal(index, expected[1])


@pytest.mark.parametrize("num_devices", [1, 8])
def test_what_scores_above_a_ceiling_is_passed_over(monkeypatch, room, num_devices):
    monkeypatch.setattr(search, "BLOCK_SCORES", 120)
    some = jax.devices()[:num_devices]
    monkeypatch.setattr(jax, "devices", lambda: some)
    queries, passages = whole_numbers(1, 10, 4), whole_numbers(2, 61, 4)
    at_most = np.linspace(-8, 4, 10)
    score, index = search.top_k(queries, passages, 20, at_most=at_most)
    scores = queries @ passages.T
    for row in range(10):
        kept = [p for p in np.argsort(-scores[row], kind="stable") if scores[row, p] <= at_most[row]][:20]
        assert index[row, : len(kept)].tolist() == kept and np.isneginf(score[row, len(kept) :]).all()
    assert np.isneginf(score).any() and not np.isneginf(score).all()


@pytest.mark.parametrize("num_devices", [1, 8])
def test_a_passage_that_is_nan_comes_last(monkeypatch, room, num_devices):
    """Whatever its place, in the first block or a later one, and a query that is NaN gets k passages too."""
    monkeypatch.setattr(search, "BLOCK_SCORES", 12)
    some = jax.devices()[:num_devices]
    monkeypatch.setattr(jax, "devices", lambda: some)
    for nan in (0, 2, 4):
        queries, passages = whole_numbers(1, 3, 4) + 0.5, whole_numbers(2, 5, 4)
        passages[nan, 1], queries[2, 0] = np.nan, np.nan
        others = np.delete(np.arange(5), nan)
        ranked = others[np.argsort(-(queries[:2] @ passages[others].T), axis=1, kind="stable")]
        for k in (3, 5):
            score, index = search.top_k(queries, passages, k)
            assert score.shape == index.shape == (3, k) and not np.isnan(score).any()
            np.testing.assert_array_equal(index[:2], np.insert(ranked, 4, nan, axis=1)[:, :k])
            assert set(index[2]) <= set(range(5)) and len(set(index[2])) == k


def test_a_corpus_is_laid_on_the_devices_once(monkeypatch):
    corpus, queries = whole_numbers(2, 1037, 4), whole_numbers(1, 10, 4)
    there = search.placed(corpus)
    assert isinstance(there, search.Placed) and len(there) == 1037 and search.placed(there) is there
    assert {shard.data.shape for shard in there.emb.addressable_shards} == {(130, 4)}
    monkeypatch.setattr(jax, "make_array_from_callback", refuse_the_corpus)
    np.testing.assert_array_equal(search.top_k(queries, there, 7)[1], by_numpy(queries, corpus, 7)[1])
    monkeypatch.setattr(search, "PLACED_BYTES", 100.0)
    assert isinstance(search.placed(corpus), search.Held)


def refuse_the_corpus(shape, *args, make=jax.make_array_from_callback):
    assert shape[0] < 1000
    return make(shape, *args)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_the_best_of_long_rows_are_those_of_a_sort(k):
    scores = whole_numbers(k, 5, 12345) + whole_numbers(k + 1, 5, 12345) / 8
    for array in (scores, -np.abs(scores), np.zeros_like(scores)):
        score, index = jax.jit(search.best_of_rows, static_argnums=1)(array, k)
        expected = np.argsort(-array, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(index, expected)
        np.testing.assert_array_equal(score, np.take_along_axis(array, expected, axis=1))


@pytest.mark.slow
def test_embeddings_are_the_same_from_a_mesh(retriever):
    _, model, params = retriever
    rng = np.random.default_rng(0)
    tokens = segments.Ragged.of([rng.integers(1, 61, length) for length in rng.integers(1, 30, 21)])
    alone = search.embed(model, params, tokens, batch_size=6, label="texts")
    for shape in ((2, 2, 2), (1, 8, 1), (1, 1, 8)):
        mesh = sharding.make_mesh(*shape)
        placed = jax.device_put(params, sharding.param_shardings(mesh, params))
        together = search.embed(model, placed, tokens, batch_size=6, label="texts")
        np.testing.assert_allclose(together, alone, atol=1e-6, err_msg=str(shape))


def test_k_is_cut_to_the_corpus():
    emb = np.eye(3, dtype=np.float32)
    _, index = search.top_k(emb, emb, 10)
    np.testing.assert_array_equal(index, [[0, 1, 2], [1, 0, 2], [2, 0, 1]])


def test_shapes_are_few():
    sizes = {search.size_for(n, 100) for n in range(1, 101)}
    assert sizes == {25, 50, 75, 100}
    assert all(search.size_for(n, largest) >= n for largest in (1, 2, 7, 64) for n in range(1, largest + 1))
