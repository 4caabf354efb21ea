"""The composite against full sequences: one (query, passage) string at a time, no prefix shared, no chunk, no group."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rag_jax import data, losses, models, objectives, rag
from rag_jax.data.batches import fill_slots
from rag_jax.data.shapes import block_tokens
from rag_jax.models import BertConfig, Gpt2Config, LlamaConfig, adapters, head

BERT = BertConfig(61, 2, 2, 16, 32, 64, 2, 1e-12, "gelu", 0.0, 0.0)
GENERATORS = {
    "gpt2": Gpt2Config(67, 2, 2, 16, 32, 64, 1e-5, "gelu_tanh", 0.0, 0.0, 0.0),
    "llama": LlamaConfig(
        67, 2, 4, 2, 8, 16, 32, 64, 1e-5, 1e4, None, "silu", False, False, False, True, False, None, 0.0
    ),
    "mistral": LlamaConfig(
        67, 2, 4, 2, 8, 16, 32, 64, 1e-5, 1e4, None, "silu", True, False, False, False, True, 6, 0.0
    ),
}
LP, LQ, T = 9, 5, 4


def make_rows(num_rows, seed=0, passages=None, prefix_room=0, suffix_room=0, negatives=None, group_size=4):
    """Ragged rows; `passages` says which passage each row carries (rows may share one), `negatives` which it brings."""
    rng = np.random.default_rng(seed)
    passages = np.arange(num_rows) if passages is None else np.asarray(passages)

    def padded(lengths, ids, room=0):
        width = ids.shape[1] + room
        mask = np.arange(width) < lengths[:, None]
        ids = np.pad(ids, ((0, 0), (0, room)))
        return jnp.asarray(np.where(mask, ids, 0), jnp.int32), jnp.asarray(mask)

    distinct = passages.max() + 1 if negatives is None else max(passages.max(), np.max(negatives)) + 1
    passage = padded(rng.integers(3, 9, distinct), rng.integers(1, 61, (distinct, 8)))
    prefix = padded(rng.integers(4, LP + 1, distinct), rng.integers(1, 67, (distinct, LP)), prefix_room)
    query_lengths, answer_lengths = rng.integers(2, LQ + 1, num_rows), rng.integers(1, T + 1, num_rows)
    suffix = padded(query_lengths + answer_lengths, rng.integers(1, 67, (num_rows, LQ + T)), suffix_room)
    query = padded(rng.integers(2, 7, num_rows), rng.integers(1, 61, (num_rows, 6)))
    if negatives is not None:
        negatives = np.asarray(negatives).reshape(-1, group_size, np.shape(negatives)[1])
    right = passages.reshape(-1, group_size, 1)
    slots = 1 if negatives is None else 1 + negatives.shape[2]
    key = np.concatenate(
        [
            fill_slots(own.tolist(), [[] for _ in own] if negatives is None else negatives[i].tolist(), slots)
            for i, own in enumerate(right)
        ]
    )
    there = key[:, :, None] >= 0
    texts = (jnp.where(there, a[key], (jnp.arange(a.shape[1]) == 0).astype(a.dtype)) for a in (*passage, *prefix))
    return data.Batch(
        jnp.arange(num_rows),
        jnp.arange(num_rows),
        jnp.asarray(passages)[:, None],
        *query,
        *suffix,
        jnp.asarray(query_lengths, jnp.int32),
        jnp.asarray(np.arange(T) < answer_lengths[:, None]),
        string_ids=None,
        string_mask=None,
        string_answer_start=None,
        pool=data.Pool(jnp.asarray(key), *texts),
    )


def make_model(config, seed, dtype="float32"):
    graphdef, shapes = models.abstract(dataclasses.replace(config, computing=models.Computing(dtype)))
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        # Livelier than at random; with much more, answers get so unlikely that float32 leaves few digits of them.
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.2, shape.shape), shape.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, shapes)


def make(generator="llama", dtype="float32", **objective):
    retriever, retriever_params = make_model(BERT, 1, dtype)
    graphdef, params = make_model(GENERATORS[generator], 2, dtype)
    settings = dict(
        name="token",
        candidates=4,
        temperature=0.1,
        marginal_temperature=0.5,
        contrastive_weight=0.7,
        marginal_weight=1.3,
    )
    model = rag.Rag(rag.Objective(**settings | objective), retriever, graphdef, "mean", 4, jnp.dtype(dtype))
    return model, {"retriever": retriever_params, "generator": params}


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_contrastive_loss_is_summed_over_leading_widths(similarity):
    """Those of embeddings that are cut there; values and gradients."""
    model, params = make(name="none", contrastive_weight=1.0)
    model, rows = dataclasses.replace(model, similarity=similarity), make_rows(8)

    def loss(of, params):
        return rag.loss(of, params, rows, None)[0]

    gradient = jax.value_and_grad(loss, 1)
    found = gradient(dataclasses.replace(model, matryoshka_dims=(10, 3)), params)
    each = [gradient(dataclasses.replace(model, truncate_dim=width), params) for width in (16, 10, 3)]
    wanted = jax.tree.map(lambda *of: sum(of), *each)
    for got, expected in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert float(found[0]) > 1.5 * float(each[0][0])


def right_slots(rows, group_size):
    """Of each row, the slots of its group that hold a passage which is known to answer its query."""
    keys, slots = np.asarray(rows.pool.key).ravel(), rows.pool.key.shape[1]
    return [
        [j for j, key in enumerate(keys) if key in right and key >= 0 and j // (slots * group_size) == i // group_size]
        for i, right in enumerate(np.asarray(rows.right_key).tolist())
    ]


def candidates_by_hand(cosine, rows, group_size, num_candidates):
    """What is right first, then the other passages of the group by falling score; as many as there are."""
    keys, slots, chosen = np.asarray(rows.pool.key).ravel(), rows.pool.key.shape[1], []
    for i, right in enumerate(right_slots(rows, group_size)):
        group = range(i // group_size * group_size * slots, (i // group_size + 1) * group_size * slots)
        may = [True] * len(keys) if rows.readable is None else np.tile(np.asarray(rows.readable[i]), len(keys))
        others = [j for j in group if keys[j] >= 0 and j not in right and may[j - group[0]]]
        by_score = functools.partial(sorted, key=lambda j: -float(cosine[i, j]))
        chosen.append((by_score(right) + by_score(others))[:num_candidates])
    return chosen


def contrastive_by_hand(scores, rows, group_size=4, out=None):
    """Sums of exponentials: each passage of the batch once, none that is known to answer the query, or is `out`."""
    keys, total = np.asarray(rows.pool.key).ravel(), 0.0
    known = [set(right) - {-1} for right in np.asarray(rows.right_key).tolist()]
    out = known if out is None else out
    first = [j for j, key in enumerate(keys) if key >= 0 and key not in keys[:j]]
    labelled = [i for i, right in enumerate(right_slots(rows, group_size)) if right]
    for i in labelled:
        own = right_slots(rows, group_size)[i]
        wrong = [j for j in first if keys[j] not in out[i]]
        weights = jnp.exp(scores)
        total -= jnp.log(weights[i, np.array(own)].sum() / weights[i, np.array(own + wrong)].sum())
        for j in own:
            askers = [i, *(other for other in range(len(known)) if known[other] and keys[j] not in out[other])]
            total -= jnp.log(weights[i, j] / weights[np.array(askers), j].sum()) / len(own)
    return total / (2 * len(labelled))


def reference(model, params, rows):
    """Loss and gradients with one full [passage][query][answer] sequence a pair, and all logits."""
    objective = model.objective
    prefix_ids, prefix_mask = (np.asarray(a).reshape(-1, a.shape[-1]) for a in rows.pool[3:5])
    cosine_of = functools.partial(cosines_by_hand, model, rows=rows)

    cosine = np.asarray(jax.jit(cosine_of)(params))
    chosen = candidates_by_hand(cosine, rows, model.group_size, objective.candidates)
    sequences, targets = [], []
    for i, row in enumerate(chosen):
        for j in row:
            prefix = prefix_ids[j][: prefix_mask[j].sum()]
            start, length = int(rows.answer_start[i]), int(rows.answer_mask[i].sum())
            sequences.append(np.concatenate([prefix, np.asarray(rows.suffix_ids[i])[: start + length]]))
            targets.append([len(prefix) + start + min(t, length - 1) for t in range(T)])
    lengths = np.array([len(s) for s in sequences])
    ids = np.stack([np.pad(s, (0, lengths.max() - len(s))) for s in sequences]).astype(np.int32)
    mask = jnp.asarray(np.arange(lengths.max()) < lengths[:, None])
    pair, target = np.arange(len(sequences))[:, None], np.array(targets)
    answer = rows.answer_mask[:, None, :]

    def loss(params):
        cosine = cosine_of(params)
        contrastive = contrastive_by_hand(cosine / objective.temperature, rows, model.group_size)
        generator = nnx.merge(model.generator, params["generator"])
        log_probs = jax.nn.log_softmax(generator.logits(generator(jnp.asarray(ids), mask)))
        gold = log_probs[pair, target - 1, ids[pair, target]].reshape(len(chosen), -1, T)
        prior = jax.nn.log_softmax(
            jnp.take_along_axis(cosine, np.array(chosen), axis=1) / objective.marginal_temperature
        )
        if objective.name == "sequence":
            total = jnp.log(jnp.exp(prior + (gold * answer).sum(-1)).sum(1)).sum()
        else:
            total = (jnp.log(jnp.exp(prior[:, :, None] + gold).sum(1)) * answer[:, 0]).sum()
        return objective.contrastive_weight * contrastive - objective.marginal_weight * total / answer.sum()

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_trees_close(got, expected, tolerance):
    """Every tensor by its norm, but none by less than a hundredth of its model's: what cancels keeps its rounding."""
    for model in expected:
        floor = 1e-2 * float(optax.tree.norm(expected[model]))
        pairs = zip(*(jax.tree_util.tree_leaves_with_path(tree[model]) for tree in (got, expected)), strict=True)
        errors = [
            (float(jnp.linalg.norm(a - b) / max(jnp.linalg.norm(b), floor)), jax.tree_util.keystr(path))
            for (path, a), (_, b) in pairs
        ]
        assert max(errors)[0] < tolerance, (model, max(errors))


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(model, params, rows, key=None):
    return jax.value_and_grad(lambda p: rag.loss(model, p, rows, key)[0])(params)


@pytest.mark.parametrize(
    ("generator", "name", "candidates", "group_size"),
    [
        ("gpt2", "sequence", 2, 4),
        ("llama", "token", 8, 8),
        pytest.param("gpt2", "token", 4, 4, marks=pytest.mark.soak),
        pytest.param("llama", "token", 2, 4, marks=pytest.mark.soak),
        pytest.param("mistral", "sequence", 4, 4, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_equal_full_sequences(generator, name, candidates, group_size):
    model, params = make(generator, name=name, candidates=candidates)
    model = dataclasses.replace(model, group_size=group_size)
    rows = make_rows(8)
    loss, gradients = value_and_grad(model, params, rows)
    expected, expected_gradients = reference(model, params, rows)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_trees_close(gradients, expected_gradients, 1e-5)


@pytest.mark.parametrize("generator", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_duplicate_passages_are_read_last_and_never_negatives(generator):
    model, params = make(generator, candidates=2)
    rows = make_rows(8, passages=[0, 1, 0, 2, 3, 3, 3, 4])
    loss, gradients = value_and_grad(model, params, rows)
    expected, expected_gradients = reference(model, params, rows)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_trees_close(gradients, expected_gradients, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["token", "sequence"])
def test_a_second_copy_of_a_passage_takes_no_probability(name):
    """Groups of four with three distinct passages: a fourth candidate can only be a copy."""
    rows = make_rows(8, passages=[0, 1, 0, 2, 3, 4, 3, 5])
    model, params = make(name=name, candidates=3)
    loss, gradients = value_and_grad(model, params, rows)
    every, _ = make(name=name, candidates=4)
    again, again_gradients = value_and_grad(every, params, rows)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    assert_trees_close(again_gradients, gradients, 1e-5)


# Row 1 brings row 3's passage, row 3 what row 2 brings too, row 5 one passage, rows 0 and 4 none; 6 brings of group 0.
NEGATIVES = [[-1, -1], [3, 9], [10, 11], [11, 12], [-1, -1], [13, -1], [14, 0], [9, 15]]


@pytest.mark.parametrize(
    ("generator", "name", "candidates", "group_size", "passages"),
    [
        pytest.param("gpt2", "token", 6, 4, [0, 1, 0, 3, 4, 4, 4, 5], marks=pytest.mark.slow),
        pytest.param("llama", "sequence", 3, 4, range(8), marks=pytest.mark.soak),
        pytest.param("llama", "token", 9, 8, range(8), marks=pytest.mark.slow),
    ],
)
def test_negatives_that_queries_bring(generator, name, candidates, group_size, passages):
    model, params = make(generator, name=name, candidates=candidates, negatives=2)
    model = dataclasses.replace(model, group_size=group_size, chunk_size=3)
    rows = make_rows(8, passages=list(passages), negatives=NEGATIVES, group_size=group_size)
    loss, gradients = value_and_grad(model, params, rows)
    expected, expected_gradients = reference(model, params, rows)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_trees_close(gradients, expected_gradients, 1e-5)


@pytest.mark.slow
def test_each_negative_counts_in_both_losses_and_none_that_is_not_there():
    """The controls: other passages change either loss; where nothing is brought, all is as if nothing could be."""
    (model, params), (wide, _) = make(candidates=4), make(candidates=12, negatives=2)
    all_parts = jax.jit(lambda rows: rag.loss(wide, params, rows, None)[1])
    some = [[13, 14], [14, 13], [13, 12], [12, 11], [11, 10], [10, 9], [9, 8], [8, 15]]  # 15 once, the others twice
    one, other = (all_parts(make_rows(8, negatives=negatives)) for negatives in (some, [*some[:-1], [8, -1]]))
    for name in ("loss/contrastive", "loss/marginal"):
        assert abs(float(one[name] - other[name])) > 1e-4, name
    # More candidates than passages: what is read in an empty place has no weight.
    loss, gradients = value_and_grad(wide, params, make_rows(8, negatives=[[-1, -1]] * 8))
    expected, expected_gradients = value_and_grad(model, params, make_rows(8))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert_trees_close(gradients, expected_gradients, 1e-5)


def listwise_reference(model, params, rows):
    """Loss and gradients of a listwise objective: every pair is one full sequence, and all logits are there."""
    objective, B, Ls = model.objective, len(rows.row), rows.suffix_ids.shape[1]
    prefix_ids, prefix_mask = (np.asarray(a).reshape(-1, a.shape[-1]) for a in rows.pool[3:5])
    sizes, after = prefix_mask.sum(1), np.asarray(rows.suffix_mask.sum(1))
    cosine = np.asarray(jax.jit(functools.partial(cosines_by_hand, model, rows=rows))(params))
    chosen = np.array(candidates_by_hand(cosine, rows, 4, objective.candidates))
    K = chosen.shape[1]
    ids = np.zeros((B * K, sizes.max() + Ls), np.int32)
    lengths = np.zeros(B * K, int)
    for n, (i, j) in enumerate((i, j) for i, row in enumerate(chosen) for j in row):
        whole = [*prefix_ids[j][: sizes[j]], *np.asarray(rows.suffix_ids[i])[: after[i]]]
        ids[n, : len(whole)], lengths[n] = whole, len(whole)
    starts, targets = sizes[chosen].reshape(-1), np.arange(1, Ls)
    at = np.minimum(starts[:, None] + targets, ids.shape[1] - 1)

    def suffix_log_probs(params):  # (B, K, Ls - 1) of its tokens but the first
        generator = nnx.merge(model.generator, params["generator"])
        mask = jnp.asarray(np.arange(ids.shape[1]) < lengths[:, None])
        log_probs = jax.nn.log_softmax(generator.logits(generator(jnp.asarray(ids), mask)))
        pair = np.arange(B * K)[:, None]
        return log_probs[pair, at - 1, ids[pair, at]].reshape(B, K, Ls - 1)

    is_question = np.asarray(targets < np.asarray(rows.answer_start)[:, None])
    is_answer = ~is_question & (targets < after[:, None])
    masks = {"answer": [is_answer], "question": [is_question], "both": [is_answer, is_question]}[objective.evidence]
    said = np.asarray(jax.jit(suffix_log_probs)(params), np.float64)
    sums = [np.where(m[:, None], said, 0.0).sum(-1) for m in masks]
    if objective.name == "emdr2":
        evidence = sum(sums)
    else:
        evidence = sum(sums) / sum(m.sum(1) for m in masks)[:, None] / objective.evidence_temperature
    target = np.exp(evidence) / np.exp(evidence).sum(1, keepdims=True)
    is_right = np.array([[j in right for j in row] for right, row in zip(right_slots(rows, 4), chosen, strict=True)])
    label = is_right / np.maximum(is_right.sum(1, keepdims=True), 1)
    share = objective.label_share * is_right.any(1, keepdims=True)
    target = share * label + (1 - share) * target

    def loss(params):
        cosine = cosines_by_hand(model, params, rows=rows)
        p = jax.nn.softmax(jnp.take_along_axis(cosine, chosen, axis=1) / objective.marginal_temperature, axis=1)
        match objective.name:
            case "pdist":
                nats = (target * (np.log(target) - jnp.log(p))).sum(1)
            case "replug":
                nats = (p * (jnp.log(p) - np.log(target))).sum(1)
            case "emdr2":
                nats = -(1 - share[:, 0]) * jnp.log((p * np.exp(evidence)).sum(1))
                nats -= share[:, 0] * (label * jnp.log(p)).sum(1)
        prior = jnp.log(jnp.where(is_right.any(1, keepdims=True), label, jax.lax.stop_gradient(p)))
        by_token = suffix_log_probs(params)
        if objective.formula.likelihood == "token":
            own = jnp.where(is_answer, jnp.log(jnp.exp(prior[:, :, None] + by_token).sum(1)), 0.0)
        else:
            own = jnp.log(jnp.exp(prior + jnp.where(is_answer[:, None], by_token, 0.0).sum(-1)).sum(1))
        own = own.sum() / is_answer.sum()
        contrastive = contrastive_by_hand(cosine / objective.temperature, rows)
        return (
            objective.contrastive_weight * contrastive
            + objective.evidence_weight * nats.mean()
            - objective.marginal_weight * own
        )

    return jax.jit(jax.value_and_grad(loss))(params)


def cosines_by_hand(model, params, rows):
    retriever = nnx.merge(model.retriever, params["retriever"])

    def embed(ids, mask):
        sums = (retriever(ids, mask) * mask[:, :, None]).sum(axis=1)
        return sums / jnp.sqrt((sums**2).sum(axis=1, keepdims=True))

    pool = (a.reshape(-1, a.shape[-1]) for a in (rows.pool.passage_ids, rows.pool.passage_mask))
    return embed(rows.query_ids, rows.query_mask) @ embed(*pool).T


LISTWISE = [
    pytest.param("gpt2", {"name": "pdist", "evidence": "both", "label_share": 0.3}, id="pdist", marks=pytest.mark.slow),
    pytest.param("llama", {"name": "replug", "evidence": "answer"}, id="replug", marks=pytest.mark.soak),
    pytest.param("mistral", {"name": "emdr2", "evidence": "question"}, id="emdr2", marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("generator", "objective"), LISTWISE)
def test_listwise_objectives_equal_full_sequences(generator, objective):
    model, params = make(generator, candidates=3, evidence_temperature=0.5, evidence_weight=1.7, **objective)
    rows = make_rows(8)
    loss, gradients = value_and_grad(model, params, rows)
    expected, expected_gradients = listwise_reference(model, params, rows)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_trees_close(gradients, expected_gradients, 1e-5)


@pytest.mark.slow
def test_of_a_frozen_generator_the_retriever_learns_the_same():
    model, params = make(name="pdist", candidates=3)
    loss, gradients = value_and_grad(model, params, make_rows(8))
    again, again_gradients = value_and_grad(dataclasses.replace(model, trains_generator=False), params, make_rows(8))
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    assert_trees_close({"retriever": again_gradients["retriever"]}, {"retriever": gradients["retriever"]}, 1e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(again_gradients["generator"]))


def test_the_marginal_alone_trains_the_retriever():
    model, params = make(contrastive_weight=0.0)
    _, gradients = value_and_grad(model, params, make_rows(8))
    assert all(float(jnp.linalg.norm(g)) > 0 for g in jax.tree.leaves(gradients["retriever"]["layers"]["mlp"]))
    assert all(float(jnp.linalg.norm(g)) > 0 for g in jax.tree.leaves(gradients["generator"]["layers"]["mlp"]))


@pytest.mark.slow
def test_dalm_teaches_the_generator_nothing_about_retrieval():
    """With another retriever the generator's gradients are the same, as they are not of a marginal."""
    moved = {}
    for name in ("dalm", "token"):
        model, params = make(name=name, contrastive_weight=0.0)
        rows = make_rows(8)
        strings = {
            "string_ids": rows.suffix_ids,
            "string_mask": rows.suffix_mask,
            "string_answer_start": rows.answer_start - 1,
        }
        batch = data.Batch(**{"row": jnp.arange(8)} | rows._asdict() | strings)
        other = params | {"retriever": jax.tree.map(lambda a: a * 0.9, params["retriever"])}
        one, two = (value_and_grad(model, p, batch)[1]["generator"]["norm"]["scale"] for p in (params, other))
        moved[name] = float(jnp.linalg.norm(one - two) / jnp.linalg.norm(one))
    assert moved["dalm"] < 1e-6 < 1e-4 < moved["token"]


@pytest.mark.parametrize("name", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
def test_padding_changes_nothing(name):
    model, params = make(name=name)
    loss, gradients = value_and_grad(model, params, make_rows(8))
    padded, padded_gradients = value_and_grad(model, params, make_rows(8, prefix_room=6, suffix_room=3))
    np.testing.assert_allclose(padded, loss, rtol=1e-6)
    assert_trees_close(padded_gradients, gradients, 1e-5)


@pytest.mark.slow
def test_head_chunks_change_nothing():
    model, params = make()
    rows = make_rows(8)
    loss, gradients = value_and_grad(model, params, rows)
    chunked, chunked_gradients = value_and_grad(dataclasses.replace(model, head_chunk=7), params, rows)
    np.testing.assert_allclose(chunked, loss, rtol=1e-6)
    assert_trees_close(chunked_gradients, gradients, 1e-5)


@pytest.mark.parametrize("scale", [1.0, 3e3])
@pytest.mark.parametrize("chunk", [2, 512])
def test_gold_log_probs_against_numpy(chunk, scale):
    """Chunks that do not divide the tokens, one larger than all; logits of thousands."""
    rng = np.random.default_rng(0)
    hidden, kernel, ids = rng.normal(size=(5, 8)), scale * rng.normal(size=(8, 7)), np.array([0, 6, 3, 3, 1])

    def total(hidden, kernel):
        log_probs = head.gold_log_probs(hidden, kernel.T, jnp.asarray(ids, jnp.int32), chunk)
        return jnp.sum(log_probs), log_probs

    inputs = (jnp.asarray(hidden, jnp.float32), jnp.asarray(kernel, jnp.float32))
    gradients, log_probs = jax.grad(total, (0, 1), has_aux=True)(*inputs)
    logits = hidden @ kernel
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    probs = shifted / shifted.sum(-1, keepdims=True)
    expected = logits - logits.max(-1, keepdims=True) - np.log(shifted.sum(-1, keepdims=True))
    cotangent = np.eye(7)[ids] - probs
    np.testing.assert_allclose(log_probs, expected[np.arange(5), ids], rtol=1e-4, atol=1e-5)
    for got, by_hand in zip(gradients, (cotangent @ kernel.T, hidden.T @ cotangent), strict=True):
        np.testing.assert_allclose(got, by_hand, rtol=1e-4, atol=1e-4 * np.abs(by_hand).max())


@pytest.mark.slow
@pytest.mark.parametrize("at_a_time", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_groups_that_are_read_together_change_nothing(at_a_time):
    """Two of three groups, so that the last block is filled up, and all; with negatives, dropout and a tied head."""
    model, params = make("gpt2", candidates=6, negatives=2)
    model, rows = with_dropout(model), make_rows(12, negatives=np.random.default_rng(0).integers(-1, 20, (12, 2)))
    loss, gradients = value_and_grad(model, params, rows, jax.random.key(5))
    together = dataclasses.replace(model, groups_at_a_time=at_a_time)
    again, again_gradients = value_and_grad(together, params, rows, jax.random.key(5))
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    assert_trees_close(again_gradients, gradients, 1e-5)


def packed_rows(rows, blocks, spare=2):
    """The rows with as many tokens packed as their fullest block has, and some padding."""
    slots = {"passage": rows.pool.passage_mask, "prefix": rows.pool.prefix_mask}
    masks = {"query": rows.query_mask, "suffix": rows.suffix_mask, "answer": rows.answer_mask} | slots
    of_rows = {name: np.asarray(mask).reshape(1, len(rows.row), -1).sum(axis=2) for name, mask in masks.items()}
    tokens = {name: int(most[0]) + spare for name, most in block_tokens(blocks, of_rows).items()}
    return rows._replace(packed=data.Packed(**tokens, **blocks.num_rows(len(rows.row))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generator", "objective", "at_a_time"),
    [
        ("gpt2", dict(candidates=6, negatives=2), 2),
        ("mistral", dict(name="pdist", evidence="both", candidates=3), 3),
        ("llama", dict(name="emdr2", candidates=3), 1),
        ("llama", dict(candidates=1), 1),
    ],
    ids=["token", "evidence of both", "emdr2", "one candidate"],
)
def test_rows_that_are_packed_change_nothing(generator, objective, at_a_time):
    """One block or several, the last filled up; with dropout where the family has some, and negatives."""
    model, params = make(generator, **objective)
    model = dataclasses.replace(model, groups_at_a_time=at_a_time)
    negatives = np.random.default_rng(0).integers(-1, 20, (12, 2)) if "negatives" in objective else None
    rows, key = make_rows(12, negatives=negatives, prefix_room=4, suffix_room=3), None
    if generator == "gpt2":
        model, key = with_dropout(model), jax.random.key(5)
    loss, gradients = value_and_grad(model, params, rows, key)
    together = packed_rows(rows, data.Blocks(4, 1, at_a_time))
    again, again_gradients = value_and_grad(model, params, together, key)
    np.testing.assert_allclose(again, loss, rtol=2e-6)
    assert_trees_close(again_gradients, gradients, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "computing",
    [models.Computing(remat="full"), models.Computing(remat="dots", unrolls=True)],
    ids=["remat", "unrolled"],
)
def test_how_layers_are_computed_changes_nothing(computing):
    model, params = make("gpt2")
    rows = make_rows(8)
    loss, gradients = value_and_grad(model, params, rows)
    configs = (dataclasses.replace(config, computing=computing) for config in (BERT, GENERATORS["gpt2"]))
    retriever, generator = (models.abstract(config)[0] for config in configs)
    other = dataclasses.replace(model, retriever=retriever, generator=generator)
    again, again_gradients = value_and_grad(other, params, rows)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    assert_trees_close(again_gradients, gradients, 1e-5)


def test_candidates_are_the_positive_and_the_best_distinct_others():
    cosine = jnp.asarray([[0.1, 0.9, 0.5, 0.9], [0.2, 0.3, 0.4, 0.5], [0.0, 0.1, 0.2, 0.3], [0.9, 0.8, 0.7, 0.0]])
    keys, right = jnp.asarray([5, 6, 7, -1]), jnp.asarray([[5, -1], [6, 9], [6, 7], [-1, -1]])
    known = rag.known_right(right, keys)
    np.testing.assert_array_equal(known, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    got = rag.choose_candidates(jnp.where(keys >= 0, cosine, -jnp.inf), known, 3)
    np.testing.assert_array_equal(got, [[0, 1, 2], [1, 2, 0], [2, 1, 0], [0, 1, 2]])


def test_first_copies_against_a_loop():
    keys = np.random.default_rng(0).integers(-1, 9, 40)
    np.testing.assert_array_equal(rag.first_copies(jnp.asarray(keys)), [k not in keys[:i] for i, k in enumerate(keys)])


# Row 0 has two right passages, row 1 one that row 3 brings, row 2 none; row 5 may read two of what its group holds.
RIGHT = [[0, 8], [9, -1], [-1, -1], [3, -1], [4, -1], [-1, -1], [6, -1], [4, 7]]
BROUGHT = [[8, -1], [-1, -1], [10, 11], [9, -1], [-1, -1], [12, 13], [14, -1], [15, 0]]


def rows_of_all_kinds():
    rows = make_rows(8, negatives=BROUGHT)
    readable = np.ones((8, 12), bool)
    readable[5] = np.isin(np.asarray(rows.pool.key[4:]).ravel(), [12, 13])
    return rows._replace(right_key=jnp.asarray(RIGHT), readable=jnp.asarray(readable))


@pytest.mark.parametrize(
    ("generator", "objective"),
    [
        pytest.param("llama", {"name": "sequence"}, id="sequence"),
        pytest.param("gpt2", {"name": "pdist", "evidence": "both"}, id="pdist", marks=pytest.mark.slow),
        pytest.param("gpt2", {"name": "emdr2", "label_share": 0.4}, id="emdr2", marks=pytest.mark.slow),
    ],
)
def test_rows_with_several_right_passages_one_or_none(generator, objective):
    model, params = make(generator, candidates=2, negatives=2, **objective)
    model, rows = dataclasses.replace(model, labelled=False, chunk_size=5), rows_of_all_kinds()
    loss, gradients = value_and_grad(model, params, rows)
    by_hand = reference if objective["name"] == "sequence" else listwise_reference
    expected, expected_gradients = by_hand(model, params, rows)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_trees_close(gradients, expected_gradients, 1e-5)


def with_all_evidence(model, params, rows):
    """The rows with the evidence of every slot of their group, and nothing that a generator would read."""
    p = rows.pool.key.size // len(rows.row) * model.group_size
    slots = jnp.tile(jnp.arange(p), (len(rows.row) // model.group_size, model.group_size, 1))
    read = rag.read_suffixes(model, params, model.in_groups(rows), slots, None)
    pool = rows.pool._replace(prefix_ids=None, prefix_mask=None)
    gone = dict.fromkeys(("suffix_ids", "suffix_mask", "answer_start", "answer_mask"))
    return rows._replace(pool=pool, evidence=model.objective.summed(read), **gone)


@pytest.mark.parametrize("name", ["pdist", pytest.param("emdr2", marks=pytest.mark.slow)])
def test_evidence_that_is_known_beforehand_is_as_good_as_read(name):
    """What no row may read need not be known; a row of which nothing is known has no term."""
    objective = dict(name=name, candidates=3, negatives=2, marginal_weight=0.0, evidence_temperature=0.5)
    model, params = make("gpt2", **objective)
    model = dataclasses.replace(model, labelled=False, trains_generator=False)
    rows, frozen = rows_of_all_kinds(), {"generator": params["generator"]}
    known = with_all_evidence(model, params, rows)

    @jax.jit
    def of_retriever(retriever, rows):
        return jax.value_and_grad(lambda r: rag.loss(model, {"retriever": r} | frozen, rows, None)[0])(retriever)

    loss, gradient = of_retriever(params["retriever"], rows)
    for evidence in (known.evidence, jnp.where(rows.readable, known.evidence, jnp.nan)):
        again, as_known = of_retriever(params["retriever"], known._replace(evidence=evidence))
        np.testing.assert_allclose(again, loss, rtol=1e-6)
        assert_trees_close({"retriever": as_known}, {"retriever": gradient}, 1e-5)
    terms = functools.partial(rag.loss, dataclasses.replace(model, generator=None), params, key=None)
    whole = rag.evidence_terms(model, params, known, rag.embed(model, params, known, None), None)["evidence"]
    without = known._replace(evidence=known.evidence.at[2].set(jnp.nan))
    expected = (float(whole.nats_B.sum()) - float(whole.nats_B[2])) / 7
    np.testing.assert_allclose(terms(without)[1]["loss/evidence"], expected, rtol=1e-5)


def test_a_document_is_told_from_the_other_passages():
    """Of rows whose document alone is known; passages of several groups, and of no document, among them."""
    model, params = make(document_weight=2.0, contrastive_weight=0.0, marginal_weight=0.0)
    model, rows = dataclasses.replace(model, generator=None), rows_of_all_kinds()
    keys = np.asarray(rows.pool.key)
    of_passage, of_row = np.array([0, 0, 1, 1, 1, 2, 2, -1, -1, 3, 0, 0, 2, 1, 0, 3]), [-1, 0, 1, -1, 2, 3, 5, -1]
    rows = rows._replace(
        pool=rows.pool._replace(document=jnp.asarray(np.where(keys < 0, -1, of_passage[keys]))),
        document=jnp.asarray(of_row),
    )
    scores = np.exp(np.asarray(cosines_by_hand(model, params, rows), np.float64) / model.objective.temperature)
    flat, total, count = keys.ravel(), 0.0, 0
    first = [j for j, key in enumerate(flat) if key >= 0 and key not in flat[:j]]
    for i, document in enumerate(of_row):
        within = [j for j in first if document >= 0 and of_passage[flat[j]] == document]
        count += document >= 0
        total -= np.log(scores[i, within].sum() / scores[i, first].sum()) if within else 0.0
    loss, metrics = rag.loss(model, params, rows, None)
    np.testing.assert_allclose(metrics["loss/document"], total / count, rtol=1e-5)
    np.testing.assert_allclose(loss, 2 * total / count, rtol=1e-5)


def corrected_by_hand(evidence, none, right, margin):
    known = [k for k, value in enumerate(evidence) if not np.isnan(value)]
    labels = [k for k in known if right[k]]
    if not labels:
        return right, right
    label = max(evidence[k] for k in labels)
    explains = {k for k in known if evidence[k] >= label and evidence[k] >= none + margin}
    drops = any(evidence[k] >= label + margin and not right[k] for k in explains)
    now = [k in explains or (right[k] and not drops) for k in range(len(right))]
    return now, [now[k] or right[k] or (k in known and evidence[k] > label - margin) for k in range(len(right))]


def test_evidence_corrects_labels():
    """The rule by loops, and the contrastive loss by sums of exponentials over what it leaves right and wrong."""
    rng, margin = np.random.default_rng(1), 0.4
    evidence = np.where(rng.random((8, 12)) < 0.1, np.nan, rng.normal(-2, 0.6, (8, 12))).astype(np.float32)
    none = rng.normal(-2.2, 0.3, 8).astype(np.float32)
    model, params = make(
        name="pdist", candidates=3, negatives=2, marginal_weight=0.0, label_noise=margin, evidence_temperature=0.5,
        evidence_weight=1e-6,
    )  # fmt: skip
    model, rows = dataclasses.replace(model, generator=None), rows_of_all_kinds()
    keys = np.asarray(rows.pool.key).reshape(2, 12).repeat(4, axis=0)
    right = (np.asarray(rows.right_key)[:, :, None] == keys[:, None]).any(1) & (keys >= 0)
    ours = losses.corrected_labels(*map(jnp.asarray, (evidence, none, right)), margin)
    theirs = [corrected_by_hand(*row, margin) for row in zip(evidence, none, right, strict=True)]
    for got, expected in zip(ours, zip(*theirs, strict=True), strict=True):
        np.testing.assert_array_equal(got, np.array(expected))
    now, out = map(np.array, zip(*theirs, strict=True))
    assert (now & ~right).any() and (right & ~now).any() and (out & ~now & ~right).any()
    width = now.sum(axis=1).max()
    assert width <= rows.right_key.shape[1] + rag.MORE_RIGHT
    padded = [keys[i][now[i]].tolist() + [-1] * (width - now[i].sum()) for i in range(8)]
    left_out = [set(keys[i][out[i]].tolist()) | set(np.asarray(rows.right_key)[i].tolist()) for i in range(8)]
    scores = cosines_by_hand(model, params, rows) / model.objective.temperature
    expected = contrastive_by_hand(scores, rows._replace(right_key=jnp.asarray(padded)), out=left_out)
    told = rows._replace(evidence=jnp.asarray(evidence / 0.5), evidence_none=jnp.asarray(none / 0.5))
    np.testing.assert_allclose(rag.loss(model, params, told, None)[1]["loss/contrastive"], expected, rtol=1e-5)
    plain = dataclasses.replace(model, objective=dataclasses.replace(model.objective, label_noise=None))
    untouched = rag.loss(plain, params, told, None)[1]["loss/contrastive"]
    np.testing.assert_allclose(untouched, contrastive_by_hand(scores, rows), rtol=1e-5)


def test_a_row_of_zeros_has_a_zero_embedding_and_a_zero_gradient():
    ids, mask = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool)
    hidden = jnp.zeros((2, 3, 4)).at[1].set(1.0)

    def total(hidden):
        return jnp.sum(rag.encode(lambda *_: hidden, ids, mask, "mean") * jnp.arange(4.0))

    gradient = np.asarray(jax.grad(total)(hidden))
    assert np.isfinite(gradient).all() and np.abs(gradient[1]).max() > 0
    np.testing.assert_array_equal(gradient[0], 0)
    assert np.isnan(rag.normalised(jnp.asarray([[jnp.nan, 1.0]]))).all(), "what is non-finite must show"


def test_blocks_of_rows_are_few_whatever_the_number_of_rows():
    """Also for prime numbers of rows, and what fills the last block up is dropped."""
    rows = np.arange(254.0, dtype=np.float32)

    def blocks_of(num_rows):
        sizes = []  # a function of its own each time: none is traced twice
        jax.eval_shape(
            lambda rows: rag.map_rows(lambda block: sizes.append(len(block)) or block, rows, 32), rows[:num_rows]
        )
        assert sizes[0] <= 32
        return -(-num_rows // sizes[0])

    assert all(blocks_of(num_rows) <= max(1, 2 * num_rows / 32) for num_rows in range(1, 255))
    value, gradient = jax.value_and_grad(lambda rows: jnp.sum(rag.map_rows(lambda b: b**2, rows, 32)))(rows[:37])
    np.testing.assert_allclose(value, np.sum(rows[:37] ** 2), rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * rows[:37], rtol=1e-6)


def test_every_objective_names_formulas_that_exist():
    for name, formula in objectives.OBJECTIVES.items():
        assert not formula.terms or (hasattr(losses, formula.terms) and formula.reads in rag.READS), name
        mask, log_probs = jnp.ones((1, 2), bool), jnp.zeros((1, 3, 2))
        assert np.isfinite(losses.log_marginal(formula.likelihood, jnp.zeros((1, 3)), log_probs, mask)), name


def test_only_the_used_model_is_computed():
    rows = make_rows(8)
    model, params = make(name="none", marginal_weight=0.0)
    loss, metrics = rag.loss(model, {"retriever": params["retriever"]}, rows, None)
    assert set(metrics) == {"loss/total", "loss/contrastive"} and np.isfinite(loss)
    model, params = make(candidates=1, contrastive_weight=0.0)
    loss, metrics = rag.loss(model, {"generator": params["generator"]}, rows, None)
    assert set(metrics) == {"loss/total", "loss/marginal"}
    np.testing.assert_allclose(loss, reference(model, params, rows)[0], rtol=1e-5)


@pytest.mark.parametrize("mode", ["cls", "mean", "last"])
@pytest.mark.parametrize("left", [False, True])
def test_pooling_against_numpy(mode, left):
    rng = np.random.default_rng(0)
    hidden, lengths = rng.normal(size=(3, 5, 4)).astype(np.float32), [5, 2, 3]
    mask = np.array([[i >= 5 - n if left else i < n for i in range(5)] for n in lengths])
    pick = {"cls": lambda h: h[0], "mean": lambda h: h.mean(0), "last": lambda h: h[-1]}[mode]
    expected = [pick(h[m]) for h, m in zip(hidden, mask, strict=True)]
    np.testing.assert_allclose(rag.pool(jnp.asarray(hidden), jnp.asarray(mask), mode), expected, rtol=1e-6)


def with_adapters(model, params, rank=3, dropout=0.0, generator="llama"):
    """The composite with adapters on all linear layers of both models, none of them zero."""
    lora = models.Lora(rank, 2.0, ("attention/", "mlp/"), True, dropout)
    graphs, whole = {}, {}
    for role, config in (("retriever", BERT), ("generator", GENERATORS[generator])):
        graphs[role], shapes = models.abstract(models.with_lora(config, lora))
        given = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params[role])}
        rng = np.random.default_rng(4)

        def leaf(path, shape, given=given, rng=rng):
            drawn = jnp.asarray(0.3 * rng.standard_normal(shape.shape), shape.dtype)
            return given.get(jax.tree_util.keystr(path), drawn)

        whole[role] = jax.tree_util.tree_map_with_path(leaf, shapes)
    return dataclasses.replace(model, **graphs), whole


def test_adapters_are_what_they_add_to_the_weights():
    """The loss and the adapters' gradients, by the chain rule from those of merged weights."""
    model, params = with_adapters(*make("llama"))
    plain, lora = make("llama")[0], models.Lora(3, 2.0, ("attention/", "mlp/"), True)
    merged, rows = adapters.merged(params, lora), make_rows(8)
    loss, gradients = value_and_grad(model, params, rows)
    expected, of_weights = value_and_grad(plain, merged, rows)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for role, path in (("retriever", ("mlp", "down")), ("generator", ("attention", "key"))):
        layer, gradient, weights = (tree[role]["layers"] for tree in (params, gradients, of_weights))
        for name in path:
            layer, gradient, weights = layer[name], gradient[name], weights[name]
        by_chain = lora.scale * np.einsum("nio,nro->nir", weights["kernel"], layer["lora_b"])
        np.testing.assert_allclose(gradient["lora_a"], by_chain, rtol=1e-3, atol=1e-6)
        by_chain = lora.scale * np.einsum("nir,nio->nro", layer["lora_a"], weights["kernel"])
        np.testing.assert_allclose(gradient["lora_b"], by_chain, rtol=1e-3, atol=1e-6)


def with_dropout(model, rate=0.2):
    """The composite with dropout everywhere in both models."""
    generator = dataclasses.replace(GENERATORS["gpt2"], dropout=rate, embed_dropout=rate, attention_dropout=rate)
    retriever = dataclasses.replace(BERT, dropout=rate, attention_dropout=rate)
    return dataclasses.replace(model, generator=models.abstract(generator)[0], retriever=models.abstract(retriever)[0])


@pytest.mark.slow
def test_dropout_is_a_function_of_the_key():
    model, params = make("gpt2")
    noisy, rows = with_dropout(model), make_rows(8)
    one, again, other = (float(value_and_grad(noisy, params, rows, jax.random.key(k))[0]) for k in (0, 0, 1))
    assert one == again != other
    without = float(value_and_grad(model, params, rows)[0])
    assert one != pytest.approx(without, rel=1e-3)
    assert float(value_and_grad(noisy, params, rows)[0]) == pytest.approx(without)


@pytest.mark.slow
def test_chunks_change_nothing_with_dropout(monkeypatch):
    """Chunks of 3 do not divide 8 rows, so that the last one is filled up; scores are computed two rows at a time."""
    model, params = make("gpt2")
    model, rows = with_dropout(model), make_rows(8)
    loss, gradients = value_and_grad(model, params, rows, jax.random.key(5))
    monkeypatch.setattr(rag, "CONTRASTIVE_SCORES", 16)
    chunked = dataclasses.replace(model, chunk_size=3)
    again, again_gradients = value_and_grad(chunked, params, rows, jax.random.key(5))
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    assert_trees_close(again_gradients, gradients, 1e-5)


@pytest.mark.slow
def test_dropout_of_a_row_is_its_own():
    """The control of the test above: rows that change places keep the noise of the place, so the loss is another."""
    model, params = make("gpt2")
    rows, turned = make_rows(8), np.array([1, 2, 3, 0, 5, 6, 7, 4])  # within the groups
    moved = jax.tree.map(lambda a: a[turned], rows)
    plain, plain_moved = (float(value_and_grad(model, params, r)[0]) for r in (rows, moved))
    assert plain_moved == pytest.approx(plain, rel=1e-6)
    key = jax.random.key(5)
    noisy, noisy_moved = (float(value_and_grad(with_dropout(model), params, r, key)[0]) for r in (rows, moved))
    assert noisy_moved != pytest.approx(noisy, rel=1e-3)


@pytest.mark.slow
def test_memory_of_a_large_batch_is_that_of_a_chunk_and_a_group():
    """Eight times the queries may only add embeddings, scores and tokens."""

    def temporary_bytes(num_rows):
        model, params = make()
        rows = make_rows(num_rows, passages=np.arange(num_rows))
        model = dataclasses.replace(model, chunk_size=8)
        compiled = value_and_grad.lower(model, params, rows, None).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary_bytes(64), temporary_bytes(512)
    scores = 4 * 512 * 512
    assert many - few < 6 * scores
