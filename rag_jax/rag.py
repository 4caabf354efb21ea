"""The composite of both models: encode, choose candidates, answer log-probabilities, marginal, total loss.

**B** queries of the whole batch, **P** passages, **b** rows of one device or of a group, **K** candidates, **T** answer
tokens, **L** sequence (**Lp** prefix, **Ls** suffix), **E** embedding width, **D** model width, **V** vocabulary,
**H** negatives that each query brings besides its own passage: the passages of b rows are p = b (1 + H), see `joined`.

`loss` runs on each device's own rows. Embeddings are all that it fetches of the others' (`Rag.from_all`): candidates,
and with them the generator's keys and values, are of a group, and a group lies on one device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from rag_jax import losses
from rag_jax.models import layers
from rag_jax.models.decoder import Decoder
from rag_jax.models.layers import named_keys, several_keys

# Tokens whose (tokens, V) logits exist at one time in `gold_log_probs`.
HEAD_CHUNK = 512
# Scores that exist at one time on a device in the contrastive loss, 16 MB for rows and for columns.
SCORES_AT_A_TIME = 2**22

# (path of the parameters, the parameters or one layer of them, compute dtype) -> whole ones in that dtype.
Gather = Callable[[tuple[str, ...], Any, Any], Any]
# Of the same rows' queries, passages and negatives; no negatives: None.
Embs = tuple[Float[Array, "b E"], Float[Array, "b E"], Float[Array, "b H E"] | None]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss as the config states it."""

    name: str  # "token" | "sequence" | "dalm" | "none"
    candidates: int  # K
    temperature: float
    marginal_temperature: float
    contrastive_weight: float
    marginal_weight: float
    negatives: int = 0  # H

    @property
    def uses_generator(self) -> bool:
        return self.name != "none" and self.marginal_weight != 0

    @property
    def uses_retriever(self) -> bool:
        """With one candidate, the positive, the marginal is plain answer likelihood and asks for no scores."""
        return self.contrastive_weight != 0 or (self.uses_generator and (self.candidates > 1 or self.name == "dalm"))


@dataclasses.dataclass(frozen=True)
class Rag:
    """Everything about the loss that is not an array."""

    objective: Objective
    retriever: nnx.GraphDef | None
    generator: nnx.GraphDef | None
    pooling: str  # "cls" | "mean" | "last"
    group_size: int  # b
    dtype: Any = jnp.float32
    chunk_size: int = 0  # rows that the retriever encodes at a time on a device; 0: all
    batch_axes: tuple[str, ...] = ()  # mesh axes over which the batch is split; (): all of it is here
    gather: Gather | None = None  # brings shared parameters together; None: they are whole

    def model(self, name: str, params: dict) -> Any:
        """A model in the compute dtype over float32 parameters; those of its layers follow one layer at a time."""
        rest = {part: leaf for part, leaf in params[name].items() if part != "layers"}
        stacked = params[name]["layers"]
        if self.gather is not None or self.dtype != jnp.float32:
            stacked = layers.deferred(stacked, lambda path, layer: self._whole((name, "layers", *path), layer))
        return nnx.merge(getattr(self, name), self._whole((name,), rest) | {"layers": stacked})

    def _whole(self, path: tuple[str, ...], params: Any) -> Any:
        if self.gather is not None:
            return self.gather(path, params, self.dtype)
        return jax.tree.map(lambda a: a.astype(self.dtype), params)

    def from_all(self, rows_b: Shaped[Array, "b ..."]) -> Shaped[Array, "B ..."]:
        """The rows of the whole batch, of which this device has b, in their order."""
        return jax.lax.all_gather(rows_b, self.batch_axes, tiled=True) if self.batch_axes else rows_b

    def sum_of_all(self, value: Array) -> Array:
        return jax.lax.psum(value, self.batch_axes) if self.batch_axes else value

    def place_of(self, num_rows: int) -> Int[Array, " b"]:
        """Where in the whole batch this device's rows stand."""
        first = jax.lax.axis_index(self.batch_axes) * num_rows if self.batch_axes else 0
        return first + jnp.arange(num_rows)


def pool(hidden_BLD: Float[Array, "B L D"], mask_BL: Bool[Array, "B L"], mode: str) -> Float[Array, "B D"]:
    """One vector a row: the first real token ("cls"), the mean of the real ones, or the last real one."""
    if mode == "mean":
        weights_BL1 = mask_BL[:, :, None].astype(jnp.float32)
        total_BD = jnp.sum(hidden_BLD.astype(jnp.float32) * weights_BL1, axis=1)
        return total_BD / jnp.maximum(jnp.sum(weights_BL1, axis=1), 1.0)
    L = mask_BL.shape[1]
    index_B = jnp.argmax(mask_BL, axis=1) if mode == "cls" else L - 1 - jnp.argmax(mask_BL[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden_BLD, index_B[:, None, None], axis=1)[:, 0].astype(jnp.float32)


def encode(
    retriever: Callable[..., Array],
    ids_BL: Int[Array, "B L"],
    mask_BL: Bool[Array, "B L"],
    pooling: str,
    dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B E"]:
    """Pooled and L2-normalised embeddings, float32."""
    emb_BE = pool(retriever(ids_BL, mask_BL, dropout_keys), mask_BL, pooling)
    return emb_BE / jnp.maximum(jnp.linalg.norm(emb_BE, axis=-1, keepdims=True), 1e-12)


def joined(own_b: Shaped[Array, "b ..."], negatives_bH: Shaped[Array, "b H ..."] | None) -> Shaped[Array, "p ..."]:
    """What the passages of some rows have: their own ones', then that of each row's negatives in turn."""
    if negatives_bH is None:
        return own_b
    return jnp.concatenate([own_b, negatives_bH.reshape(-1, *own_b.shape[1:])])


def passage_keys(batch: Any) -> Int[Array, " p"]:
    """Of all passages of the rows; -1 where a row brings no passage."""
    return joined(batch.passage_key, None if batch.negatives is None else batch.negatives.passage_key)


def choose_candidates(
    cosine_bp: Float[Array, "b p"], passage_key_p: Int[Array, " p"], num_candidates: int
) -> Int[Array, "b K"]:
    """Each row's positive, then the group's highest-scoring others; further copies of a passage come last."""
    b, p = cosine_bp.shape
    same_pp = passage_key_p[:, None] == passage_key_p[None, :]
    positive_bp = jnp.eye(b, p, dtype=bool)
    first_copy_p = jnp.argmax(same_pp, axis=1) == jnp.arange(p)
    again_bp = same_pp[:b] | ~first_copy_p[None, :]
    # Cosines lie within [-1, 1]: 4 sets the three ranks apart without touching the order inside one.
    order_bp = cosine_bp + jnp.where(positive_bp, 4.0, jnp.where(again_bp, -4.0, 0.0))
    return jax.lax.top_k(jax.lax.stop_gradient(order_bp), num_candidates)[1].astype(jnp.int32)


def gold_log_probs(
    hidden_MD: Float[Array, "M D"], kernel_VD: Float[Array, "V D"], ids_M: Int[Array, " M"]
) -> Float[Array, " M"]:
    """log softmax_V(hidden kernel)[ids], float32, in chunks of tokens: (M, V) never exists, not even for gradients.

    Fused kernels (tokamax, Liger) give the loss summed over tokens, but a marginal needs each token's.
    """
    M, D = hidden_MD.shape
    num_chunks = -(-M // HEAD_CHUNK)
    size = -(-M // num_chunks)
    room = num_chunks * size - M
    chunks = jnp.pad(hidden_MD, ((0, room), (0, 0))).reshape(num_chunks, size, D)
    chunk_ids = jnp.pad(ids_M, (0, room)).reshape(num_chunks, size)

    @jax.checkpoint
    def one(chunk: tuple[Array, Array]) -> Array:
        hidden, ids = chunk
        logits = jnp.einsum("MD,VD->MV", hidden, kernel_VD, preferred_element_type=jnp.float32)
        # A sum over V, not a gather: of a vocabulary split over devices each has a part of it.
        gold = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == ids[:, None], logits, 0.0), axis=-1)
        return gold - jax.nn.logsumexp(logits, axis=-1)

    return jax.lax.map(one, (chunks, chunk_ids)).reshape(-1)[:M]


def answer_log_probs(
    generator: Decoder,
    hidden_BKLD: Float[Array, "B K Ls D"],
    suffix_ids_BL: Int[Array, "B Ls"],
    answer_start_B: Int[Array, " B"],
    num_tokens: int,
) -> Float[Array, "B K T"]:
    """token_log_probs: log p(y_t | passage k, query, y_<t), T tokens from `answer_start` on; past the answer, noise."""
    B, K, Ls, D = hidden_BKLD.shape
    index_BT = jnp.minimum(answer_start_B[:, None] + jnp.arange(num_tokens), Ls - 1)
    ids_BT = jnp.take_along_axis(suffix_ids_BL, index_BT, axis=1)
    before_BKTD = jnp.take_along_axis(hidden_BKLD, (index_BT - 1)[:, None, :, None], axis=2)
    ids_BKT = jnp.broadcast_to(ids_BT[:, None], (B, K, num_tokens))
    log_probs = gold_log_probs(before_BKTD.reshape(-1, D), generator.head_kernel(), ids_BKT.reshape(-1))
    return log_probs.reshape(B, K, num_tokens)


def group_log_probs(
    generator: Decoder, objective: Objective, group: Any, group_embs: Embs | None, keys: Any
) -> tuple[Float[Array, "b K"], Float[Array, "b K T"]]:
    """Of a group's rows with K passages of the group each, the own one first: doc_log_probs and token_log_probs."""
    b, negatives = group.suffix_ids.shape[0], group.negatives
    prefix = (group.prefix_ids, group.prefix_mask)
    if group_embs is None:
        candidates_bK, scores_bK = jnp.arange(b, dtype=jnp.int32)[:, None], jnp.zeros((b, 1))
    else:
        query_emb, passage_emb, negative_emb = group_embs
        cosine_bp, key_p = cosines(query_emb, joined(passage_emb, negative_emb)), passage_keys(group)
        if negatives is not None:
            # What is not there comes last, and where it is read all the same, its probability is zero.
            cosine_bp = jnp.where(key_p >= 0, cosine_bp, -jnp.inf)
            prefix = (joined(prefix[0], negatives.prefix_ids), joined(prefix[1], negatives.prefix_mask))
        candidates_bK = choose_candidates(cosine_bp, key_p, objective.candidates)
        scores_bK = jnp.take_along_axis(cosine_bp, candidates_bK, axis=1) / objective.marginal_temperature
    hidden_bKLD = generator.forward_shared_prefix(prefix, (group.suffix_ids, group.suffix_mask), candidates_bK, keys)
    token_log_probs_bKT = answer_log_probs(
        generator, hidden_bKLD, group.suffix_ids, group.answer_start, group.answer_mask.shape[1]
    )
    return losses.doc_log_probs(scores_bK), token_log_probs_bKT


def map_blocks(fn: Callable[[Any], Any], rows: Any, size: int) -> Any:
    """`fn` of each block of `size` neighbouring rows, one after the other under rematerialisation.

    Results with a leading axis of blocks; memory is that of one block.
    """
    blocks = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), rows)
    if jax.tree.leaves(blocks)[0].shape[0] == 1:
        return jax.tree.map(lambda a: a[None], fn(rows))
    return jax.lax.map(jax.checkpoint(fn), blocks)


def even_size(num_rows: int, at_most: int) -> int:
    """The largest divisor of `num_rows` that is not above `at_most`; at least 1."""
    return next(size for size in range(max(min(at_most, num_rows), 1), 0, -1) if num_rows % size == 0)


def encode_in_chunks(
    rag: Rag,
    retriever: Callable[..., Array],
    ids_BL: Int[Array, "B L"],
    mask_BL: Bool[Array, "B L"],
    dropout_keys: Key[Array, " B"] | None,
) -> Float[Array, "B E"]:
    """`encode`, at most `rag.chunk_size` rows at a time on a device: of the others only embeddings are in memory.

    What GradCache (Gao et al., 2021) does by hand, the backward pass of a rematerialised loop does by itself.
    """
    B = ids_BL.shape[0]
    if not 0 < rag.chunk_size < B:
        return encode(retriever, ids_BL, mask_BL, rag.pooling, dropout_keys)

    def chunk(chunk_rows: Any) -> Array:
        ids, mask, keys = chunk_rows
        return encode(retriever, ids, mask, rag.pooling, keys)

    return map_blocks(chunk, (ids_BL, mask_BL, dropout_keys), even_size(B, rag.chunk_size)).reshape(B, -1)


def cosines(query_emb_BE: Float[Array, "B E"], passage_emb_PE: Float[Array, "P E"]) -> Float[Array, "B P"]:
    """Of normalised embeddings, in float32 also where a device's products are rougher by default."""
    return jnp.matmul(query_emb_BE, passage_emb_PE.T, precision=jax.lax.Precision.HIGHEST)


def embed(rag: Rag, params: dict, batch: Any, keys: Key[Array, " b"] | None) -> Embs:
    """What the retriever makes of the rows' texts."""
    retriever, negatives = rag.model("retriever", params), batch.negatives
    encode = functools.partial(encode_in_chunks, rag, retriever)
    query_emb_bE = encode(batch.query_ids, batch.query_mask, named_keys(keys, "query"))
    passage_emb_bE = encode(batch.passage_ids, batch.passage_mask, named_keys(keys, "passage"))
    if negatives is None:
        return query_emb_bE, passage_emb_bE, None
    b, H, L = negatives.passage_ids.shape
    ids, mask = (a.reshape(b * H, L) for a in (negatives.passage_ids, negatives.passage_mask))
    negative_emb = encode(ids, mask, several_keys(named_keys(keys, "negative"), H))
    return query_emb_bE, passage_emb_bE, negative_emb.reshape(b, H, -1)


def no_columns(negative_key_bH: Int[Array, "b H"], all_passage_keys: Int[Array, " B"]) -> Bool[Array, "b H"]:
    """Which negatives are no column of the contrastive loss: none is there, or the batch has it as a row's own passage.

    That one is a column already, and the keys of its rows say whose negative it is and whose not.
    """
    return (negative_key_bH < 0) | jnp.isin(negative_key_bH, all_passage_keys)


def contrastive_share(rag: Rag, batch: Any, embs: Embs) -> Float[Array, ""]:
    """This device's rows' part of the symmetric InfoNCE over the whole batch: rows, and columns as rows of their own.

    Every query's negatives are further columns of all rows, P = B (1 + H) in all. Scores are (b, P) of a device, in
    blocks of rows where they are many; (P, P) never exists.
    """
    (query_emb_bE, passage_emb_bE, negative_emb_bHE), b = embs, len(batch.query_key)
    all_queries_BE, all_passages_PE = rag.from_all(query_emb_bE), rag.from_all(passage_emb_bE)
    all_query_keys, all_passage_keys = rag.from_all(batch.query_key), rag.from_all(batch.passage_key)
    excluded_further = None
    if negative_emb_bHE is not None:
        all_passages_PE = joined(all_passages_PE, rag.from_all(negative_emb_bHE))
        excluded_further = rag.from_all(no_columns(batch.negatives.passage_key, all_passage_keys)).ravel()

    def nll(rows: Any) -> Array:
        query_emb, passage_emb, query_key, passage_key, positive = rows
        excluded = (query_key[:, None] == all_query_keys) | (passage_key[:, None] == all_passage_keys)
        by_row = cosines(query_emb, all_passages_PE) / rag.objective.temperature
        by_column = cosines(passage_emb, all_queries_BE) / rag.objective.temperature
        column_nll = losses.positive_nll(by_column, positive, excluded)
        if excluded_further is not None:
            further = jnp.broadcast_to(excluded_further, (len(excluded), excluded_further.size))
            excluded = jnp.concatenate([excluded, further], axis=1)
        return jnp.sum(losses.positive_nll(by_row, positive, excluded)) + jnp.sum(column_nll)

    B, P = len(all_query_keys), len(all_passages_PE)
    rows = (query_emb_bE, passage_emb_bE, batch.query_key, batch.passage_key, rag.place_of(b))
    return 0.5 * jnp.sum(map_blocks(nll, rows, even_size(b, SCORES_AT_A_TIME // P))) / B


def marginal_share(
    rag: Rag, params: dict, batch: Any, embs: Embs | None, dropout_keys: Key[Array, " b"] | None
) -> Float[Array, ""]:
    """This device's rows' part of the mean negative log marginal per answer token of the whole batch, nats."""
    generator = rag.model("generator", params)

    def nll(rows: Any) -> Array:
        group, group_embs, keys = rows
        log_probs = group_log_probs(generator, rag.objective, group, group_embs, keys)
        return losses.marginal_nll(rag.objective.name, *log_probs, group.answer_mask)

    nll_G = map_blocks(nll, (batch, embs, dropout_keys), rag.group_size)
    return jnp.sum(nll_G) / jnp.maximum(rag.sum_of_all(jnp.sum(batch.answer_mask)), 1)


def dalm_share(
    rag: Rag, params: dict, batch: Any, embs: Embs, dropout_keys: Key[Array, " b"] | None
) -> Float[Array, ""]:
    """This device's rows' part of the predecessor's objective on its own strings; see `losses.dalm_nll`."""
    generator = rag.model("generator", params)
    (query_emb_bE, passage_emb_bE, _), b = embs, len(batch.query_key)
    cosine_bP = cosines(query_emb_bE, rag.from_all(passage_emb_bE))

    def string_log_probs(rows: Any) -> Array:
        ids, mask, keys = rows
        hidden = generator(ids, mask, keys)[:, :-1]
        flat = gold_log_probs(hidden.reshape(-1, hidden.shape[-1]), generator.head_kernel(), ids[:, 1:].reshape(-1))
        return flat.reshape(ids.shape[0], -1)

    rows = (batch.string_ids, batch.string_mask, dropout_keys)
    log_probs_GgL = map_blocks(string_log_probs, rows, rag.group_size)
    log_probs_bL, scored_bL = log_probs_GgL.reshape(b, -1), batch.string_mask[:, 1:]
    # Position l predicts token l + 1; `string_answer_start` counts in these positions.
    answer_bL = jnp.arange(log_probs_bL.shape[1])[None, :] >= batch.string_answer_start[:, None]
    nll = losses.dalm_nll(cosine_bP, rag.place_of(b), log_probs_bL, scored_bL, answer_bL)
    return nll / jnp.maximum(rag.sum_of_all(jnp.sum(scored_bL)), 1)


def loss(
    rag: Rag, params: dict, batch: Any, key: Key[Array, ""] | None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Total = contrastive_weight * contrastive + marginal_weight * marginal, and its parts by their metric names.

    Of a batch split over devices each computes its rows' share; the loss is their sum, and so is its gradient.
    """
    objective = rag.objective
    keys = None
    if key is not None:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rag.place_of(len(batch.query_key)))
    parts: dict[str, Float[Array, ""]] = {}
    embs = embed(rag, params, batch, keys) if objective.uses_retriever else None
    if embs is not None and objective.contrastive_weight != 0:
        parts["loss/contrastive"] = contrastive_share(rag, batch, embs)
    if objective.uses_generator and objective.name == "dalm":
        assert embs is not None
        parts["loss/marginal"] = dalm_share(rag, params, batch, embs, named_keys(keys, "generator"))
    elif objective.uses_generator:
        parts["loss/marginal"] = marginal_share(rag, params, batch, embs, named_keys(keys, "generator"))
    total = objective.contrastive_weight * parts.get("loss/contrastive", jnp.zeros(())) + (
        objective.marginal_weight * parts.get("loss/marginal", jnp.zeros(()))
    )
    return total, parts | {"loss/total": total}
