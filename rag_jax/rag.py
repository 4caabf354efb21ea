"""The composite of both models: encode, choose candidates, answer log-probabilities, marginal, total loss.

**B** queries of the global batch, **P** its passages, **b** rows of one device, **g** rows of a group and **p** slots
for its passages, **S** of them beside each row (p = g S), **m** groups that are read together, **K** candidates, **R**
passages that are known to answer a query, **T** answer tokens, **L** sequence (**Lp** prefix, **Ls** suffix), **E**
embedding width, **D** model width, **V** vocabulary, **n** rows of any kind.

`loss` runs on each device's own rows. Embeddings are all that it fetches of the others' (`Shard.from_all`): candidates,
and with them the generator's keys and values, are of a group, and a group lies on one device.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from rag_jax import losses
from rag_jax.data.batches import Batch
from rag_jax.data.shapes import Packed, blocks_of
from rag_jax.losses import Term
from rag_jax.models import adapters, layers, quantised
from rag_jax.models.decoder import Decoder
from rag_jax.models.layers import named_keys, several_keys
from rag_jax.models.packing import packed, packing_of, repeated, unpacked
from rag_jax.models.rows import taken
from rag_jax.objectives import OBJECTIVES, Formula

jax.tree_util.register_static(Packed)

# How token states become one vector.
MEANS = ("mean", "mean_sqrt_len", "weighted_mean")
POOLING = ("cls", "last", "max", *MEANS)
# Passages besides the known ones that evidence may make right for a query, the best ones.
MORE_RIGHT = 3
# Scores that exist at one time on a device in the contrastive loss, 16 MB for rows and for columns.
CONTRASTIVE_SCORES = 2**22

# (path of the parameters, the parameters or one layer of them, dtype of what is sent, dtype) -> whole ones.
Gather = Callable[[tuple[str, ...], Any, Any, Any], Any]
# Of the same rows' queries, and of the passages in the slots beside them.
Embs = tuple[Float[Array, "b E"], Float[Array, "b S E"]]
BlockEmbs = tuple[Float[Array, "m g E"], Float[Array, "m g S E"]]  # of m groups
Keys = Key[Array, " b"] | None  # dropout's, one a row; None: no dropout


class Candidates(NamedTuple):
    """What each row of m groups reads."""

    slot: Int[Array, "m g K"]  # of the group's p
    cosine: Float[Array, "m g K"]  # -inf: it may read no more
    right: Bool[Array, "m g K"]  # known to answer its query


class Suffixes(NamedTuple):
    """log p of tokens of each row's suffix behind its candidates, and which they are.

    Of the question the first token is missing: the passage alone predicts it.
    """

    log_probs_bKT: Float[Array, "b K T"]
    answer_bT: Bool[Array, "b T"]
    question_bT: Bool[Array, "b T"]

    def evidence_masks(self, evidence: str) -> list[Bool[Array, "b T"]]:
        """The tokens of every part of what `Objective.evidence` names."""
        masks = {"answer": [self.answer_bT], "question": [self.question_bT]}
        return masks.get(evidence) or [self.question_bT, self.answer_bT]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss as the config states it."""

    name: str  # a key of objectives.OBJECTIVES
    candidates: int  # K
    temperature: float
    marginal_temperature: float
    contrastive_weight: float
    marginal_weight: float
    document_weight: float = 0.0
    negatives: int = 0  # J
    candidates_from: str = "group"  # "group" | "row": a row reads its group's passages, or those that it brings
    evidence: str = "answer"  # "answer" | "question" | "both": the tokens whose likelihood a listwise objective reads
    evidence_temperature: float = 1.0
    evidence_weight: float = 1.0
    label_noise: float | None = None  # margin of `losses.corrected_labels`, nats a token; None: labels are right
    label_share: float = 0.0  # of the target of a listwise objective, where a row has a label
    kept_evidence: str = "auto"  # "auto" | "never": whether it may be known before the step

    @property
    def formula(self) -> Formula:
        return OBJECTIVES[self.name]

    @property
    def uses_generator(self) -> bool:
        return self.formula.uses_generator(self.marginal_weight, self.evidence_weight)

    @property
    def uses_retriever(self) -> bool:
        weights = self.contrastive_weight + self.document_weight, self.marginal_weight, self.evidence_weight
        return self.formula.uses_retriever(self.candidates, *weights)

    def summed(self, read: "Suffixes") -> Float[Array, "B K"]:
        """Evidence of the candidates that were read."""
        masks = read.evidence_masks(self.evidence)
        sums = [jnp.sum(jnp.where(mask_BT[:, None], read.log_probs_bKT, 0.0), axis=-1) for mask_BT in masks]
        return self.evidence_of(sums, [jnp.sum(mask_BT, axis=-1, keepdims=True) for mask_BT in masks])

    def evidence_of(self, sums: Sequence[Any], counts: Sequence[Any]) -> Any:
        """Evidence from the sum of log p over each part's tokens and how many they are (arrays of any kind).

        Of a distribution over candidates the mean over all of these tokens, divided by `evidence_temperature`; of a
        marginal, which is a probability of them all, the sum.
        """
        total: Any = sum(sums[1:], sums[0])
        count: Any = sum(counts[1:], counts[0])
        return total if self.formula.divergence == "emdr2" else total / count.clip(1) / self.evidence_temperature

    def doc_log_probs(self, cosine_BK: Float[Any, "B K"]) -> Float[Array, "B K"]:
        """log p(k | query) over the candidates that are read, from their cosines."""
        return losses.doc_log_probs(jnp.asarray(cosine_BK) / self.marginal_temperature)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Where one device's rows stand in the global batch, and what it asks of the other devices."""

    axes: tuple[str, ...] = ()  # of the mesh, over which the batch is split; (): all of it is here

    def from_all(self, rows_b: Shaped[Array, "b ..."]) -> Shaped[Array, "B ..."]:
        """The rows of the global batch, of which this device has b, in their order."""
        return jax.lax.all_gather(rows_b, self.axes, tiled=True) if self.axes else rows_b

    def total(self, count: Array) -> Array:
        """The sum over all devices, of counts and metrics only: never of what is differentiated.

        The transpose of a psum is a psum here, so its gradient would be summed once more for each device.
        """
        return jax.lax.psum(count, self.axes) if self.axes else count

    def positions(self, num_rows: int) -> Int[Array, " b"]:
        """Where in the global batch this device's rows stand."""
        first = jax.lax.axis_index(self.axes) * num_rows if self.axes else 0
        return first + jnp.arange(num_rows)


@dataclasses.dataclass(frozen=True)
class Rag:
    """Everything about the loss that is not an array."""

    objective: Objective
    retriever: nnx.GraphDef | None
    generator: nnx.GraphDef | None
    pooling: str  # of POOLING, or several of them joined by +
    group_size: int  # g
    dtype: Any = jnp.float32
    chunk_size: int = 0  # rows that the retriever encodes at a time on a device; 0: all
    groups_at_a_time: int = 1  # that the generator reads
    head_chunk: int = 512  # tokens whose logits exist at a time
    trains_generator: bool = True  # some of its parameters; else nothing is computed for their gradients
    labelled: bool = True  # of every row a passage is known that answers its query
    shard: Shard = Shard()
    gather: Gather | None = None  # brings shared parameters together; None: they are whole
    similarity: str = "cosine"  # "cosine" | "dot", of embeddings
    truncate_dim: int | None = None  # leading channels that are an embedding; None: all
    matryoshka_dims: tuple[int, ...] = ()  # fewer of them that are embeddings too

    def model(self, name: str, params: dict) -> Any:
        """A model over float32 parameters; those of its layers are made ready one layer at a time.

        Kernels and adapters of layers are cast to the compute dtype. What else there is adds up gradients of many
        tokens, and stays.
        """
        rest = {part: leaf for part, leaf in params[name].items() if part != "layers"}
        stacked = params[name]["layers"]
        if self.gather is not None:
            rest = self.gather((name,), rest, self.dtype, jnp.float32)
        if self.gather is not None or self.dtype != jnp.float32:
            stacked = layers.deferred(stacked, lambda path, leaf: self._ready((name, "layers", *path), leaf))
        return nnx.merge(getattr(self, name), rest | {"layers": stacked})

    @property
    def embedding(self) -> dict[str, Any]:
        """How `encode` makes an embedding, by the names of its arguments."""
        return {name: getattr(self, name) for name in ("pooling", "similarity", "truncate_dim")}

    def in_groups(self, rows: Any) -> Any:
        """Arrays of rows with a leading axis of groups."""
        return jax.tree.map(lambda a: a.reshape(-1, self.group_size, *a.shape[1:]), rows)

    def cast(self, params: dict) -> dict:
        """Parameters that are only read, in the compute dtype: once, not at every token that is decoded."""
        wide = ("bias", "scale", *quantised.LEAVES)
        cast = lambda path, a: a if path[-1].key in wide else a.astype(self.dtype)  # noqa: E731
        return jax.tree_util.tree_map_with_path(cast, params)

    def _ready(self, path: tuple[str, ...], leaf: Array) -> Array:
        """One layer's parameter, whole, as the layer computes with it."""
        dtype = self.dtype if path[-1] in ("kernel", *adapters.LEAVES) else jnp.float32
        if path[-1] in quantised.LEAVES:
            dtype = leaf.dtype
        if self.gather is not None:
            return self.gather(path[:-1], {path[-1]: leaf}, dtype, dtype)[path[-1]]
        return leaf.astype(dtype)


def loss(
    rag: Rag, params: dict, batch: Batch, key: Key[Array, ""] | None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The sum of the terms, each times its weight (`contrastive_weight` and so on); and each by its metric name.

    Of a batch split over devices each computes its rows' share; the loss is their sum, and so is its gradient.
    """
    keys = row_keys(rag, batch, key)
    embs = embed(rag, params, batch, keys) if rag.objective.uses_retriever else None
    shares: dict[str, Float[Array, ""]] = {}
    total = jnp.zeros(())
    for name, (nats_b, count_b) in terms(rag, params, batch, embs, keys).items():
        share = jnp.sum(nats_b) / jnp.maximum(rag.shard.total(jnp.sum(count_b)), 1)
        shares[f"loss/{name}"] = share
        total += getattr(rag.objective, f"{name}_weight") * share
    return total, shares | {"loss/total": total}


def terms(rag: Rag, params: dict, batch: Batch, embs: Embs | None, keys: Keys) -> dict[str, Term]:
    """The terms of the loss that have a weight, for this device's rows."""
    objective, named = rag.objective, {}
    if embs is not None and objective.contrastive_weight != 0:
        named["contrastive"] = contrastive_term(rag, batch, embs)
    if embs is not None and objective.document_weight != 0 and batch.document is not None:
        named["document"] = document_term(rag, batch, embs)
    if objective.uses_generator or batch.evidence is not None:
        named |= READS[objective.formula.reads](rag, params, batch, embs, named_keys(keys, "generator"))
    return named


def row_keys(rag: Rag, batch: Batch, key: Key[Array, ""] | None) -> Keys:
    """A key for each row by its place in the global batch, so that dropout does not depend on the devices."""
    if key is None:
        return None
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rag.shard.positions(len(batch.query_key)))


def pool(hidden_BLD: Float[Array, "B L D"], mask_BL: Bool[Array, "B L"], mode: str) -> Float[Array, "B E"]:
    """One vector a row, of its real tokens: the first ("cls"), the last, the mean, or another of POOLING.

    Of several modes, joined by +, their vectors side by side.
    """
    if "+" in mode:
        return jnp.concatenate([pool(hidden_BLD, mask_BL, one) for one in mode.split("+")], axis=1)
    if mode == "max":
        return jnp.max(jnp.where(mask_BL[:, :, None], hidden_BLD.astype(jnp.float32), -1e9), axis=1)
    if mode in MEANS:
        weights_BL1 = mask_BL[:, :, None].astype(jnp.float32)
        if mode == "weighted_mean":  # the first token counts once, the second twice, and so on
            weights_BL1 *= layers.positions_of(mask_BL)[:, :, None] + 1
        total_BD = jnp.sum(hidden_BLD.astype(jnp.float32) * weights_BL1, axis=1)
        count_B1 = jnp.maximum(jnp.sum(weights_BL1, axis=1), 1.0)
        return total_BD / (jnp.sqrt(count_B1) if mode == "mean_sqrt_len" else count_B1)
    L = mask_BL.shape[1]
    index_B = jnp.argmax(mask_BL, axis=1) if mode == "cls" else L - 1 - jnp.argmax(mask_BL[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden_BLD, index_B[:, None, None], axis=1)[:, 0].astype(jnp.float32)


def encode(
    retriever: Callable[..., Array],
    ids_BL: Int[Array, "B L"],
    mask_BL: Bool[Array, "B L"],
    pooling: str,
    dropout_keys: Key[Array, " B"] | None = None,
    similarity: str = "cosine",
    truncate_dim: int | None = None,
    num_tokens: int = 0,
) -> Float[Array, "B E"]:
    """Pooled embeddings, float32, so that their inner product is the similarity: of a cosine they are L2-normalised.

    `num_tokens`: that are packed, see `packing_of`.
    """
    hidden_BLD = retriever(ids_BL, mask_BL, dropout_keys, num_tokens)
    emb_BE, projection = pool(hidden_BLD, mask_BL, pooling), getattr(retriever, "projection", None)
    emb_BE = (emb_BE if projection is None else projection(emb_BE))[:, :truncate_dim]
    return emb_BE if similarity == "dot" else normalised(emb_BE)


def normalised(emb_nE: Float[Array, "n E"]) -> Float[Array, "n E"]:
    """Each row divided by its norm. A row of zeros stays zeros, with a zero gradient where that of its norm is NaN."""
    square_n1 = jnp.sum(emb_nE**2, axis=-1, keepdims=True)
    is_zero_n1 = square_n1 == 0  # asked like this, NaN stays NaN
    norm_n1 = jnp.sqrt(jnp.where(is_zero_n1, 1.0, square_n1))
    return jnp.where(is_zero_n1, 0.0, emb_nE / jnp.maximum(norm_n1, 1e-12))


def leading(emb: Float[Array, "... E"], width: int, similarity: str) -> Float[Array, "... W"]:
    """The embedding that the first `width` channels are, as `encode` gives them."""
    emb = emb[..., :width]
    return emb if similarity == "dot" else normalised(emb.reshape(-1, width)).reshape(emb.shape)


def first_copies(keys_n: Int[Array, " n"]) -> Bool[Array, " n"]:
    """Which keys no earlier one equals."""
    order = jnp.argsort(keys_n, stable=True)
    ordered = keys_n[order]
    is_first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    return is_first[jnp.argsort(order)]


def known_right(right_key_nR: Int[Array, "n R"], passage_key_p: Int[Array, " p"]) -> Bool[Array, "n p"]:
    """Which passages are known to answer the queries of which rows; -1 is no passage."""
    return jnp.any(right_key_nR[:, None] == passage_key_p[:, None], axis=-1) & (passage_key_p >= 0)


def choose_candidates(
    cosine_gp: Float[Array, "g p"], right_gp: Bool[Array, "g p"], num_candidates: int
) -> Int[Array, "g K"]:
    """Each row's right passages, then the others, by falling score; -inf comes last."""
    score_gp = jax.lax.stop_gradient(cosine_gp)
    falling_gp = jnp.where(jnp.isnan(score_gp), -jnp.inf, -score_gp)  # NaN first: it must not go unnoticed
    order_gp = jnp.lexsort((falling_gp, ~(right_gp & (score_gp > -jnp.inf))))
    return order_gp[:, :num_candidates].astype(jnp.int32)


def answer_log_probs(
    generator: Decoder,
    hidden_BKLD: Float[Array, "B K Ls D"],
    suffix_ids_BL: Int[Array, "B Ls"],
    answer_start_B: Int[Array, " B"],
    asked_BT: Bool[Array, "B T"],
    chunk: int = 512,
    num_tokens: int = 0,
) -> Float[Array, "B K T"]:
    """token_log_probs: log p(y_t | passage k, query, y_<t), T tokens from `answer_start` on; of those not asked, noise.

    `num_tokens`: as many as are asked for at least, of which alone logits are computed; 0: of all.
    """
    B, K, Ls, D = hidden_BKLD.shape
    index_BT = jnp.minimum(answer_start_B[:, None] + jnp.arange(asked_BT.shape[1]), Ls - 1)
    ids_BT = jnp.take_along_axis(suffix_ids_BL, index_BT, axis=1)
    of_pair = jax.vmap(lambda hidden_LD, index_T: taken(hidden_LD, index_T, hidden_LD.dtype), (0, None))
    before_BKTD = jax.vmap(of_pair)(hidden_BKLD, index_BT - 1)
    packing = repeated(packing_of(asked_BT, num_tokens), K)
    before, ids = (packed(a, packing) for a in (before_BKTD.reshape(B * K, -1, D), jnp.repeat(ids_BT, K, axis=0)))
    log_probs = generator.gold_log_probs(before.reshape(-1, D), ids.reshape(-1), chunk)
    return unpacked(log_probs.reshape(ids.shape), packing).reshape(B, K, -1)


def candidates_of(rag: Rag, groups: Batch, embs: BlockEmbs | None) -> Candidates:
    """K of its group's passages for each row, the right ones first; without scores the first right one alone."""
    choose = functools.partial(group_candidates, rag.objective.candidates if embs is not None else 1)
    return jax.vmap(choose, (0, None if embs is None else 0))(groups, embs)


def group_candidates(num_candidates: int, group: Batch, embs: Embs | None) -> Candidates:
    """As `candidates_of`, of one group."""
    key_p = group.pool.key.ravel()
    right_gp = known_right(group.right_key, key_p)
    readable_gp = jnp.broadcast_to(key_p >= 0, right_gp.shape)
    if group.readable is not None:
        readable_gp &= group.readable | right_gp
    if group.evidence is not None:
        readable_gp &= ~jnp.isnan(group.evidence)
    cosine_gp = jnp.zeros(right_gp.shape)
    if embs is not None:
        query_emb_gE, pool_emb_gSE = embs
        cosine_gp = cosines(query_emb_gE, pool_emb_gSE.reshape(len(key_p), -1))
    cosine_gp = jnp.where(readable_gp, cosine_gp, -jnp.inf)
    slot_gK = choose_candidates(cosine_gp, right_gp, num_candidates)
    cosine_gK, right_gK = (jnp.take_along_axis(a, slot_gK, axis=1) for a in (cosine_gp, right_gp))
    return Candidates(slot_gK, cosine_gK, right_gK)


def block_log_probs(
    rag: Rag, generator: Decoder, block: Batch, block_embs: BlockEmbs | None, keys: Any
) -> tuple[Float[Array, "b K"], Float[Array, "b K T"]]:
    """Of the b = m g rows of m groups with K passages of their group each: doc_log_probs and token_log_probs.

    `block`: with a leading axis of groups, as are the others. Where a row may read fewer than K passages, the others
    have a doc_log_prob of -inf.
    """
    candidates = candidates_of(rag, block, block_embs)
    rows, hidden_bKLD = read_block(generator, block, candidates.slot, keys)
    token_log_probs_bKT = answer_log_probs(
        generator, hidden_bKLD, rows.suffix_ids, rows.answer_start, rows.answer_mask, rag.head_chunk, rows.packed.answer
    )
    return rag.objective.doc_log_probs(candidates.cosine.reshape(len(rows.row), -1)), token_log_probs_bKT


def read_block(
    generator: Decoder, block: Batch, slot_mgK: Int[Array, "m g K"], keys: Any
) -> tuple[Batch, Float[Array, "b K Ls D"]]:
    """The b = m g rows of m groups, and the hidden states of their suffixes behind K passages of their groups each.

    Of one passage a row those alone are run, of several all that the groups hold.
    """
    m, g, K = slot_mgK.shape
    rows, row_keys = jax.tree.map(lambda a: a.reshape(m * g, *a.shape[2:]), (block, keys))
    prefix = tuple(a.reshape(-1, a.shape[-1]) for a in (rows.pool.prefix_ids, rows.pool.prefix_mask))
    place_bK = (slot_mgK + jnp.arange(m, dtype=jnp.int32)[:, None, None] * (len(prefix[0]) // m)).reshape(m * g, K)
    num_tokens = rows.packed.prefix, rows.packed.suffix
    if K == 1:
        prefix, place_bK = tuple(a[place_bK[:, 0]] for a in prefix), jnp.arange(m * g, dtype=jnp.int32)[:, None]
        num_tokens = 0, rows.packed.suffix
    suffix = rows.suffix_ids, rows.suffix_mask
    return rows, generator.forward_shared_prefix(prefix, suffix, place_bK, row_keys, num_tokens)


def map_rows(fn: Callable[[Any], Any], rows: Any, at_most: int) -> Any:
    """`fn` of blocks of at most `at_most` neighbouring rows, one block after another under rematerialisation.

    Memory is that of one block. Blocks are even: where they do not divide the rows, the last is filled up with copies
    of the last row, whose results are dropped.
    """
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    places = blocks_of(num_rows, at_most)
    num_blocks, size = places.shape
    if num_blocks <= 1:
        return fn(rows)
    if num_blocks * size != num_rows:
        rows = jax.tree.map(lambda a: a[places.ravel()], rows)
    blocks = jax.tree.map(lambda a: a.reshape(num_blocks, size, *a.shape[1:]), rows)
    results = jax.lax.map(jax.checkpoint(fn), blocks)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:num_rows], results)


def encode_in_chunks(
    rag: Rag,
    retriever: Callable[..., Array],
    ids_nL: Int[Array, "n L"],
    mask_nL: Bool[Array, "n L"],
    keys: Keys,
    num_tokens: int = 0,
) -> Float[Array, "n E"]:
    """`encode`, at most `rag.chunk_size` rows at a time on a device: of the others only embeddings are in memory.

    `num_tokens`: that are packed, of all rows; where they are read in chunks, 0.

    What GradCache (Gao et al., 2021) does by hand, the backward pass of a rematerialised loop does by itself.
    """

    def chunk(chunk_rows: Any) -> Float[Array, "n E"]:
        ids, mask, chunk_keys = chunk_rows
        return encode(retriever, ids, mask, dropout_keys=chunk_keys, num_tokens=num_tokens, **rag.embedding)

    return map_rows(chunk, (ids_nL, mask_nL, keys), rag.chunk_size or len(ids_nL))


def cosines(query_emb_BE: Float[Array, "B E"], passage_emb_PE: Float[Array, "P E"]) -> Float[Array, "B P"]:
    """Of normalised embeddings, in float32 also where a device's products are rougher by default."""
    return jnp.matmul(query_emb_BE, passage_emb_PE.T, precision=jax.lax.Precision.HIGHEST)


def embed(rag: Rag, params: dict, batch: Batch, keys: Keys) -> Embs:
    """What the retriever makes of the rows' queries and of the passages beside them."""
    encode = functools.partial(encode_in_chunks, rag, rag.model("retriever", params))
    query_emb_bE = encode(batch.query_ids, batch.query_mask, named_keys(keys, "query"), batch.packed.query)
    b, S, L = batch.pool.passage_ids.shape
    ids, mask = (a.reshape(b * S, L) for a in (batch.pool.passage_ids, batch.pool.passage_mask))
    passage_keys = several_keys(named_keys(keys, "passage"), S)
    return query_emb_bE, encode(ids, mask, passage_keys, batch.packed.passage).reshape(b, S, -1)


def labels(rag: Rag, batch: Batch) -> tuple[Int[Array, "b R"], Int[Array, "b W"]]:
    """Keys of the passages that count as right for each row's query, and of those that are no negatives of it."""
    if rag.objective.label_noise is None or batch.evidence is None or batch.evidence_none is None:
        return batch.right_key, batch.right_key
    b, temperature = len(batch.row), rag.objective.evidence_temperature
    key_mp = rag.in_groups(batch.pool.key).reshape(b // rag.group_size, -1)
    key_bp = jnp.repeat(key_mp, rag.group_size, axis=0)
    known_bp = jnp.any(batch.right_key[:, :, None] == key_bp[:, None], axis=1) & (key_bp >= 0)
    evidence_bp, none_b = batch.evidence * temperature, batch.evidence_none * temperature
    right_bp, out_bp = losses.corrected_labels(evidence_bp, none_b, known_bp, rag.objective.label_noise)
    best_bp = jnp.where(right_bp, jnp.nan_to_num(evidence_bp, nan=0.0, neginf=-1e9) + 1e3, -1.0)
    found_bR, place_bR = jax.lax.top_k(best_bp, min(batch.right_key.shape[1] + MORE_RIGHT, key_bp.shape[1]))
    right_key_bR = jnp.where(found_bR > 0, jnp.take_along_axis(key_bp, place_bR, axis=1), -1)
    return right_key_bR, jnp.concatenate([batch.right_key, jnp.where(out_bp, key_bp, -1)], axis=1)


def contrastive_term(rag: Rag, batch: Batch, embs: Embs) -> Term:
    """The contrastive loss of whole embeddings and of their leading channels (Kusupati et al., 2022), summed."""
    cut = functools.partial(leading, similarity=rag.similarity)
    shorter = [(cut(embs[0], width), cut(embs[1], width)) for width in rag.matryoshka_dims]
    nats, counted = zip(*(info_nce(rag, batch, each) for each in (embs, *shorter)), strict=True)
    return Term(functools.reduce(jnp.add, nats), counted[0])


def info_nce(rag: Rag, batch: Batch, embs: Embs) -> Term:
    """Symmetric InfoNCE of this device's rows over the global batch: a query over passages, its passages over queries.

    Every passage of the batch is one column, however many groups hold it, and none of a query that it is known to
    answer; a row counts if such a passage is known. Scores are (b, P) of a device, in blocks of rows where they are
    many; (P, P) never exists.
    """
    (query_emb_bE, pool_emb_bSE), b = embs, len(batch.row)
    from_all, temperature, g, S = rag.shard.from_all, rag.objective.temperature, rag.group_size, pool_emb_bSE.shape[1]
    all_queries_BE, all_passages_PE = from_all(query_emb_bE), from_all(pool_emb_bSE).reshape(-1, query_emb_bE.shape[1])
    right_key_bR, out_key_bW = labels(rag, batch)
    all_right_BR, all_out_BW, all_keys_P = (from_all(a) for a in (right_key_bR, out_key_bW, batch.pool.key.ravel()))
    B, P, R = len(all_queries_BE), len(all_keys_P), min(all_right_BR.shape[1], g * S)
    is_column_P = (all_keys_P >= 0) & first_copies(all_keys_P)
    group_P, has_label_B = jnp.arange(P) // (g * S), jnp.any(all_right_BR >= 0, axis=1)

    def nll(rows: Any) -> Term:
        query_emb_nE, right_key_nR, out_key_nW, position_n = rows
        out_nP = known_right(out_key_nW, all_keys_P)
        right_nP = known_right(right_key_nR, all_keys_P) & (
            position_n[:, None] // g == group_P
        )  # of copies that of its own group
        by_query_n = losses.right_nll(
            cosines(query_emb_nE, all_passages_PE) / temperature, right_nP, is_column_P & ~out_nP
        )
        is_there_nR, place_nR = jax.lax.top_k(right_nP.astype(jnp.int32), R)
        place = place_nR.ravel()
        itself = jnp.repeat(position_n, R)[:, None] == jnp.arange(B)
        asked = known_right(all_out_BW, all_keys_P[place]).T
        scores = cosines(all_passages_PE[place], all_queries_BE) / temperature
        by_passage_nR = losses.right_nll(scores, itself, has_label_B & ~asked).reshape(-1, R)
        count_n = jnp.sum(is_there_nR, axis=1)
        by_passage_n = jnp.sum(by_passage_nR * is_there_nR, axis=1) / jnp.maximum(count_n, 1)
        return Term(0.5 * (by_query_n + by_passage_n), count_n > 0)

    rows = (query_emb_bE, right_key_bR, out_key_bW, rag.shard.positions(b))
    return map_rows(nll, rows, CONTRASTIVE_SCORES // P)


def document_term(rag: Rag, batch: Batch, embs: Embs) -> Term:
    """-log of the share that the passages of a query's document have in the scores of all passages of the batch.

    Of the rows whose document alone is known: it says that one of these passages answers the query, not which.
    """
    (query_emb_bE, pool_emb_bSE), from_all = embs, rag.shard.from_all
    all_passages_PE = from_all(pool_emb_bSE).reshape(-1, query_emb_bE.shape[1])
    all_keys_P, all_documents_P = (from_all(a).ravel() for a in (batch.pool.key, batch.pool.document))
    is_column_P = (all_keys_P >= 0) & first_copies(all_keys_P)

    def nll(rows: Any) -> Float[Array, " n"]:
        query_emb_nE, document_n = rows
        within_nP = (document_n[:, None] == all_documents_P) & (document_n[:, None] >= 0)
        scores_nP = cosines(query_emb_nE, all_passages_PE) / rag.objective.temperature
        return losses.right_nll(scores_nP, within_nP & is_column_P, ~within_nP & is_column_P)

    nats_b = map_rows(nll, (query_emb_bE, batch.document), CONTRASTIVE_SCORES // len(all_keys_P))
    return Term(nats_b, batch.document >= 0)


def pair_terms(rag: Rag, params: dict, batch: Batch, embs: Embs | None, keys: Keys) -> dict[str, Term]:
    """The objective's terms from log p(y_t | passage k, query, y_<t) of every row's candidates, by blocks of groups."""
    generator, formula = rag.model("generator", params), rag.objective.formula

    def block_terms(groups: Any) -> dict[str, Term]:
        block, block_embs, block_keys = groups
        log_probs = block_log_probs(rag, generator, block, block_embs, block_keys)
        answer_mask = block.answer_mask.reshape(-1, block.answer_mask.shape[-1])
        terms = getattr(losses, formula.terms)(formula.likelihood, *log_probs, answer_mask)
        return jax.tree.map(lambda a: a.reshape(block.answer_mask.shape[:2]), terms)

    return jax.tree.map(jnp.ravel, map_rows(block_terms, rag.in_groups((batch, embs, keys)), rag.groups_at_a_time))


def evidence_terms(rag: Rag, params: dict, batch: Batch, embs: Embs | None, keys: Keys) -> dict[str, Term]:
    """How far p(k | query) is from the evidence of every row's candidates, and the generator's own term.

    Evidence has no gradient, so nothing of the passages that are read for it alone stays for a backward pass. The
    generator learns from the right passage of each row, or from all candidates where some row has none. Unless there is
    dropout, what it learns from is read once for both.
    """
    assert embs is not None  # such an objective needs scores
    objective, formula = rag.objective, rag.objective.formula
    groups, group_embs, group_keys = rag.in_groups((batch, embs, keys))
    slot_mgK, cosine_mgK, right_mgK = candidates_of(rag, groups, group_embs)
    right_bK = right_mgK.reshape(len(batch.row), -1)
    cosine_bK = cosine_mgK.reshape(right_bK.shape)
    reads_any_b = jnp.any(cosine_bK > -jnp.inf, axis=-1)
    doc_log_probs_bK = objective.doc_log_probs(jnp.where(reads_any_b[:, None], cosine_bK, 0.0))
    evidence = functools.partial(losses.evidence_nats, formula.divergence, doc_log_probs_bK)
    if batch.evidence is not None:
        known_bK = jnp.take_along_axis(groups.evidence, slot_mgK, axis=-1).reshape(right_bK.shape)
        nats_b = evidence(jnp.nan_to_num(known_bK), right_bK, objective.label_share)
        return {"evidence": Term(jnp.where(reads_any_b, nats_b, 0.0), reads_any_b)}

    learnt, learns = None, rag.trains_generator and objective.marginal_weight > 0
    if learns:
        learnt = read_suffixes(rag, params, groups, slot_mgK[..., :1] if rag.labelled else slot_mgK, group_keys)
    known = [] if learnt is None or keys is not None else [objective.summed(learnt)]
    left_mgK = slot_mgK[..., sum(a.shape[1] for a in known) :]
    read = learnt
    if left_mgK.shape[-1]:
        read = read_suffixes(rag, jax.lax.stop_gradient(params), groups, left_mgK, None)
        known.append(objective.summed(read))
    assert read is not None
    evidence_bK = jnp.concatenate(known, axis=1)

    nats_b = evidence(evidence_bK, right_bK, objective.label_share)
    has_evidence_b = reads_any_b & jnp.any(jnp.stack(read.evidence_masks(objective.evidence)), axis=(0, 2))
    named = {"evidence": Term(jnp.where(has_evidence_b, nats_b, 0.0), has_evidence_b)}
    if objective.marginal_weight == 0:
        return named
    if learnt is not None:
        read = learnt
    if learnt is not None and rag.labelled:
        doc_log_probs_bK, right_bK = jnp.zeros_like(doc_log_probs_bK[:, :1]), right_bK[:, :1]
    words = (doc_log_probs_bK, read.log_probs_bKT, read.answer_bT, right_bK)
    marginal_b = losses.generator_nats(formula.likelihood, *words)
    return named | {"marginal": Term(marginal_b, jnp.sum(read.answer_bT, axis=-1))}


def read_suffixes(rag: Rag, params: dict, groups: Batch, slot_mgK: Int[Array, "m g K"], keys: Any) -> Suffixes:
    """The tokens of every row's suffix that the objective asks for, behind these candidates, by blocks of groups."""
    generator, whole = rag.model("generator", params), rag.objective.evidence != "answer"

    def block_suffixes(blocks: Any) -> Suffixes:
        block, slots, block_keys = blocks
        rows, hidden_bKLD = read_block(generator, block, slots, block_keys)
        b, Ls = rows.suffix_ids.shape
        start_b, num_tokens = rows.answer_start, rows.packed.answer
        answer_bT, question_bT = rows.answer_mask, jnp.zeros_like(rows.answer_mask)
        if whole:
            start_b, num_tokens = jnp.ones(b, jnp.int32), rows.packed.suffix
            question_bT = jnp.arange(1, Ls) < rows.answer_start[:, None]
            answer_bT = rows.suffix_mask[:, 1:] & ~question_bT
        log_probs_bKT = answer_log_probs(
            generator, hidden_bKLD, rows.suffix_ids, start_b, answer_bT | question_bT, rag.head_chunk, num_tokens
        )
        found = Suffixes(log_probs_bKT, answer_bT, question_bT)
        return jax.tree.map(lambda a: a.reshape(*block.row.shape, *a.shape[1:]), found)

    found = map_rows(block_suffixes, (groups, slot_mgK, keys), rag.groups_at_a_time)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)


def string_terms(rag: Rag, params: dict, batch: Batch, embs: Embs | None, keys: Keys) -> dict[str, Term]:
    """The objective's terms from the log-probabilities of whole strings, and the scores of the whole batch."""
    assert embs is not None  # such an objective needs scores
    generator = rag.model("generator", params)
    query_emb_bE, pool_emb_bSE = embs
    slot_mg1 = candidates_of(rag, rag.in_groups(batch), None).slot
    pool_emb_mpE = rag.in_groups(pool_emb_bSE).reshape(*slot_mg1.shape[:1], -1, query_emb_bE.shape[1])
    own_emb_bE = jnp.take_along_axis(pool_emb_mpE, slot_mg1, axis=1).reshape(query_emb_bE.shape)
    cosine_bP = cosines(query_emb_bE, rag.shard.from_all(own_emb_bE))

    def string_log_probs(rows: Any) -> Float[Array, "g L"]:
        ids, mask, group_keys = rows
        hidden = generator(ids, mask, group_keys)[:, :-1]
        flat = hidden.reshape(-1, hidden.shape[-1])
        flat = generator.gold_log_probs(flat, ids[:, 1:].reshape(-1), rag.head_chunk)
        return flat.reshape(ids.shape[0], -1)

    log_probs_bL = map_rows(string_log_probs, (batch.string_ids, batch.string_mask, keys), rag.group_size)
    # Position l predicts token l + 1; `string_answer_start` counts in these positions.
    answer_bL = jnp.arange(log_probs_bL.shape[1])[None, :] >= batch.string_answer_start[:, None]
    positions_b, scored_bL = rag.shard.positions(len(batch.query_key)), batch.string_mask[:, 1:]
    return getattr(losses, rag.objective.formula.terms)(cosine_bP, positions_b, log_probs_bL, scored_bL, answer_bL)


READS = {"pairs": pair_terms, "evidence": evidence_terms, "scores": evidence_terms, "strings": string_terms}
