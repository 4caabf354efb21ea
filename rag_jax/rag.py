"""The composite of both models: encode, choose candidates, answer log-probabilities, marginal, total loss.

**B** queries of the whole batch, **P** passages, **G** groups of **b** rows, **K** candidates, **T** answer tokens,
**L** sequence (**Lp** prefix, **Ls** suffix), **E** embedding width, **D** model width, **V** vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from rag_jax import losses
from rag_jax.models.decoder import Decoder
from rag_jax.models.layers import named_keys

# Tokens whose (tokens, V) logits exist at one time in `gold_log_probs`.
HEAD_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss as the config states it."""

    name: str  # "token" | "sequence" | "dalm" | "none"
    candidates: int  # K
    temperature: float
    marginal_temperature: float
    contrastive_weight: float
    marginal_weight: float

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
    batch_shards: int = 1  # how many devices the batch is split over: groups run side by side on them
    chunk_size: int = 0  # rows that the retriever encodes at a time on each of them; 0: all

    def model(self, name: str, params: dict) -> Any:
        """A model in the compute dtype; gradients reach the float32 parameters through the cast."""
        return nnx.merge(getattr(self, name), jax.tree.map(lambda a: a.astype(self.dtype), params[name]))


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


def choose_candidates(
    cosine_bb: Float[Array, "b b"], passage_key_b: Int[Array, " b"], num_candidates: int
) -> Int[Array, "b K"]:
    """Each row's positive, then the group's highest-scoring others; further copies of a passage come last."""
    b = cosine_bb.shape[0]
    same_bb = passage_key_b[:, None] == passage_key_b[None, :]
    positive_bb = jnp.eye(b, dtype=bool)
    first_copy_b = jnp.argmax(same_bb, axis=1) == jnp.arange(b)
    again_bb = same_bb | ~first_copy_b[None, :]
    # Cosines lie within [-1, 1]: 4 sets the three ranks apart without touching the order inside one.
    order_bb = cosine_bb + jnp.where(positive_bb, 4.0, jnp.where(again_bb, -4.0, 0.0))
    return jax.lax.top_k(jax.lax.stop_gradient(order_bb), num_candidates)[1].astype(jnp.int32)


def gold_log_probs(
    hidden_MD: Float[Array, "M D"], kernel_VD: Float[Array, "V D"], ids_M: Int[Array, " M"]
) -> Float[Array, " M"]:
    """log softmax_V(hidden kernel)[ids], float32, in chunks of tokens: (M, V) never exists, not even for gradients."""
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
        return jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)

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


def group_nll(
    generator: Decoder, objective: Objective, group: Any, cosine_bb: Float[Array, "b b"] | None, keys: Any
) -> Float[Array, ""]:
    """Summed negative log marginal of one group's answers, each read with K passages of the group."""
    b = group.suffix_ids.shape[0]
    if cosine_bb is None:
        candidates_bK, scores_bK = jnp.arange(b, dtype=jnp.int32)[:, None], jnp.zeros((b, 1))
    else:
        candidates_bK = choose_candidates(cosine_bb, group.passage_key, objective.candidates)
        scores_bK = jnp.take_along_axis(cosine_bb, candidates_bK, axis=1) / objective.marginal_temperature
    hidden_bKLD = generator.prefix_suffix(
        (group.prefix_ids, group.prefix_mask), (group.suffix_ids, group.suffix_mask), candidates_bK, keys
    )
    token_log_probs_bKT = answer_log_probs(
        generator, hidden_bKLD, group.suffix_ids, group.answer_start, group.answer_mask.shape[1]
    )
    return losses.marginal_nll(objective.name, losses.doc_log_probs(scores_bK), token_log_probs_bKT, group.answer_mask)


def map_blocks(fn: Callable[[Any], Any], rows: Any, size: int, shards: int) -> Any:
    """`fn` of each block of `size` neighbouring rows; results with a leading axis of blocks.

    Blocks that live on different devices (`shards` of them) run side by side, those of one device one after the other
    under rematerialisation, so that memory is that of one block a device.
    """

    def split(a: Array) -> Array:  # (B, ...) -> (blocks a device, devices, size, ...); a device's rows are neighbours
        return jnp.swapaxes(a.reshape(shards, -1, size, *a.shape[1:]), 0, 1)

    def alone(block: Any) -> Any:
        return jax.tree.map(lambda a: a[None], fn(jax.tree.map(lambda a: a[0], block)))

    blocks = jax.tree.map(split, rows)
    # One device needs no vmap, whose axis of 1 costs XLA's CPU backend a transposing copy a weight gradient.
    side_by_side = jax.vmap(fn) if shards > 1 else alone
    if jax.tree.leaves(blocks)[0].shape[0] == 1:
        out = jax.tree.map(lambda a: a[None], side_by_side(jax.tree.map(lambda a: a[0], blocks)))
    else:
        out = jax.lax.map(jax.checkpoint(side_by_side), blocks)
    return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1).reshape(-1, *a.shape[2:]), out)


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
    rows = B // rag.batch_shards
    if not 0 < rag.chunk_size < rows:
        return encode(retriever, ids_BL, mask_BL, rag.pooling, dropout_keys)
    num_chunks = next(n for n in range(-(-rows // rag.chunk_size), rows + 1) if rows % n == 0)

    def chunk(chunk_rows: Any) -> Array:
        ids, mask, keys = chunk_rows
        return encode(retriever, ids, mask, rag.pooling, keys)

    return map_blocks(chunk, (ids_BL, mask_BL, dropout_keys), rows // num_chunks, rag.batch_shards).reshape(B, -1)


def marginal_loss(
    rag: Rag, params: dict, batch: Any, cosine_BB: Float[Array, "B B"] | None, dropout_keys: Key[Array, " B"] | None
) -> Float[Array, ""]:
    """Mean negative log marginal per answer token of the whole batch, nats."""
    B, b = batch.suffix_ids.shape[0], rag.group_size
    generator = rag.model("generator", params)
    index_G = jnp.arange(B // b)
    own_Gbb = None if cosine_BB is None else cosine_BB.reshape(B // b, b, B // b, b)[index_G, :, index_G]
    own_Bb = None if own_Gbb is None else own_Gbb.reshape(B, b)

    def nll(rows: Any) -> Array:
        group, cosine_bb, keys = rows
        return group_nll(generator, rag.objective, group, cosine_bb, keys)

    nll_G = map_blocks(nll, (batch, own_Bb, dropout_keys), b, rag.batch_shards)
    return jnp.sum(nll_G) / jnp.maximum(jnp.sum(batch.answer_mask), 1)


def dalm_loss(
    rag: Rag, params: dict, batch: Any, cosine_BB: Float[Array, "B B"], dropout_keys: Key[Array, " B"] | None
) -> Float[Array, ""]:
    """The predecessor's objective on its own strings; see `losses.dalm_marginal`."""
    generator = rag.model("generator", params)

    def string_log_probs(rows: Any) -> Array:
        ids, mask, keys = rows
        hidden = generator(ids, mask, keys)[:, :-1]
        flat = gold_log_probs(hidden.reshape(-1, hidden.shape[-1]), generator.head_kernel(), ids[:, 1:].reshape(-1))
        return flat.reshape(ids.shape[0], -1)

    rows = (batch.string_ids, batch.string_mask, dropout_keys)
    log_probs_GbL = map_blocks(string_log_probs, rows, rag.group_size, rag.batch_shards)
    log_probs_BL = log_probs_GbL.reshape(-1, log_probs_GbL.shape[-1])
    # Position l predicts token l + 1; `string_answer_start` counts in these positions.
    answer_BL = jnp.arange(log_probs_BL.shape[1])[None, :] >= batch.string_answer_start[:, None]
    return losses.dalm_marginal(cosine_BB, log_probs_BL, batch.string_mask[:, 1:], answer_BL)


def loss(
    rag: Rag, params: dict, batch: Any, key: Key[Array, ""] | None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Total = contrastive_weight * contrastive + marginal_weight * marginal, and its parts by their metric names."""
    objective = rag.objective
    keys = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(batch.query_key)))
    parts: dict[str, Float[Array, ""]] = {}
    cosine_BB = None
    if objective.uses_retriever:
        retriever = rag.model("retriever", params)
        query_keys, passage_keys = named_keys(keys, "query"), named_keys(keys, "passage")
        query_emb_BE = encode_in_chunks(rag, retriever, batch.query_ids, batch.query_mask, query_keys)
        passage_emb_BE = encode_in_chunks(rag, retriever, batch.passage_ids, batch.passage_mask, passage_keys)
        cosine_BB = query_emb_BE @ passage_emb_BE.T
    if cosine_BB is not None and objective.contrastive_weight != 0:
        same_passage_BB = batch.passage_key[:, None] == batch.passage_key[None, :]
        same_query_BB = batch.query_key[:, None] == batch.query_key[None, :]
        scores_BB = cosine_BB / objective.temperature
        parts["loss/contrastive"] = losses.contrastive_loss(scores_BB, same_passage_BB, same_query_BB)
    if objective.uses_generator and objective.name == "dalm":
        assert cosine_BB is not None
        parts["loss/marginal"] = dalm_loss(rag, params, batch, cosine_BB, named_keys(keys, "generator"))
    elif objective.uses_generator:
        parts["loss/marginal"] = marginal_loss(rag, params, batch, cosine_BB, named_keys(keys, "generator"))
    total = objective.contrastive_weight * parts.get("loss/contrastive", jnp.zeros(())) + (
        objective.marginal_weight * parts.get("loss/marginal", jnp.zeros(()))
    )
    return total, parts | {"loss/total": total}
