"""Greedy RAG-Token decoding with a KV cache: at each token the distributions of K passages are mixed.

**P** distinct passages of a batch, **B** queries, **K** candidates, **S** = B K streams, **T** tokens of an answer,
**Lp** prefix (passage segment), **Lq** query segment, **V** vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from rag_jax import rag
from rag_jax.models.decoder import Decoder

Tokens = tuple[Any, Any]  # ids (n, L) int32 and mask (n, L) bool, right-padded


def next_token(
    generator: Decoder, hidden: Float[Array, "B K D"], doc_log_probs: Float[Array, "B K"]
) -> Int[Array, " B"]:
    """argmax_v log sum_k p(k | query) p(v | k, query, y_<t); of equals the lowest id."""
    logits = jnp.einsum("BKD,VD->BKV", hidden, generator.head_kernel(), preferred_element_type=jnp.float32)
    joint = doc_log_probs[:, :, None] + jax.nn.log_softmax(logits, axis=-1)
    return jnp.argmax(jax.nn.logsumexp(joint, axis=1), axis=-1).astype(jnp.int32)


def greedy(
    generator: Decoder,
    prefix: tuple[Int[Array, "P Lp"], Bool[Array, "P Lp"]],
    query: tuple[Int[Array, "B Lq"], Bool[Array, "B Lq"]],
    candidates: Int[Array, "B K"],
    doc_log_probs: Float[Array, "B K"],
    *,
    num_tokens: int,
    eos_id: int,
) -> Int[Array, "B T"]:
    """The likeliest token of the RAG-Token mixture at every step, up to end-of-sequence; after it, `eos_id`.

    Each passage runs once, whatever the number of queries that read it. One token goes on in all K streams of a query.
    With K = 1 this is plain greedy decoding. Stops when every answer has ended.
    """
    (prefix_ids, prefix_mask), (query_ids, query_mask) = prefix, query
    (B, K), Lp, Lq = candidates.shape, prefix_ids.shape[1], query_ids.shape[1]

    def streams(hidden: Float[Array, "S D"]) -> Float[Array, "B K D"]:
        return hidden.reshape(B, K, -1)

    _, passages = generator.prefill(prefix_ids, prefix_mask, Lp + Lq + num_tokens)
    flat = candidates.reshape(B * K)
    cache = type(passages)(passages.key[:, flat], passages.value[:, flat], passages.length[flat])
    repeated_ids, repeated_mask = (jnp.repeat(a, K, axis=0) for a in (query_ids, query_mask))
    hidden, cache = generator.extend(repeated_ids, repeated_mask, cache)
    last = repeated_mask.sum(axis=-1, dtype=jnp.int32)[:, None, None] - 1
    token = next_token(generator, streams(jnp.take_along_axis(hidden, last, axis=1)[:, 0]), doc_log_probs)

    def unfinished(carry: Any) -> Array:
        t, _, ended, _, _ = carry
        return (t < num_tokens) & ~jnp.all(ended)

    def step(carry: Any) -> Any:
        t, token, ended, answer, cache = carry
        answer = answer.at[:, t].set(jnp.where(ended, eos_id, token))
        ended = ended | (token == eos_id)
        hidden, cache = generator.decode(jnp.repeat(token, K), cache)
        return t + 1, next_token(generator, streams(hidden), doc_log_probs), ended, answer, cache

    answer = jnp.full((B, num_tokens), eos_id, jnp.int32)
    start = (jnp.zeros((), jnp.int32), token, jnp.zeros(B, bool), answer, cache)
    return jax.lax.while_loop(unfinished, step, start)[3]


@functools.partial(jax.jit, static_argnums=0, static_argnames=("num_tokens", "eos_id"))
def answer_ids(
    model: rag.Rag,
    params: dict,
    prefix: Tokens,
    query: Tokens,
    candidates: Shaped[Any, "B K"],
    doc_log_probs: Shaped[Any, "B K"],
    *,
    num_tokens: int,
    eos_id: int,
) -> Int[Array, "B T"]:
    """`greedy` with the generator of `params`, compiled once for each shape."""
    generator = model.model("generator", params)
    return greedy(generator, prefix, query, candidates, doc_log_probs, num_tokens=num_tokens, eos_id=eos_id)


def text(tokenizer: Any, ids: Int[np.ndarray, " T"]) -> str:
    """The answer before its end-of-sequence token, without special tokens and the space around it."""
    ended = np.flatnonzero(ids == tokenizer.eos_token_id)
    return tokenizer.decode(ids[: ended[0]] if len(ended) else ids, skip_special_tokens=True).strip()
