"""Metrics of rankings and of answers, query by query, and how far chance may have moved their means.

**Q** queries, **K** retrieved passages.
"""

import collections
import dataclasses
import functools
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import regex
from jaxtyping import Bool, Float, Int

CUTOFFS = (1, 5, 10)
# How many passages are retrieved for the metrics that look deepest.
DEPTH = 100
RESAMPLES, SEED = 1000, 0
# Words of letters, digits and accents, and every other character that is neither white space nor control.
DPR_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
Hits = Bool[np.ndarray, "Q K"]  # whether each retrieved passage is relevant, nearest first
Counts = Int[np.ndarray, " Q"]  # of each query's relevant passages
# What a metric is the mean of: values of each query, and what their sum is divided by the sum of.
Column = tuple[Float[np.ndarray, " Q"], Float[np.ndarray, " Q"]]


def relevant_hits(retrieved: Int[np.ndarray, "Q K"], relevant: Int[np.ndarray, "Q R"]) -> tuple[Hits, Counts]:
    """Which retrieved passages are relevant, and how many are in all; `relevant`: each query's, -1: no more."""
    hits = np.zeros(retrieved.shape, bool)
    for passage in relevant.T:
        hits |= retrieved == passage[:, None]
    return hits, (relevant >= 0).sum(axis=1)


def at_k(hits: Hits, k: int) -> tuple[Float[np.ndarray, " Q"], int]:
    """How many of each query's first k passages are relevant, and how many there are: k, or all that were retrieved."""
    k = min(k, hits.shape[1])
    return hits[:, :k].sum(axis=1).astype(np.float64), k


def recall(hits: Hits, num_relevant: Counts, k: int) -> Float[np.ndarray, " Q"]:
    return at_k(hits, k)[0] / np.maximum(num_relevant, 1)


def hit_rate(hits: Hits, num_relevant: Counts, k: int) -> Float[np.ndarray, " Q"]:
    return (at_k(hits, k)[0] > 0).astype(np.float64)


def precision(hits: Hits, num_relevant: Counts, k: int) -> Float[np.ndarray, " Q"]:
    found, k = at_k(hits, k)
    return found / k


def mrr(hits: Hits, num_relevant: Counts, k: int) -> Float[np.ndarray, " Q"]:
    """1 / rank of the first relevant passage, 0 beyond k."""
    top = hits[:, :k]
    return np.where(top.any(axis=1), 1 / (1.0 + top.argmax(axis=1)), 0.0)


def ndcg(hits: Hits, num_relevant: Counts, k: int) -> Float[np.ndarray, " Q"]:
    """sum_{ranks i <= k of relevant ones} 1 / log2(1 + i), divided by the most that the relevant ones allow."""
    top, gain = hits[:, :k].astype(np.float64), 1 / np.log2(1 + np.arange(1, k + 1))
    ideal = np.concatenate([[0.0], gain.cumsum()])[np.minimum(num_relevant, k)]
    return top @ gain[: top.shape[1]] / np.maximum(ideal, 1)


def average_precision(hits: Hits, num_relevant: Counts, k: int) -> Float[np.ndarray, " Q"]:
    """sum_{ranks i <= k of relevant ones} precision@i / number of relevant ones."""
    top = hits[:, :k].astype(np.float64)
    return (top * top.cumsum(axis=1) / np.arange(1, top.shape[1] + 1)).sum(axis=1) / np.maximum(num_relevant, 1)


def summarise(columns: Mapping[str, Column]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Each metric, sum of values / sum of divisors, and the interval that holds it with 95 % (percentile bootstrap).

    Queries are drawn with replacement, the same ones for all metrics that are over the same number of them.
    """
    means = {name: float(values.sum() / divisors.sum()) for name, (values, divisors) in columns.items()}
    intervals: dict[str, list[float]] = {}
    for size in {len(values) for values, _ in columns.values()}:
        names = [name for name, (values, _) in columns.items() if len(values) == size]
        parts = [part for i in range(2) for part in (columns[name][i] for name in names)]
        both = np.stack(parts, axis=1).astype(np.float64)
        rng = np.random.default_rng(SEED)
        sums = np.stack([np.bincount(rng.integers(0, size, size), minlength=size) @ both for _ in range(RESAMPLES)])
        with np.errstate(invalid="ignore"):  # draws of which no query counts for a metric say nothing of it
            drawn = sums[:, : len(names)] / sums[:, len(names) :]
        low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
        intervals |= {name: [float(low[i]), float(high[i])] for i, name in enumerate(names)}
    return means, {name: intervals[name] for name in columns}


def normalise(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al., 2016): lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def dpr_tokens(text: str) -> list[str]:
    """DPR's normalisation (Karpukhin et al., 2020): words and single marks of the decomposed text, in lower case."""
    return DPR_TOKEN.findall(unicodedata.normalize("NFD", text).lower())


def holds(passage: Sequence[str], answer: Sequence[str]) -> bool:
    """Whether the answer's tokens stand in the passage's, one after the other; none stand nowhere."""
    size, first = len(answer), answer[0] if answer else None
    return any(token == first and list(passage[at : at + size]) == list(answer) for at, token in enumerate(passage))


def exact_match(answer: str, gold: str) -> float:
    return float(normalise(answer) == normalise(gold))


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words, counted with repetition; of two empty answers 1."""
    ours, theirs = normalise(answer).split(), normalise(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = (collections.Counter(ours) & collections.Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


@dataclasses.dataclass(frozen=True)
class Metric:
    """A row of the table. Its value is that of one query (`ranking`), of one answer, or a likelihood's.

    `ranking(hits, num_relevant)`, `answer(answer, gold)`; likelihoods are computed together, in `evaluation`.
    """

    definition: str
    higher_is_better: bool
    needs: frozenset[str]  # of "retriever", "generator", "answers" (generated ones)
    shown: bool = False  # on the console; the record has all
    ranking: Callable[[Hits, Counts], Float[np.ndarray, " Q"]] | None = None
    answer: Callable[[str, str], float] | None = None


def _ranking(value: Callable[..., Float[np.ndarray, " Q"]], k: int, definition: str, *, shown: bool = False) -> Metric:
    return Metric(definition, True, frozenset({"retriever"}), shown, ranking=functools.partial(value, k=k))


def _found(definition: str, *needs: str, shown: bool = False) -> Metric:
    return Metric(definition, True, frozenset({"retriever", *needs}), shown)


def _likelihood(definition: str, *needs: str, shown: bool = False) -> Metric:
    return Metric(definition, False, frozenset({"generator", *needs}), shown)


def _answer(value: Callable[[str, str], float], definition: str) -> Metric:
    return Metric(definition, True, frozenset({"generator", "answers"}), shown=True, answer=value)


_AT_K = {
    "recall": (recall, "share of the relevant passages that are among the first k"),
    "hit_rate": (hit_rate, "share of queries with a relevant passage among the first k"),
    "precision": (precision, "share of the first k passages that are relevant"),
}
_SHOWN_AT_K = ("recall@1", "recall@10")
# Every metric of an evaluation, in the order in which they are shown; the record names them `eval/...`.
METRICS: dict[str, Metric] = {
    **{
        f"{name}@{k}": _ranking(value, k, definition, shown=f"{name}@{k}" in _SHOWN_AT_K)
        for k in CUTOFFS
        for name, (value, definition) in _AT_K.items()
    },
    "mrr@10": _ranking(mrr, 10, "mean of 1 / rank of the first relevant passage, 0 beyond rank 10", shown=True),
    "ndcg@10": _ranking(
        ndcg, 10, "sum of 1 / log2(1 + rank) of the relevant passages up to rank 10, as a share of the most possible",
        shown=True,
    ),
    f"map@{DEPTH}": _ranking(
        average_precision, DEPTH, "mean of the precision at the rank of each relevant passage, 0 beyond rank 100"
    ),
    **{
        f"{what}_hit@{k}": _found(f"share of queries with {definition} among the first k passages", *needs)
        for what, definition, needs in (
            ("answer", "the answer's text (DPR's normalisation)", ("generator",)),
            ("document", "a passage of the answer's document", ()),
        )
        for k in CUTOFFS
    },
    "answer_nll": _likelihood(
        "nats per answer token, end-of-sequence included: negative log marginal over the K passages of highest cosine, "
        "their weights softmax(cosine / marginal_temperature); without a retriever the own passage alone",
        shown=True,
    ),
    "answer_nll_gold": _likelihood("the same with the row's own passage alone", "retriever"),
    "answer_nll_top1": _likelihood("the same with the passage of highest cosine alone", "retriever"),
    "answer_nll_none": _likelihood("the same without a passage: the prompt with an empty one"),
    "retrieval_utility": _likelihood("answer_nll minus answer_nll_none: below 0 where passages help"),
    "em": _answer(exact_match, "share of greedy RAG-Token answers equal to the row's answer after SQuAD normalisation"),
    "f1": _answer(f1, "mean F1 of the words of greedy answer and row's answer after SQuAD normalisation"),
}  # fmt: skip
# By the names of the record: what `--step=best` and `eval.patience` compare by.
HIGHER_IS_BETTER = {f"eval/{name}": metric.higher_is_better for name, metric in METRICS.items()}


def needing(what: str) -> tuple[str, ...]:
    """Names of the metrics that there are only with a retriever, a generator or generated answers."""
    return tuple(name for name, metric in METRICS.items() if what in metric.needs)


def definitions() -> dict[str, str]:
    """What the record says of every metric; of cut-offs that share a definition once, as `recall@k`."""
    named: dict[str, str] = {}
    for name, metric in METRICS.items():
        first = named.setdefault(metric.definition, name)
        if first != name:
            named[metric.definition] = re.sub(r"@\d+$", "@k", name)
    return {f"eval/{name}": definition for definition, name in named.items()}


def ranking(hits: Hits, num_relevant: Counts) -> dict[str, Float[np.ndarray, " Q"]]:
    """All metrics of each query's retrieved passages."""
    return {name: m.ranking(hits, num_relevant) for name, m in METRICS.items() if m.ranking is not None}


def found(what: str, hits: Hits) -> dict[str, Float[np.ndarray, " Q"]]:
    """Whether each query's first k passages hold `what` there is, "answer" or "document", for every k."""
    return {f"{what}_hit@{k}": np.any(hits[:, :k], axis=1).astype(np.float64) for k in CUTOFFS}


def answers(generated: Sequence[str], gold: Sequence[Sequence[str]]) -> dict[str, Float[np.ndarray, " n"]]:
    """All metrics of each generated answer: the best over those that are accepted."""
    pairs = list(zip(generated, gold, strict=True))
    scores = {name: metric.answer for name, metric in METRICS.items() if metric.answer is not None}
    return {
        name: np.array([max(score(answer, each) for each in accepted) for answer, accepted in pairs])
        for name, score in scores.items()
    }
