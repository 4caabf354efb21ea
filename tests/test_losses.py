"""The maths of the objectives against numpy written by hand, and the identities that hold exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax import losses


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape, scale=1.0):
    return jnp.asarray(rng.normal(0, scale, shape), jnp.float32)


def token_log_probs(rng, *shape):
    return -jnp.abs(normal(rng, *shape)) - 0.1


def contrastive_by_hand(scores, negative_allowed):
    """One loop a row and one a column, in float64."""
    B, P = scores.shape
    total = 0.0
    for i in range(B):
        kept = [np.exp(scores[i, j]) for j in range(P) if j == i or negative_allowed[i, j]]
        total += -np.log(np.exp(scores[i, i]) / sum(kept)) / (2 * B)
        kept = [np.exp(scores[j, i]) for j in range(B) if j == i or negative_allowed[j, i]]
        total += -np.log(np.exp(scores[i, i]) / sum(kept)) / (2 * B)
    return total


@pytest.mark.parametrize("num_passages", [6, 9])
def test_contrastive_is_the_mean_of_row_and_column_cross_entropies(rng, num_passages):
    scores = normal(rng, 6, num_passages, scale=3)
    expected = contrastive_by_hand(np.asarray(scores, np.float64), np.ones((6, num_passages), bool))
    np.testing.assert_allclose(losses.contrastive_loss(scores), expected, rtol=1e-6)


def test_contrastive_masks_rows_that_share_a_passage_or_a_query(rng):
    scores = normal(rng, 6, 6, scale=3)
    passages, queries = np.array([0, 1, 0, 2, 3, 3]), np.array([0, 1, 2, 1, 4, 5])
    same_passage, same_query = passages[:, None] == passages, queries[:, None] == queries
    expected = contrastive_by_hand(np.asarray(scores, np.float64), ~(same_passage | same_query))
    got = losses.contrastive_loss(scores, jnp.asarray(same_passage), jnp.asarray(same_query))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert not np.isclose(got, losses.contrastive_loss(scores))


def test_contrastive_gradient_is_finite_where_everything_is_masked(rng):
    scores = normal(rng, 4, 4)
    same = jnp.ones((4, 4), bool)
    loss, gradient = jax.value_and_grad(losses.contrastive_loss)(scores, same)
    assert loss == 0 and np.all(np.asarray(gradient) == 0)


def test_marginals_are_sums_of_probabilities(rng):
    scores, log_probs = normal(rng, 3, 4), token_log_probs(rng, 3, 4, 5)
    mask = np.arange(5) < np.array([5, 1, 3])[:, None]
    p = np.exp(np.asarray(scores, np.float64))
    p /= p.sum(axis=1, keepdims=True)
    y = np.exp(np.asarray(log_probs, np.float64))
    doc = losses.doc_log_probs(scores)
    by_token = [[np.log(sum(p[b, k] * y[b, k, t] for k in range(4))) for t in range(5)] for b in range(3)]
    np.testing.assert_allclose(losses.token_marginal(doc, log_probs), by_token, rtol=2e-6)
    by_sequence = [np.log(sum(p[b, k] * np.prod(y[b, k][mask[b]]) for k in range(4))) for b in range(3)]
    np.testing.assert_allclose(losses.sequence_marginal(doc, log_probs, jnp.asarray(mask)), by_sequence, rtol=2e-6)
    nll_token = -sum(by_token[b][t] for b in range(3) for t in range(5) if mask[b, t])
    for name, expected in (("token", nll_token), ("sequence", -sum(by_sequence))):
        term = losses.marginal_terms(name, doc, log_probs, jnp.asarray(mask))["marginal"]
        np.testing.assert_allclose(term.nats_B.sum(), expected, rtol=2e-6)
        np.testing.assert_array_equal(term.count_B, [5, 1, 3])
    with pytest.raises(ValueError, match="must be token or sequence"):
        losses.marginal_terms("sequenze", doc, log_probs, jnp.asarray(mask))


def nll(name, scores, log_probs, mask):
    return losses.marginal_terms(name, losses.doc_log_probs(scores), log_probs, mask)["marginal"].nats_B.sum()


def test_sequence_gradient_is_prior_minus_posterior(rng):
    scores, log_probs, mask = normal(rng, 3, 4), token_log_probs(rng, 3, 4, 5), jnp.ones((3, 5), bool)
    gradient = jax.grad(nll, argnums=1)("sequence", scores, log_probs, mask)
    prior = np.asarray(jax.nn.softmax(scores))
    joint = prior * np.exp(np.asarray(log_probs).sum(-1))
    np.testing.assert_allclose(gradient, prior - joint / joint.sum(1, keepdims=True), atol=1e-6)


def test_token_gradient_is_the_sum_of_prior_minus_posteriors(rng):
    scores, log_probs = normal(rng, 3, 4), token_log_probs(rng, 3, 4, 5)
    mask = np.arange(5) < np.array([5, 1, 3])[:, None]
    gradient = jax.grad(nll, argnums=1)("token", scores, log_probs, jnp.asarray(mask))
    prior = np.asarray(jax.nn.softmax(scores))
    joint = prior[:, :, None] * np.exp(np.asarray(log_probs))
    posterior = joint / joint.sum(1, keepdims=True)
    expected = ((prior[:, :, None] - posterior) * mask[:, None, :]).sum(-1)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["token", "sequence"])
def test_one_candidate_is_plain_negative_log_likelihood(rng, name):
    log_probs = token_log_probs(rng, 3, 1, 5)
    mask = jnp.arange(5) < jnp.array([5, 1, 3])[:, None]
    expected = -np.asarray(log_probs)[:, 0][np.asarray(mask)].sum()
    np.testing.assert_allclose(nll(name, normal(rng, 3, 1), log_probs, mask), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["token", "sequence"])
def test_equal_likelihoods_give_the_retriever_no_gradient(rng, name):
    log_probs = jnp.broadcast_to(token_log_probs(rng, 3, 1, 5), (3, 4, 5))
    gradient = jax.grad(nll, argnums=1)(name, normal(rng, 3, 4), log_probs, jnp.ones((3, 5), bool))
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("name", ["token", "sequence"])
def test_a_constant_added_to_all_scores_and_an_order_of_passages_change_nothing(rng, name):
    scores, log_probs, mask = normal(rng, 3, 4), token_log_probs(rng, 3, 4, 5), jnp.ones((3, 5), bool)
    expected = nll(name, scores, log_probs, mask)
    np.testing.assert_allclose(nll(name, scores + 7.0, log_probs, mask), expected, rtol=1e-6)
    order = jnp.asarray([2, 0, 3, 1])
    np.testing.assert_allclose(nll(name, scores[:, order], log_probs[:, order], mask), expected, rtol=1e-6)


def test_an_extreme_passage_stays_finite(rng):
    scores = jnp.asarray([[2000.0, -2000.0]])
    log_probs = jnp.asarray([[[-1e4], [-1e-3]]])
    loss, gradient = jax.value_and_grad(nll, argnums=1)("token", scores, log_probs, jnp.ones((1, 1), bool))
    assert np.isfinite(loss) and np.all(np.isfinite(np.asarray(gradient)))


def test_dalm_against_loops(rng):
    cosine = normal(rng, 3, 3, scale=0.05)
    log_probs = token_log_probs(rng, 3, 6)
    scored = np.arange(6) < np.array([6, 4, 5])[:, None]
    answer = np.arange(6) >= np.array([3, 2, 5])[:, None]
    total = 0.0
    for i in range(3):
        scores = 100.0 * np.asarray(cosine, np.float64)[i]
        cross_entropy = np.log(np.exp(scores).sum()) - scores[i]
        for t in range(6):
            if scored[i, t]:
                total += -float(log_probs[i, t]) + (cross_entropy if answer[i, t] else 0.0)
    term = losses.dalm_terms(cosine, jnp.arange(3), log_probs, jnp.asarray(scored), jnp.asarray(answer))["marginal"]
    np.testing.assert_allclose(term.nats_B.sum(), total, rtol=1e-6)
    np.testing.assert_array_equal(term.count_B, [6, 4, 5])


def dalm_nll(*arrays):
    return losses.dalm_terms(*arrays)["marginal"].nats_B.sum()


def test_dalm_gradient_is_the_sequence_marginal_with_the_posterior_clamped_to_the_positive(rng):
    cosine, log_probs = normal(rng, 3, 3, scale=0.01), token_log_probs(rng, 3, 6)
    scored, answer = jnp.ones((3, 6), bool), jnp.arange(6)[None] >= jnp.asarray([[3], [2], [4]])
    gradient = jax.grad(dalm_nll)(cosine, jnp.arange(3), log_probs, scored, answer)
    prior = np.asarray(jax.nn.softmax(100.0 * cosine))
    answer_tokens = np.array([3, 4, 2])[:, None]
    np.testing.assert_allclose(gradient, 100.0 * answer_tokens * (prior - np.eye(3)), atol=1e-4)


def test_dalm_generator_gradient_does_not_depend_on_the_retriever(rng):
    log_probs, scored = token_log_probs(rng, 3, 6), jnp.ones((3, 6), bool)
    answer = jnp.arange(6)[None] >= 3
    to_generator = jax.grad(dalm_nll, argnums=2)
    one = to_generator(normal(rng, 3, 3), jnp.arange(3), log_probs, scored, jnp.broadcast_to(answer, (3, 6)))
    other = to_generator(normal(rng, 3, 3), jnp.arange(3), log_probs, scored, jnp.broadcast_to(answer, (3, 6)))
    np.testing.assert_array_equal(one, other)


def distribution(a):
    a = np.exp(a - a.max(axis=-1, keepdims=True))
    return a / a.sum(axis=-1, keepdims=True)


def evidence_by_hand(divergence, p, evidence, right, share):
    """A loop over the candidates of each row that may be read, in float64."""
    found = []
    for b in range(len(p)):
        read = [k for k in range(p.shape[1]) if p[b, k] > 0]
        q = dict(zip(read, distribution(evidence[b, read]), strict=True))
        label = {k: right[b, k] / max(right[b].sum(), 1) for k in read}
        mixed = share if right[b].any() else 0.0
        if divergence == "emdr2":
            marginal = -np.log(sum(p[b, k] * np.exp(evidence[b, k]) for k in read))
            found.append((1 - mixed) * marginal - mixed * sum(label[k] * np.log(p[b, k]) for k in read))
            continue
        target = {k: mixed * label[k] + (1 - mixed) * q[k] for k in read}
        first, second = (target, p[b]) if divergence == "pdist" else (p[b], target)
        found.append(sum(first[k] * np.log(first[k] / second[k]) for k in read))
    return np.array(found)


@pytest.fixture
def listwise(rng):
    """Scores, of which one may not be read, evidence, and labels: one, two and none."""
    scores = normal(rng, 4, 5, scale=2).at[1, 4].set(-jnp.inf)
    right = np.zeros((4, 5), bool)
    right[0, 1] = right[1, 0] = right[1, 2] = True
    return scores, normal(rng, 4, 5, scale=2), jnp.asarray(right)


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("divergence", ["pdist", "replug", "emdr2"])
def test_listwise_losses_against_loops(listwise, divergence, share):
    scores, evidence, right = listwise
    p = distribution(np.asarray(scores, np.float64))
    expected = evidence_by_hand(divergence, p, np.asarray(evidence, np.float64), np.asarray(right), share)
    got = losses.evidence_nats(divergence, losses.doc_log_probs(scores), evidence, right, share)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)
    with pytest.raises(ValueError, match="must be pdist, replug or emdr2"):
        losses.evidence_nats("kl", losses.doc_log_probs(scores), evidence, right)


def evidence_total(scores, divergence, *more):
    return losses.evidence_nats(divergence, losses.doc_log_probs(scores), *more).sum()


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_listwise_gradients_are_what_p_lacks(listwise, share):
    """pdist draws p to the target, emdr2 to the posterior, both mixed with the label; replug by its own ratio."""
    scores, evidence, right = listwise
    p = distribution(np.asarray(scores, np.float64))
    label = np.asarray(right) / np.maximum(np.asarray(right).sum(1, keepdims=True), 1)
    mixed = share * np.asarray(right).any(1, keepdims=True)
    readable = np.isfinite(np.asarray(scores))
    said = np.where(readable, np.asarray(evidence, np.float64), -np.inf)
    q, posterior = distribution(said), distribution(np.log(np.where(readable, p, 1.0)) + said)
    gradient = jax.grad(evidence_total)
    for divergence, target in (("pdist", q), ("emdr2", posterior)):
        expected = p - (mixed * label + (1 - mixed) * target)
        np.testing.assert_allclose(gradient(scores, divergence, evidence, right, share), expected, atol=1e-6)
    log_ratio = np.where(readable, np.log(np.where(readable, p / (mixed * label + (1 - mixed) * q + ~readable), 1)), 0)
    expected = p * (log_ratio - (p * log_ratio).sum(1, keepdims=True))
    np.testing.assert_allclose(gradient(scores, "replug", evidence, right, share), expected, atol=1e-6)


@pytest.mark.parametrize("divergence", ["pdist", "replug", "emdr2"])
def test_evidence_is_not_differentiated_and_equal_evidence_draws_to_no_passage(listwise, divergence):
    scores, evidence, right = listwise

    def of_evidence(evidence):
        return evidence_total(scores, divergence, evidence, right)

    np.testing.assert_array_equal(jax.grad(of_evidence)(evidence), 0)
    flat = jnp.zeros((2, 5))
    np.testing.assert_allclose(
        jax.grad(evidence_total)(flat, divergence, flat + 3.0, jnp.zeros((2, 5), bool)), 0, atol=1e-7
    )


def test_emdr2_teaches_the_retriever_what_the_sequence_marginal_does(rng):
    scores, log_probs, mask = normal(rng, 3, 4), token_log_probs(rng, 3, 4, 5), jnp.ones((3, 5), bool)
    ours = jax.grad(evidence_total)(scores, "emdr2", log_probs.sum(-1), jnp.zeros((3, 4), bool))
    np.testing.assert_allclose(ours, jax.grad(nll, argnums=1)("sequence", scores, log_probs, mask), atol=1e-6)


@pytest.mark.parametrize("name", ["token", "sequence"])
def test_the_generator_learns_from_right_passages_or_from_the_marginal(rng, name):
    """Of one right passage its likelihood alone; of two their mean; of none the marginal, and p learns nothing."""
    scores, log_probs, mask = normal(rng, 3, 4), token_log_probs(rng, 3, 4, 5), jnp.ones((3, 5), bool)
    right = jnp.asarray([[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]], bool)
    doc = losses.doc_log_probs(scores)
    got = losses.generator_nats(name, doc, log_probs, mask, right)
    np.testing.assert_allclose(got[0], -log_probs[0, 1].sum(), rtol=1e-6)
    halves = jnp.log(jnp.asarray([[0.5, 0.5]]))
    two = losses.log_marginal(name, halves, log_probs[1:2, jnp.asarray([0, 3])], mask[:1])
    np.testing.assert_allclose(got[1], -two[0], rtol=1e-6)
    np.testing.assert_allclose(got[2], -losses.log_marginal(name, doc, log_probs, mask)[2], rtol=1e-6)
    to_scores = jax.grad(lambda s: losses.generator_nats(name, losses.doc_log_probs(s), log_probs, mask, right).sum())
    np.testing.assert_array_equal(to_scores(scores), 0)
    assert np.isfinite(jax.grad(lambda a: losses.generator_nats(name, doc, a, mask, right).sum())(log_probs)).all()
