"""Exact retrieval over a corpus: embedding texts, the highest-scoring passages.

**Q** queries, **M** passages of the corpus, **m** of a block, **K** retrieved passages, **E** embedding width, **d**
devices.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as PS
from jaxtyping import Array, Bool, Float, Int, Shaped

from rag_jax import rag
from rag_jax.data import segments
from rag_jax.distributed import sharding
from rag_jax.inference import programs
from rag_jax.progress import Counter

# Scores that exist at one time on a device: (queries, passages) float32 of at most this many numbers, 64 MB.
BLOCK_SCORES = 2**24
QUERIES_AT_A_TIME = 4096
# What of an accelerator's free memory a corpus may lie in; and bytes, where a device does not tell its memory.
PLACED_SHARE, PLACED_BYTES = 0.3, 2.0**30
# Neighbouring scores of which the highest is looked at first.
RUN = 128
# Batches that a device is handed before the first of them is done: it is never without work.
AHEAD = 3
# What a NaN score counts as: it ranks last, but before what is skipped (-inf).
LOWEST = np.finfo(np.float32).min


def size_for(needed: int, largest: int, *, steps: int = 4) -> int:
    """The smallest of `steps` even shares of `largest` that holds `needed`: few shapes, few compilations."""
    share = -(-largest // steps)
    return min(max(-(-needed // share), 1) * share, largest)


def full_batches(order: Int[np.ndarray, " n"], batch_size: int) -> Iterator[tuple[Int[np.ndarray, " b"], int]]:
    """`order` in batches of one size, the last filled up with copies of its first row; and how many rows are real."""
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows))]), len(rows)


def embed(
    model: rag.Rag, params: dict, tokens: segments.Ragged, *, batch_size: int, label: str, longest: int = 0
) -> Float[np.ndarray, "n E"]:
    """Embeddings of tokenised texts, in their order, on every process; every process must call.

    Texts of similar length share a batch, and the devices on which the parameters lie share the batches. A batch is
    padded to a share of `longest` (0: of the longest text), so that other texts are read by the same programs.
    """
    where, split = programs.placement(params, "retriever"), ((sharding.BATCH,) * 2, (sharding.BATCH,))
    encode = programs.compiled(_encode, model, where, split, **model.embedding)
    batch_size = -(-min(batch_size, len(tokens)) // where.shards) * where.shards
    lengths = tokens.lengths
    longest = longest or int(lengths.max())
    found: list[Any] = []
    order = np.argsort(-lengths, kind="stable")  # the longest first: too little memory shows at once
    with Counter(label, len(tokens), active=jax.process_index() == 0) as counter:
        for rows, real in full_batches(order, batch_size):
            batch = segments.pad(tokens, rows, size_for(int(lengths[rows].max()), longest))
            found.append((*encode(params["retriever"], *where.split_rows(*batch)), real))
            jax.block_until_ready(found[-AHEAD:][0])  # so that what is counted is nearly done
            counter.update(real)
    emb = np.empty((len(tokens), found[0][0].shape[-1]), np.float32)
    emb[order] = np.concatenate([sharding.to_host(part)[:real] for part, real in found])
    return emb


def _encode(
    retriever: Any, ids: Int[Array, "b L"], mask: Bool[Array, "b L"], **embedding: Any
) -> tuple[Float[Array, "b E"]]:
    return (rag.encode(retriever, ids, mask, **embedding),)


def top_k(
    query_emb: Float[np.ndarray, "Q E"],
    corpus: Any,
    k: int,
    *,
    recall_target: float = 1.0,
    at_most: Float[np.ndarray, " Q"] | None = None,
) -> tuple[Float[np.ndarray, "Q K"], Int[np.ndarray, "Q K"]]:
    """Scores and indices of each query's k nearest passages, nearest first; of equals the lower index first.

    Exact: every passage is scored, in blocks that all devices of all processes share; every process must call. The
    corpus is an array (M, E), which is laid on accelerators if it fits, or anything with a length and `block(start,
    stop)` that gives rows (m, E) of any number type and what to multiply the scores of each with, (m,) or None: a
    corpus on disk is read once for 4,096 queries. k is cut to the number of passages. `at_most`: passages that score
    above it are skipped; where fewer than k are left, the last scores are -inf and their indices mean nothing. A NaN
    score ranks last. `recall_target` below 1: TPUs may miss that many, for speed (`jax.lax.approx_max_k`).
    """
    if not len(corpus):
        raise ValueError("no passage to retrieve from")
    k, corpus = min(k, len(corpus)), placed(corpus)
    batch_size = min(len(query_emb), QUERIES_AT_A_TIME)
    found = []
    for batch, real in full_batches(np.arange(len(query_emb)), batch_size):
        ceiling = None if at_most is None else np.asarray(at_most[batch], np.float32)
        if isinstance(corpus, Placed):
            best = _where_it_lies(query_emb[batch], corpus, k, ceiling, recall_target)
        elif _is_host():
            best = _on_host(query_emb[batch], corpus, k, ceiling)
        else:
            best = _on_devices(query_emb[batch], corpus, k, ceiling, recall_target)
        found.append(tuple(part[:real] for part in best))
    score, index = zip(*found, strict=True)
    return np.concatenate(score), np.concatenate(index)


@dataclasses.dataclass(frozen=True)
class Held:
    """A corpus in memory."""

    emb: np.ndarray  # (M, E)

    def __len__(self) -> int:
        return len(self.emb)

    def block(self, start: int, stop: int) -> tuple[np.ndarray, None]:
        return self.emb[start:stop], None


@dataclasses.dataclass(frozen=True)
class Placed:
    """A corpus in the memory of all devices, each of which holds a share of it; the last ones are filled up."""

    mesh: Mesh
    emb: Float[Array, "dm E"]
    num_passages: int

    def __len__(self) -> int:
        return self.num_passages


@dataclasses.dataclass(frozen=True)
class Leading:
    """The embeddings that the first channels of a corpus' are, normalised where `unit`."""

    corpus: Any  # an array, or what has `block`
    width: int
    unit: bool

    def __len__(self) -> int:
        return len(self.corpus)

    def block(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        corpus = Held(self.corpus) if isinstance(self.corpus, np.ndarray) else self.corpus
        rows, scale = corpus.block(start, stop)
        rows = rows[:, : self.width]
        if not self.unit:
            return rows, scale
        return rows, (1.0 / np.maximum(np.linalg.norm(rows.astype(np.float32), axis=1), 1e-12)).astype(np.float32)


def placed(corpus: Any) -> Any:
    """The corpus as it is searched best again and again: an array on accelerators, if it fits; every process must call.

    Any other, and one that lies there already, as it is.
    """
    if not isinstance(corpus, np.ndarray):
        return corpus
    mesh, num_passages = _mesh(), len(corpus)
    share = -(-num_passages // mesh.size)
    if _is_host() or share * corpus[:1].nbytes > _room():
        return Held(corpus)

    def own(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(share * mesh.size)
        found = corpus[start:stop]
        missing = stop - start - len(found)
        return np.pad(found, ((0, missing), (0, 0))) if missing else found

    shape = (share * mesh.size, *corpus.shape[1:])
    return Placed(mesh, jax.make_array_from_callback(shape, NamedSharding(mesh, PS("all")), own), num_passages)


def _is_host() -> bool:
    """Whether one CPU computes, where numpy's products are faster than XLA's."""
    devices = jax.devices()
    return len(devices) == 1 and devices[0].platform == "cpu"


def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("all",))


def _room() -> float:
    """Bytes that a corpus may take of each device; the same on all processes if their devices hold the same."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return PLACED_BYTES
    return PLACED_SHARE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0))


def _on_host(
    query_emb: Float[np.ndarray, "Q E"], corpus: Any, k: int, ceiling: Float[np.ndarray, " Q"] | None
) -> tuple[Float[np.ndarray, "Q K"], Int[np.ndarray, "Q K"]]:
    """`top_k` on one CPU.

    Once k passages are known few others score above the last of them, and only those are sorted.
    """
    Q, num_passages = len(query_emb), len(corpus)
    rows = min(max(BLOCK_SCORES // Q, k), num_passages)
    score, index = np.zeros((Q, 0), np.float32), np.zeros((Q, 0), np.int32)
    room = np.empty(Q * rows, np.float32)  # new memory for every block would cost as much as a fifth of its products
    for start in range(0, num_passages, rows):
        values, scale = corpus.block(start, min(start + rows, num_passages))
        scores = room[: Q * len(values)].reshape(Q, -1)
        np.matmul(query_emb, values.astype(np.float32, copy=False).T, out=scores)
        if scale is not None:
            scores *= scale
        np.fmax(scores, LOWEST, out=scores)
        if ceiling is not None:
            scores[scores > ceiling[:, None]] = -np.inf
        if not start:
            better = scores >= np.partition(scores, -k, axis=1)[:, -k, None]
        else:
            better = scores > score[:, -1:]  # of equals the one found before stays
        row, place = np.divmod(np.flatnonzero(better), len(values))
        number = np.bincount(row, minlength=Q)
        column = np.arange(len(row)) - np.repeat(number.cumsum() - number, number)
        more = np.full((Q, number.max()), -np.inf, np.float32)
        more_index = np.zeros(more.shape, np.int32)
        more[row, column], more_index[row, column] = scores[row, place], start + place
        score, index = (np.concatenate(both, axis=1) for both in ((score, more), (index, more_index)))
        order = np.argsort(-score, axis=1, kind="stable")[:, :k]
        score, index = (np.take_along_axis(a, order, axis=1) for a in (score, index))
    return score, index


def _on_devices(
    query_emb: Float[np.ndarray, "Q E"],
    corpus: Any,
    k: int,
    ceiling: Float[np.ndarray, " Q"] | None,
    recall_target: float,
) -> tuple[Float[np.ndarray, "Q K"], Int[np.ndarray, "Q K"]]:
    """`top_k` of which each device scores a share of every block."""
    mesh, num_passages = _mesh(), len(corpus)
    rows = min(max(BLOCK_SCORES // len(query_emb), 1) * mesh.size, num_passages)
    rows = -(-rows // mesh.size) * mesh.size
    queries, best = _put(mesh, query_emb, PS()), _nothing(mesh, len(query_emb), k)
    limit = None if ceiling is None else _put(mesh, ceiling, PS())
    for start in range(0, num_passages, rows):
        values, scale = corpus.block(start, min(start + rows, num_passages))
        scale = np.ones(len(values), np.float32) if scale is None else scale
        if missing := rows - len(values):
            values, scale = np.pad(values, ((0, missing), (0, 0))), np.pad(scale, (0, missing))
        block = [_put(mesh, array, PS("all")) for array in (values, scale)]
        jax.block_until_ready(best)  # one block waits while another is scored; more would only take memory
        best = _advance(mesh, recall_target, queries, *block, *best, start, num_passages, limit)
    score, index = _merge(mesh, *best)
    return sharding.to_host(score), sharding.to_host(index)


def _where_it_lies(
    query_emb: Float[np.ndarray, "Q E"],
    corpus: Placed,
    k: int,
    ceiling: Float[np.ndarray, " Q"] | None,
    recall_target: float,
) -> tuple[Float[np.ndarray, "Q K"], Int[np.ndarray, "Q K"]]:
    """`top_k` of which each device scores its own share of the corpus, in one program."""
    mesh, share = corpus.mesh, len(corpus.emb) // corpus.mesh.size
    rows = min(max(BLOCK_SCORES // len(query_emb), 1), share)
    limit = None if ceiling is None else _put(mesh, ceiling, PS())
    best = _nothing(mesh, len(query_emb), k)
    queries = _put(mesh, query_emb, PS())
    best = _search(mesh, rows, recall_target, queries, corpus.emb, *best, corpus.num_passages, limit)
    score, index = _merge(mesh, *best)
    return sharding.to_host(score), sharding.to_host(index)


def _put(mesh: Mesh, array: np.ndarray, spec: PS) -> jax.Array:
    """A global array of what every process holds all of."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def _nothing(mesh: Mesh, num_queries: int, k: int) -> tuple[jax.Array, jax.Array]:
    """The best (Q, d k) of no passage: k of each device, side by side."""
    shape = (num_queries, mesh.size * k)
    score, index = np.full(shape, -np.inf, np.float32), np.full(shape, np.iinfo(np.int32).max, np.int32)
    return _put(mesh, score, PS(None, "all")), _put(mesh, index, PS(None, "all"))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(5, 6))
def _advance(
    mesh: Mesh,
    recall_target: float,
    query_emb: Float[Array, "Q E"],
    passages: Shaped[Array, "m E"],
    scale: Float[Array, " m"],
    score: Float[Array, "Q dk"],
    index: Int[Array, "Q dk"],
    start: Int[Array, ""] | int,
    num_passages: Int[Array, ""] | int,
    ceiling: Float[Array, " Q"] | None,
) -> tuple[Float[Array, "Q dk"], Int[Array, "Q dk"]]:
    """Each device's k best so far and of its share of the block that begins with passage `start`."""

    def own(
        query_emb: Any, passages: Any, scale: Any, score: Any, index: Any, start: Any, num_passages: Any, ceiling: Any
    ) -> Any:
        number = start + jax.lax.axis_index("all") * len(passages) + jnp.arange(len(passages))
        there = number < num_passages
        return _better(recall_target, query_emb, passages, scale, score, index, number, there, ceiling)

    best = PS(None, "all")
    specs = (PS(), PS("all"), PS("all"), best, best, PS(), PS(), PS())
    split = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=(best, best), check_vma=False)
    return split(query_emb, passages, scale, score, index, jnp.int32(start), jnp.int32(num_passages), ceiling)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(5, 6))
def _search(
    mesh: Mesh,
    rows: int,
    recall_target: float,
    query_emb: Float[Array, "Q E"],
    passages: Float[Array, "dm E"],
    score: Float[Array, "Q dk"],
    index: Int[Array, "Q dk"],
    num_passages: Int[Array, ""] | int,
    ceiling: Float[Array, " Q"] | None,
) -> tuple[Float[Array, "Q dk"], Int[Array, "Q dk"]]:
    """Each device's k best of its share of the corpus, `rows` of it at a time."""

    def own(query_emb: Any, passages: Any, score: Any, index: Any, num_passages: Any, ceiling: Any) -> Any:
        share = len(passages)
        first = jax.lax.axis_index("all") * share

        def block(n: Any, best: Any) -> Any:
            # The last one begins earlier, so that it is as long; what of it was scored before is passed over.
            start = jnp.minimum(n * rows, share - rows)
            values = jax.lax.dynamic_slice_in_dim(passages, start, rows)
            place = start + jnp.arange(rows)
            there = (place >= n * rows) & (first + place < num_passages)
            score, index = best
            return _better(recall_target, query_emb, values, 1.0, score, index, first + place, there, ceiling)

        return jax.lax.fori_loop(0, -(-share // rows), block, (score, index))

    best = PS(None, "all")
    specs = (PS(), PS("all"), best, best, PS(), PS())
    split = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=(best, best), check_vma=False)
    return split(query_emb, passages, score, index, jnp.int32(num_passages), ceiling)


def _better(
    recall_target: float,
    query_emb: Float[Array, "Q E"],
    passages: Shaped[Array, "m E"],
    scale: Float[Array, " m"] | float,
    score: Float[Array, "Q K"],
    index: Int[Array, "Q K"],
    number: Int[Array, " m"],
    there: Bool[Array, " m"],
    ceiling: Float[Array, " Q"] | None,
) -> tuple[Float[Array, "Q K"], Int[Array, "Q K"]]:
    """The best of these passages, of which some are `there`, and of those found before, whose numbers are lower."""
    # The default precision of a product on TPU and GPU is lower than float32 and would change ranks.
    product = functools.partial(jnp.einsum, "QE,mE->Qm", precision=jax.lax.Precision.HIGHEST)
    scores = jnp.fmax(product(query_emb, passages.astype(jnp.float32)) * scale, LOWEST)
    scores = jnp.where(there, scores, -jnp.inf)
    if ceiling is not None:
        scores = jnp.where(scores > ceiling[:, None], -jnp.inf, scores)
    block_score, place = best_of_rows(scores, min(score.shape[1], len(passages)), recall_target)
    # What was found before stands in front: of equals it wins, and its indices are lower.
    joined = jnp.concatenate([score, block_score], axis=1)
    score, chosen = jax.lax.top_k(joined, score.shape[1])
    return score, jnp.take_along_axis(jnp.concatenate([index, number[place]], axis=1), chosen, axis=1)


def best_of_rows(
    scores: Float[Array, "Q m"], k: int, recall_target: float = 1.0
) -> tuple[Float[Array, "Q K"], Int[Array, "Q K"]]:
    """`jax.lax.top_k`, of equals the lower index first, without sorting long rows.

    The k best of a row lie in the k runs of `RUN` neighbours with the highest maxima (of equals the earlier ones), so
    only these are sorted.
    """
    if recall_target < 1:
        score, index = jax.lax.approx_max_k(scores, k, recall_target=recall_target)
        return score, index.astype(jnp.int32)
    Q, m = scores.shape
    if m <= 2 * k * RUN:
        score, index = jax.lax.top_k(scores, k)
        return score, index
    runs = jnp.pad(scores, ((0, 0), (0, -m % RUN)), constant_values=-jnp.inf).reshape(Q, -1, RUN)
    highest = jnp.sort(jax.lax.top_k(runs.max(axis=2), k)[1], axis=1)
    score, place = jax.lax.top_k(jnp.take_along_axis(runs, highest[:, :, None], axis=1).reshape(Q, k * RUN), k)
    return score, jnp.take_along_axis(highest, place // RUN, axis=1) * RUN + place % RUN


@functools.partial(jax.jit, static_argnums=0)
def _merge(
    mesh: Mesh, score: Float[Array, "Q dk"], index: Int[Array, "Q dk"]
) -> tuple[Float[Array, "Q K"], Int[Array, "Q K"]]:
    """The best of all devices, on all of them."""
    k = score.shape[1] // mesh.size
    score, index = (jax.lax.with_sharding_constraint(a, NamedSharding(mesh, PS())) for a in (score, index))
    descending, index = jax.lax.sort((-score, index), num_keys=2)
    return -descending[:, :k], index[:, :k]
