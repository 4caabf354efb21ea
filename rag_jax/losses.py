"""The maths of the objectives: arrays in, arrays out, float32 throughout.

**B** queries, **P** passages in the batch, **K** candidates a query's generator reads, **T** answer tokens.
scores_BP are inner products of normalised embeddings, already divided by a temperature; row b's positive is column b.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

DALM_LOGIT_SCALE = 100.0


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
    excluded_BP = jnp.zeros((B, P), dtype=bool)
    for same_BP in (same_passage_BP, same_query_BP):
        excluded_BP = excluded_BP if same_BP is None else excluded_BP | same_BP
    by_row_B = positive_nll(scores_BP, jnp.arange(B), excluded_BP)
    by_column_B = positive_nll(scores_BP[:, :B].T, jnp.arange(B), excluded_BP[:, :B].T)
    return 0.5 * (jnp.mean(by_row_B) + jnp.mean(by_column_B))


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
    name: str,
    doc_log_probs_BK: Float[Array, "B K"],
    token_log_probs_BKT: Float[Array, "B K T"],
    answer_mask_BT: Bool[Array, "B T"],
) -> Float[Array, " B"]:
    """log p(y | q) of each answer, nats: RAG-Sequence for the objective "sequence", RAG-Token for every other."""
    if name == "sequence":
        return sequence_marginal(doc_log_probs_BK, token_log_probs_BKT, answer_mask_BT)
    return jnp.sum(jnp.where(answer_mask_BT, token_marginal(doc_log_probs_BK, token_log_probs_BKT), 0.0), axis=-1)


def marginal_nll(
    name: str,
    doc_log_probs_BK: Float[Array, "B K"],
    token_log_probs_BKT: Float[Array, "B K T"],
    answer_mask_BT: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """Negative log marginal of the answers, summed over rows and tokens (nats); divide by the global token count."""
    return -jnp.sum(log_marginal(name, doc_log_probs_BK, token_log_probs_BKT, answer_mask_BT))


def dalm_nll(
    cosine_BP: Float[Array, "B P"],
    positive_B: Int[Array, " B"],
    string_log_probs_BL: Float[Array, "B L"],
    scored_BL: Bool[Array, "B L"],
    answer_BL: Bool[Array, "B L"],
) -> Float[Array, ""]:
    """What DALM's `train-rag-e2e` calls the marginal; it is none, and nothing flows from generator to retriever.

        sum_{b,l scored} -log p(w_l | w_<l)  +  sum_b A_b CE_b,    CE_b = -log softmax_P(100 cosine_b:)_positive

    Divide by the number of scored tokens. A_b is how many of row b's are of the answer: the predecessor adds the
    log-probability of the row's own passage to each of them. Duplicates stay negatives there, and so they do here.
    """
    ce_B = positive_nll(DALM_LOGIT_SCALE * cosine_BP.astype(jnp.float32), positive_B)
    answer_tokens_B = jnp.sum(answer_BL & scored_BL, axis=-1)
    return jnp.sum(answer_tokens_B * ce_B) - jnp.sum(jnp.where(scored_BL, string_log_probs_BL, 0.0))
