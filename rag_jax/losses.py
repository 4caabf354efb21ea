"""The maths of the objectives: arrays in, arrays out, float32 throughout.

**B** queries, **b** some of them, **P** passages of the batch, **K** candidates a query's generator reads, **T** answer
tokens, **L** tokens of a whole string. scores_BP are inner products of normalised embeddings, already divided by a
temperature; row b's positive is column b.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

DALM_LOGIT_SCALE = 100.0


class Term(NamedTuple):
    """A term of the loss, row by row: its value is the sum of `nats_B` divided by the sum of `count_B`."""

    nats_B: Float[Array, " B"]
    count_B: Shaped[Array, " B"]  # 1 where the term is a mean over rows, a number of tokens where it is over tokens


def contrastive_loss(
    scores_BP: Float[Array, "B P"],
    same_passage_BP: Bool[Array, "B P"] | None = None,
    same_query_BP: Bool[Array, "B P"] | None = None,
) -> Float[Array, ""]:
    """Symmetric InfoNCE (van den Oord et al., 2018): the mean of the cross-entropies of rows and of columns, nats.

        L = 1/2 mean_b [ -log softmax_P(scores_b:)_b ] + 1/2 mean_b [ -log softmax_B(scores_:b)_b ]

    Args:
      scores_BP: row b's positive is column b; columns beyond B are further negatives of every row.
      same_passage_BP: column p holds the passage that is row b's positive.
      same_query_BP: column p is the positive of a row with row b's query.
        Where either is true off the diagonal, p is no negative of b, nor b of p.
    """
    B, P = scores_BP.shape
    positive_BP, excluded_BP = jnp.eye(B, P, dtype=bool), jnp.zeros((B, P), dtype=bool)
    for same_BP in (same_passage_BP, same_query_BP):
        excluded_BP = excluded_BP if same_BP is None else excluded_BP | same_BP
    by_row = right_nll(scores_BP, positive_BP, ~excluded_BP)
    by_column = right_nll(scores_BP[:, :B].T, positive_BP[:, :B], ~excluded_BP[:, :B].T)
    return 0.5 * (jnp.mean(by_row) + jnp.mean(by_column))


def right_nll(
    scores_nm: Float[Array, "n m"], right_nm: Bool[Array, "n m"], negative_nm: Bool[Array, "n m"]
) -> Float[Array, " n"]:
    """-log( sum_right e^s / sum_{right or negative} e^s ) of each row; 0 in a row without a right column."""
    scores_nm = scores_nm.astype(jnp.float32)
    has_n1 = jnp.any(right_nm, axis=1, keepdims=True)
    right_nm = right_nm | ~has_n1  # a sum over nothing has no gradient
    right_n = jax.nn.logsumexp(jnp.where(right_nm, scores_nm, -jnp.inf), axis=1)
    all_n = jax.nn.logsumexp(jnp.where(right_nm | negative_nm, scores_nm, -jnp.inf), axis=1)
    return jnp.where(has_n1[:, 0], all_n - right_n, 0.0)


def positive_nll(
    scores_BP: Float[Array, "B P"], positive_B: Int[Array, " B"], excluded_BP: Bool[Array, "B P"] | None = None
) -> Float[Array, " B"]:
    """-log softmax_P(scores_b:) at each row's positive, over all columns but the excluded ones (the positive stays)."""
    positive_BP = positive_B[:, None] == jnp.arange(scores_BP.shape[1])
    scores_BP = scores_BP.astype(jnp.float32)
    if excluded_BP is not None:
        scores_BP = jnp.where(excluded_BP & ~positive_BP, -jnp.inf, scores_BP)
    positive_score_B = jnp.take_along_axis(scores_BP, positive_B[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(scores_BP, axis=1) - positive_score_B


def doc_log_probs(scores_BK: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """log p(passage k | query), over the candidates the generator reads: log softmax over K."""
    return jax.nn.log_softmax(scores_BK.astype(jnp.float32), axis=-1)


def token_marginal(
    doc_log_probs_BK: Float[Array, "B K"], token_log_probs_BKT: Float[Array, "B K T"]
) -> Float[Array, "B T"]:
    """RAG-Token (Lewis et al., 2020, eq. 2): every token may come from another passage.

    log p(y_t | q, y_<t) = logsumexp_k [ log p(k | q) + log p(y_t | k, q, y_<t) ]
    """
    return jax.nn.logsumexp(doc_log_probs_BK[:, :, None] + token_log_probs_BKT.astype(jnp.float32), axis=1)


def sequence_marginal(
    doc_log_probs_BK: Float[Array, "B K"],
    token_log_probs_BKT: Float[Array, "B K T"],
    answer_mask_BT: Shaped[Array, "B T"],
) -> Float[Array, " B"]:
    """RAG-Sequence (Lewis et al., 2020, eq. 1): one passage explains the whole answer.

    log p(y | q) = logsumexp_k [ log p(k | q) + sum_t log p(y_t | k, q, y_<t) ]
    """
    kept_BKT = jnp.where(answer_mask_BT[:, None, :].astype(bool), token_log_probs_BKT.astype(jnp.float32), 0.0)
    return jax.nn.logsumexp(doc_log_probs_BK + jnp.sum(kept_BKT, axis=-1), axis=-1)


def log_marginal(
    likelihood: str,
    doc_log_probs_BK: Float[Array, "B K"],
    token_log_probs_BKT: Float[Array, "B K T"],
    answer_mask_BT: Bool[Array, "B T"],
) -> Float[Array, " B"]:
    """log p(y | q) of each answer, nats, by RAG-Token ("token") or RAG-Sequence ("sequence")."""
    match likelihood:
        case "token":
            marginal_BT = token_marginal(doc_log_probs_BK, token_log_probs_BKT)
            return jnp.sum(jnp.where(answer_mask_BT, marginal_BT, 0.0), axis=-1)
        case "sequence":
            return sequence_marginal(doc_log_probs_BK, token_log_probs_BKT, answer_mask_BT)
    raise ValueError(f"likelihood={likelihood!r}: must be token or sequence")


def evidence(
    likelihood: str,
    doc_log_probs_BK: Float[Array, "B K"],
    token_log_probs_BKT: Float[Array, "B K T"],
    answer_mask_BT: Bool[Array, "B T"],
) -> Float[Array, "B K"]:
    """Each passage's share in the answer: the posterior p(k | q, y); for RAG-Token the mean over tokens of theirs.

    sequence   r_k = softmax_k [ log p(k | q) + sum_t log p(y_t | k, q, y_<t) ]
    token      mean_t r_tk,    r_tk = softmax_k [ log p(k | q) + log p(y_t | k, q, y_<t) ]
    """
    answer_B1T = answer_mask_BT[:, None, :]
    kept_BKT = jnp.where(answer_B1T, token_log_probs_BKT, 0.0)
    match likelihood:
        case "token":
            shares_BKT = jax.nn.softmax(doc_log_probs_BK[:, :, None] + kept_BKT, axis=1)
            return jnp.sum(jnp.where(answer_B1T, shares_BKT, 0.0), axis=-1) / answer_mask_BT.sum(axis=-1, keepdims=True)
        case "sequence":
            return jax.nn.softmax(doc_log_probs_BK + kept_BKT.sum(axis=-1), axis=-1)
    raise ValueError(f"likelihood={likelihood!r}: must be token or sequence")


def marginal_terms(
    likelihood: str,
    doc_log_probs_BK: Float[Array, "B K"],
    token_log_probs_BKT: Float[Array, "B K T"],
    answer_mask_BT: Bool[Array, "B T"],
) -> dict[str, Term]:
    """The negative log marginal of the answers, nats an answer token."""
    log_marginal_B = log_marginal(likelihood, doc_log_probs_BK, token_log_probs_BKT, answer_mask_BT)
    return {"marginal": Term(-log_marginal_B, jnp.sum(answer_mask_BT, axis=-1))}


def label_log_probs(right_BK: Bool[Array, "B K"]) -> Float[Array, "B K"]:
    """The logarithm of the label as a distribution: all right candidates alike; -inf in a row without one."""
    num_right_B1 = jnp.sum(right_BK, axis=-1, keepdims=True)
    return jnp.where(right_BK, -jnp.log(jnp.maximum(num_right_B1, 1).astype(jnp.float32)), -jnp.inf)


def evidence_nats(
    divergence: str,
    doc_log_probs_BK: Float[Array, "B K"],
    evidence_BK: Float[Array, "B K"],
    right_BK: Bool[Array, "B K"],
    label_share: float = 0.0,
) -> Float[Array, " B"]:
    """How far p = exp(doc_log_probs) is from what the generator says of the candidates, which is not differentiated.

    With q = softmax_k(evidence_k), over the candidates that may be read (doc_log_probs > -inf):

    pdist      KL(q || p)                                 Izacard et al. (Atlas), 2023
    replug     KL(p || q)                                 Shi et al. (REPLUG), 2024
    emdr2      -log sum_k p_k exp(evidence_k)             Sachan et al. (EMDR2), 2021

    In a row with a label, `label_share` of q is the label: of emdr2, which has no q, of the posterior that its gradient
    draws p to.
    """
    readable_BK = doc_log_probs_BK > -jnp.inf
    log_p_BK = jnp.where(readable_BK, doc_log_probs_BK, 0.0)
    evidence_BK = jnp.where(readable_BK, jax.lax.stop_gradient(evidence_BK).astype(jnp.float32), -jnp.inf)
    labelled_B1 = jnp.any(right_BK, axis=-1, keepdims=True)
    log_label_BK = label_log_probs(right_BK)
    if divergence == "emdr2":
        nats_B = -jax.nn.logsumexp(log_p_BK + evidence_BK, axis=-1)
        label_nats_B = -jnp.sum(jnp.exp(log_label_BK) * log_p_BK, axis=-1)
        return jnp.where(labelled_B1[:, 0], label_share * label_nats_B + (1 - label_share) * nats_B, nats_B)
    log_q_BK = jax.nn.log_softmax(evidence_BK, axis=-1)
    if label_share:
        mixed_BK = jnp.logaddexp(jnp.log(label_share) + log_label_BK, jnp.log1p(-label_share) + log_q_BK)
        log_q_BK = jnp.where(labelled_B1, mixed_BK, log_q_BK)
    match divergence:
        case "pdist":  # 0 log 0 is 0
            q_BK, said_BK = jnp.exp(log_q_BK), log_q_BK > -jnp.inf
            return jnp.sum(q_BK * (jnp.where(said_BK, log_q_BK, 0.0) - log_p_BK), axis=-1)
        case "replug":
            log_q_BK = jnp.where(readable_BK, log_q_BK, 0.0)
            return jnp.sum(jnp.where(readable_BK, jnp.exp(log_p_BK), 0.0) * (log_p_BK - log_q_BK), axis=-1)
    raise ValueError(f"divergence={divergence!r}: must be pdist, replug or emdr2")


def corrected_labels(
    evidence_BK: Float[Array, "B K"], none_B: Float[Array, " B"], right_BK: Bool[Array, "B K"], margin: float
) -> tuple[Bool[Array, "B K"], Bool[Array, "B K"]]:
    """What counts as right where a label may be wrong, and what is no negative: everything that may be right.

    evidence_BK: mean log p of the answer's tokens behind each candidate, NaN: not known; none_B: behind none.
    With l the evidence, r that of the label (of several the best) and n that behind none, in nats a token:

    right         l_k >= r and l_k >= n + margin; and the label, unless such a k has l_k >= r + margin
    no negative   what is right, the label, and k with l_k > r - margin, of which it is not certain

    A row without a label, or whose label's evidence is not known, is left as it is.
    """
    known_BK = ~jnp.isnan(evidence_BK)
    evidence_BK = jnp.where(known_BK, evidence_BK, -jnp.inf)
    label_B1 = jnp.max(jnp.where(right_BK, evidence_BK, -jnp.inf), axis=-1, keepdims=True)
    explains_BK = (evidence_BK >= none_B[:, None] + margin) & (evidence_BK >= label_B1) & (label_B1 > -jnp.inf)
    is_better_B1 = jnp.any(explains_BK & ~right_BK & (evidence_BK >= label_B1 + margin), axis=-1, keepdims=True)
    unsure_BK = (evidence_BK > label_B1 - margin) & (label_B1 > -jnp.inf)
    corrected_BK = jnp.where(is_better_B1, explains_BK, right_BK | explains_BK)
    return corrected_BK, right_BK | explains_BK | unsure_BK


def generator_nats(
    likelihood: str,
    doc_log_probs_BK: Float[Array, "B K"],
    token_log_probs_BKT: Float[Array, "B K T"],
    answer_mask_BT: Bool[Array, "B T"],
    right_BK: Bool[Array, "B K"],
) -> Float[Array, " B"]:
    """The generator's own loss beside a listwise one: -log p(y | q) behind the right passages where they are known.

    Elsewhere the marginal under the retriever's p, which learns nothing from it.
    """
    labelled_B1 = jnp.any(right_BK, axis=-1, keepdims=True)
    prior_BK = jnp.where(labelled_B1, label_log_probs(right_BK), jax.lax.stop_gradient(doc_log_probs_BK))
    return -log_marginal(likelihood, prior_BK, token_log_probs_BKT, answer_mask_BT)


def dalm_terms(
    cosine_BP: Float[Array, "B P"],
    positive_B: Int[Array, " B"],
    string_log_probs_BL: Float[Array, "B L"],
    scored_BL: Bool[Array, "B L"],
    answer_BL: Bool[Array, "B L"],
) -> dict[str, Term]:
    """What DALM's `train-rag-e2e` calls the marginal; it is none, and nothing flows from generator to retriever.

        sum_{l scored} -log p(w_l | w_<l)  +  A_b CE_b,    CE_b = -log softmax_P(100 cosine_b:)_positive

    divided by the number of scored tokens. A_b is how many of row b's are of the answer: the predecessor adds the
    log-probability of the row's own passage to each of them. Duplicates stay negatives there, and so they do here.
    """
    ce_B = positive_nll(DALM_LOGIT_SCALE * cosine_BP.astype(jnp.float32), positive_B)
    answer_tokens_B = jnp.sum(answer_BL & scored_BL, axis=-1)
    string_nll_B = -jnp.sum(jnp.where(scored_BL, string_log_probs_BL, 0.0), axis=-1)
    return {"marginal": Term(answer_tokens_B * ce_B + string_nll_B, jnp.sum(scored_BL, axis=-1))}
