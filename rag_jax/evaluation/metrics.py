"""Metrics of rankings and of answers, query by query, and how far chance may have moved their means.

**R** queries, **K** retrieved passages.
"""

import collections
import re
import string
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

CUTOFFS = (1, 5, 10)
# How many passages are retrieved for the metrics that look deepest.
DEPTH = 100
RESAMPLES, SEED = 1000, 0
# What a metric is the mean of: values of each query, and what their sum is divided by the sum of.
Column = tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]


def relevant_hits(
    retrieved: Int[np.ndarray, "R K"],
    query_key: Int[np.ndarray, " R"],
    relevant: tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]],
) -> tuple[Bool[np.ndarray, "R K"], Int[np.ndarray, " R"]]:
    """Which retrieved passages are relevant, and how many are in all; `relevant`: keys of queries and of passages."""
    queries, passages = relevant
    base = int(max(passages.max(), retrieved.max())) + 1
    pairs = np.unique(queries.astype(np.int64) * base + passages)
    hits = np.isin(query_key[:, None].astype(np.int64) * base + retrieved, pairs)
    return hits, np.bincount(pairs // base, minlength=int(query_key.max()) + 1)[query_key]


def ranking(hits: Bool[np.ndarray, "R K"], num_relevant: Int[np.ndarray, " R"]) -> dict[str, Float[np.ndarray, " R"]]:
    """Metrics of each query's retrieved passages, nearest first, r of which are relevant of R_q in all.

    recall@k = r_k / R_q        hit_rate@k = [r_k > 0]        precision@k = r_k / retrieved_k
    mrr@10 = 1 / rank of the first relevant one, 0 beyond 10
    ndcg@10 = sum_{ranks i <= 10 of relevant ones} 1 / log2(1 + i), divided by the most that R_q allow
    map@100 = sum_{ranks i <= 100 of relevant ones} precision@i / R_q
    """
    hits, num_relevant = hits.astype(np.float64), num_relevant.astype(np.float64)
    rank = np.arange(1, hits.shape[1] + 1)
    found = hits.cumsum(axis=1)
    metrics: dict[str, np.ndarray] = {}
    for k in CUTOFFS:
        at = found[:, min(k, len(rank)) - 1]
        metrics |= {f"recall@{k}": at / num_relevant, f"hit_rate@{k}": (at > 0).astype(np.float64)}
        metrics[f"precision@{k}"] = at / min(k, len(rank))
    top, gain = hits[:, :10], 1 / np.log2(1 + np.arange(1, 11))
    first = 1 / rank[top.argmax(axis=1)]
    metrics["mrr@10"] = np.where(top.any(axis=1), first, 0.0)
    ideal = np.concatenate([[0.0], gain.cumsum()])[np.minimum(num_relevant, 10).astype(int)]
    metrics["ndcg@10"] = top @ gain[: top.shape[1]] / ideal
    deep = slice(0, DEPTH)
    metrics[f"map@{DEPTH}"] = (hits * found / rank)[:, deep].sum(axis=1) / num_relevant
    return metrics


def summarise(columns: Mapping[str, Column]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Each metric, sum of values / sum of divisors, and the interval that holds it with 95 % (percentile bootstrap).

    Queries are drawn with replacement, the same ones for all metrics that are over the same number of them.
    """
    metrics = {name: float(values.sum() / divisors.sum()) for name, (values, divisors) in columns.items()}
    intervals: dict[str, list[float]] = {}
    for size in {len(values) for values, _ in columns.values()}:
        names = [name for name, (values, _) in columns.items() if len(values) == size]
        parts = [part for i in range(2) for part in (columns[name][i] for name in names)]
        both = np.stack(parts, axis=1).astype(np.float64)
        rng = np.random.default_rng(SEED)
        sums = np.stack([np.bincount(rng.integers(0, size, size), minlength=size) @ both for _ in range(RESAMPLES)])
        low, high = np.quantile(sums[:, : len(names)] / sums[:, len(names) :], [0.025, 0.975], axis=0)
        intervals |= {name: [float(low[i]), float(high[i])] for i, name in enumerate(names)}
    return metrics, {name: intervals[name] for name in columns}


def normalise(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al., 2016): lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, gold: str) -> float:
    return float(normalise(answer) == normalise(gold))


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words, counted with repetition; of two empty answers 1."""
    ours, theirs = normalise(answer).split(), normalise(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = (collections.Counter(ours) & collections.Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))
