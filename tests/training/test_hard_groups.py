"""Grouping of near rows: what must hold for any rows, and that groups are hard where rows allow it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_jax.training import hard_groups


def near_of(query_emb, passage_emb, query_key, passage_key, margin=None, num_neighbours=6):
    """With neighbours by a full sort, a row's own place left out."""
    affinity = query_emb @ passage_emb.T
    affinity = affinity + affinity.T
    np.fill_diagonal(affinity, -np.inf)
    neighbours = np.argsort(-affinity, axis=1, kind="stable")[:, : min(num_neighbours, len(affinity) - 1)]
    keys = (np.asarray(query_key, np.int32), np.asarray(passage_key, np.int32))
    return hard_groups.Near(query_emb, passage_emb, *keys, neighbours, margin)


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def random_near(num_rows, num_passages, seed, margin=None):
    rng = np.random.default_rng(seed)
    passage_key = rng.integers(0, num_passages, num_rows)
    passages = unit(rng.normal(size=(num_passages, 5)))
    query_emb = unit(passages[passage_key] + rng.normal(size=(num_rows, 5)))
    return near_of(query_emb, passages[passage_key], np.arange(num_rows), passage_key, margin)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(4, 40), st.integers(1, 20), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99),
    st.sampled_from([None, -0.2, 0.3]),
)  # fmt: skip
def test_rows_are_met_equally_often_and_passages_lie_apart(num_rows, num_passages, size, per_batch, seed, margin):
    near = random_near(num_rows, num_passages, seed, margin)
    batch_size = size * per_batch
    rng = np.random.default_rng(seed)
    met, stream = np.zeros(num_rows, np.int64), []
    for num_steps in (3, 1, 4):  # grouped anew in the middle of epochs
        rows = hard_groups.plan(near, met, group_size=size, batch_size=batch_size, num_steps=num_steps, rng=rng)
        assert rows.shape == (num_steps, batch_size) and rows.dtype == np.int32
        met += np.bincount(rows.ravel(), minlength=num_rows)
        stream.append(rows.ravel())
        assert met.max() - met.min() <= 1
    stream = np.concatenate(stream)
    for start in range(0, len(stream), num_rows):  # every epoch, the last one cut short
        epoch = stream[start : start + num_rows]
        assert len(np.unique(epoch)) == len(epoch)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 5), st.integers(1, 8), st.integers(0, 99), st.sampled_from([None, -0.2]))
def test_no_passage_stands_twice_in_a_group_where_that_can_be(size, num_groups, seed, margin):
    """The hardest case: some passages with as many rows as there are groups."""
    rng = np.random.default_rng(seed)
    counts, passage_key = [], []
    while sum(counts) < size * num_groups:
        counts.append(min(int(rng.integers(1, num_groups + 1)), size * num_groups - sum(counts)))
        passage_key += [len(counts) - 1] * counts[-1]
    passage_key = np.array(passage_key)
    query_emb, passages = (unit(rng.normal(size=(len(passage_key), 4))) for _ in range(2))
    near = near_of(query_emb, passages[passage_key], np.arange(len(passage_key)), passage_key, margin)
    found = hard_groups.regroup(near, np.arange(len(passage_key)), [], size, rng)
    assert len(found) == num_groups
    for group in found:
        assert len(set(passage_key[group])) == size


def clusters(num_clusters, each, spread=0.3, seed=0, margin=None):
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(num_clusters, 16)))
    topic = rng.permutation(np.repeat(np.arange(num_clusters), each))
    query_emb, passage_emb = (unit(centres[topic] + spread * rng.normal(size=(len(topic), 16)) / 4) for _ in range(2))
    n = np.arange(len(topic))
    return near_of(query_emb, passage_emb, n, n, margin, num_neighbours=12), topic


def test_groups_are_the_clusters_and_batches_are_mixed():
    near, topic = clusters(20, 8)
    rows = hard_groups.plan(
        near, np.zeros(160, np.int64), group_size=4, batch_size=16, num_steps=10, rng=np.random.default_rng(0)
    )
    by_group = topic[rows.reshape(-1, 4)]
    assert (by_group == by_group[:, :1]).all()
    assert np.mean([len(set(batch[::4])) for batch in topic[rows]]) > 3  # four groups of a batch, seldom of one topic
    again = hard_groups.plan(
        near, np.zeros(160, np.int64), group_size=4, batch_size=16, num_steps=10, rng=np.random.default_rng(0)
    )
    other = hard_groups.plan(
        near, np.zeros(160, np.int64), group_size=4, batch_size=16, num_steps=10, rng=np.random.default_rng(1)
    )
    np.testing.assert_array_equal(rows, again)
    assert (rows != other).any()
    random = np.random.default_rng(5).permutation(160).reshape(-1, 4)
    hard, easy = hard_groups.hardness(near, rows.reshape(-1, 4)), hard_groups.hardness(near, random)
    assert hard["similarity"] > easy["similarity"] + 0.5
    assert hard["not_first"] > 2 * easy["not_first"] > 0


def test_hardness_by_hand():
    query_emb = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    passage_emb = np.array([[1, 0], [1, 0], [0.6, 0.8], [0.6, 0.8]], np.float32)
    near = near_of(query_emb, passage_emb, [0, 1, 2, 3], [0, 0, 1, 1])
    # Row 0 meets .6; row 1 has 0 itself and meets .8; row 2 has .6 and meets 1; row 3 has .8 and meets 0.
    found = hard_groups.hardness(near, np.array([[0, 2], [1, 3]]))
    assert found["not_first"] == 0.5
    assert found["similarity"] == pytest.approx((0.6 + 1 + 0.8 + 0) / 4)
    assert hard_groups.hardness(near, np.array([[0, 1]])) == {"similarity": 0.0, "not_first": 0.0}


def test_likely_positives_are_kept_apart_and_counted():
    """Rows 0 and 1: query 0 likes passage 1 better than its own by .3. Others are far from both."""
    passages = unit(np.array([[1, 0.5, 0], [1, 0, 0], [0, 0, 1], [0, 0.2, 1]]))
    queries = unit(np.array([[1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1]]))
    keys = np.arange(4)
    gap = float(queries[0] @ passages[1] - queries[0] @ passages[0])
    for margin, apart in ((None, False), (gap + 0.01, False), (gap - 0.01, True)):
        near = near_of(queries, passages, keys, keys, margin)
        first, *_ = hard_groups.regroup(near, keys[1:], [0], 2, np.random.default_rng(0))
        assert (first != [0, 1]) == apart, margin
        assert hard_groups.masked_shares(near)["margin"] == pytest.approx(apart * 2 / 12)  # seen from both sides
        assert hard_groups.masked_shares(near)["identity"] == 0
    same = near_of(queries, passages, [0, 0, 1, 2], [0, 1, 2, 2], None)
    assert hard_groups.masked_shares(same)["identity"] == pytest.approx(4 / 12)
