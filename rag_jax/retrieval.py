"""Exact retrieval over a corpus: embedding texts, the highest-scoring passages, metrics of ranking.

**R** queries, **M** passages of the corpus, **K** retrieved passages, **E** embedding width.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped
from tqdm import tqdm

from rag_jax import rag, sharding
from rag_jax.data import segments

RECALL_AT = (1, 5, 10)
# The deepest rank that any metric looks at.
DEPTH = 10
# Scores that exist at one time: (queries, M) float32 of at most this many numbers.
SCORES_AT_A_TIME = 2**26


def size_for(needed: int, largest: int, *, steps: int = 4) -> int:
    """The smallest of `steps` even shares of `largest` that holds `needed`: few shapes, few compilations."""
    share = -(-largest // steps)
    return min(max(-(-needed // share), 1) * share, largest)


def full_batches(order: Int[np.ndarray, " n"], batch_size: int) -> Iterator[tuple[Int[np.ndarray, " b"], int]]:
    """`order` in batches of one size, the last filled up with copies of its first row; and how many rows are real."""
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows))]), len(rows)


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: rag.Rag, params: dict, ids: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, "B E"]:
    return rag.encode(model.model("retriever", params), ids, mask, model.pooling)


def embed(
    model: rag.Rag, params: dict, tokens: segments.Ragged, *, batch_size: int, label: str
) -> Float[np.ndarray, "n E"]:
    """Normalised embeddings of tokenised texts, in their order. Texts of similar length share a batch."""
    lengths = tokens.lengths
    longest = int(lengths.max())
    found: list[Any] = []
    order = np.argsort(-lengths, kind="stable")  # the longest first: too little memory shows at once
    for rows, real in tqdm(
        list(full_batches(order, batch_size)), desc=label, leave=False, mininterval=1.0, disable=None
    ):
        ids, mask = segments.pad(tokens, rows, size_for(int(lengths[rows].max()), longest))
        found.append((_encode(model, params, ids, mask), real))
    emb = np.empty((len(tokens), found[0][0].shape[-1]), np.float32)
    emb[order] = np.concatenate([sharding.to_host(part)[:real] for part, real in found])
    return emb


@functools.partial(jax.jit, static_argnums=2)
def _top_k(
    query_emb: Float[Array, "R E"], passage_emb: Float[Array, "M E"], k: int
) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
    # The default precision of a product on TPU and GPU is lower than float32 and would change ranks.
    cosine = jnp.einsum("RE,ME->RM", query_emb, passage_emb, precision=jax.lax.Precision.HIGHEST)
    values, index = jax.lax.top_k(cosine, k)
    return values, index


def top_k(
    query_emb: Float[np.ndarray, "R E"], passage_emb: Float[np.ndarray, "M E"], k: int
) -> tuple[Float[np.ndarray, "R K"], Int[np.ndarray, "R K"]]:
    """Cosines and indices of each query's k nearest passages, nearest first; of equals the lower index first.

    Exact: every passage is scored. k is cut to the number of passages.
    """
    num_queries, num_passages = len(query_emb), len(passage_emb)
    batch_size = min(max(SCORES_AT_A_TIME // num_passages, 1), num_queries)
    corpus = jnp.asarray(passage_emb)
    parts = [
        jax.tree.map(lambda a, real=real: np.asarray(a)[:real], _top_k(query_emb[rows], corpus, min(k, num_passages)))
        for rows, real in full_batches(np.arange(num_queries), batch_size)
    ]
    cosine, index = zip(*parts, strict=True)
    return np.concatenate(cosine), np.concatenate(index)


def gold_rank(retrieved: Int[np.ndarray, "R K"], gold: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R"]:
    """Rank, from 1, of each query's own passage among those retrieved; 0 where it is not among them."""
    hit = retrieved == gold[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0)


def ranking_metrics(rank: Shaped[np.ndarray, " R"]) -> dict[str, float]:
    """Metrics of `gold_rank` where every query has one relevant passage, averaged over queries.

        recall@k = [rank <= k]      mrr@10 = [rank <= 10] / rank      ndcg@10 = [rank <= 10] / log2(1 + rank)

    The ideal gain of one relevant passage is 1, so ndcg needs no divisor.
    """
    found = (rank > 0) & (rank <= DEPTH)
    safe = np.where(found, rank, 1).astype(np.float64)
    metrics = {f"eval/recall@{k}": float(np.mean((rank > 0) & (rank <= k))) for k in RECALL_AT}
    metrics[f"eval/mrr@{DEPTH}"] = float(np.mean(np.where(found, 1 / safe, 0.0)))
    metrics[f"eval/ndcg@{DEPTH}"] = float(np.mean(np.where(found, 1 / np.log2(1 + safe), 0.0)))
    return metrics
