"""Log-probabilities of given tokens by the output matrix, of a few tokens at a time.

**n** tokens, **V** vocabulary, **D** model width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rag_jax.models.config import LogitShape
from rag_jax.models.products import float32_einsum

# Products of bfloat16 are as wide as a multiple of this: a GPU would copy other operands at every one.
ALIGNED = 128


def gold_log_probs(
    hidden_nD: Float[Array, "n D"],
    kernel_VD: Float[Array, "V D"],
    ids_n: Int[Array, " n"],
    chunk: int = 512,
    shape: LogitShape = LogitShape(),  # noqa: B008
) -> Float[Array, " n"]:
    """log softmax_V(hidden kernel)[ids], float32, of `chunk` tokens at a time: (n, V) never exists, nor its gradient.

    `shape`: what becomes of the products before the softmax.

    Products are of the dtype of `hidden`, sums in float32; the kernel's gradient adds up in the kernel's own dtype.
    Fused kernels (tokamax, Liger) give the loss summed over tokens, but a marginal needs each token's.
    """
    n, D = hidden_nD.shape
    num_chunks = -(-n // chunk)
    size = -(-n // num_chunks)
    room = num_chunks * size - n
    chunks = jnp.pad(hidden_nD, ((0, room), (0, 0))).reshape(num_chunks, size, D)
    chunk_ids = jnp.pad(ids_n, (0, room)).reshape(num_chunks, size)
    return _log_probs(shape, chunks, kernel_VD, chunk_ids).reshape(-1)[:n]


def _from_products(shape: LogitShape, hidden_cnD: Array, kernel_VD: Array, ids_cn: Array) -> Float[Array, "c n"]:
    gold_cn, log_sum_cn = _gold_and_log_sum(shape, hidden_cnD, kernel_VD, ids_cn)
    return gold_cn - log_sum_cn


def _gold_and_log_sum(shape: LogitShape, hidden_cnD: Array, kernel_VD: Array, ids_cn: Array) -> tuple[Array, Array]:
    kernel = _for_products(kernel_VD, hidden_cnD.dtype)

    def one(rows: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden_nD, ids_n = rows
        logits_nV, is_gold_nV = _logits(shape, hidden_nD, kernel, len(kernel_VD), ids_n)
        # A sum over V, not a gather: of a vocabulary split over devices each has a part of it.
        return jnp.sum(jnp.where(is_gold_nV, logits_nV, 0.0), axis=-1), jax.nn.logsumexp(logits_nV, axis=-1)

    return jax.lax.map(one, (hidden_cnD, ids_cn))


def _forward(shape: LogitShape, hidden_cnD: Array, kernel_VD: Array, ids_cn: Array) -> tuple[Array, Any]:
    gold_cn, log_sum_cn = _gold_and_log_sum(shape, hidden_cnD, kernel_VD, ids_cn)
    return gold_cn - log_sum_cn, (hidden_cnD, kernel_VD, ids_cn, log_sum_cn)


def _backward(shape: LogitShape, residuals: Any, cotangent_cn: Array) -> tuple[Array, Array, None]:
    """d log p_gold / d logit_v = [v is gold] - p_v, from logits that are computed once more."""
    hidden_cnD, kernel_VD, ids_cn, log_sum_cn = residuals
    kernel, dtype = _for_products(kernel_VD, hidden_cnD.dtype), hidden_cnD.dtype

    def one(total_VD: Array, rows: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        hidden_nD, ids_n, log_sum_n, cotangent_n = rows
        logits_nV, is_gold_nV = _logits(shape, hidden_nD, kernel, len(kernel_VD), ids_n)
        grad_nV = cotangent_n[:, None] * (is_gold_nV - jnp.exp(logits_nV - log_sum_n[:, None]))
        if shape != LogitShape():
            grad_nV = jnp.where(logits_nV > -jnp.inf, grad_nV * shape.slope(logits_nV), 0.0)
        grad_nV = grad_nV.astype(dtype)
        total_VD = total_VD + float32_einsum("nV,nD->VD", grad_nV, hidden_nD).astype(total_VD.dtype)
        return total_VD, float32_einsum("nV,VD->nD", grad_nV, kernel).astype(dtype)

    start = jnp.zeros(kernel.shape, kernel_VD.dtype)
    total_VD, hidden_grad_cnD = jax.lax.scan(one, start, (hidden_cnD, ids_cn, log_sum_cn, cotangent_cn))
    return hidden_grad_cnD, total_VD[: len(kernel_VD)], None


_log_probs = jax.custom_vjp(_from_products, nondiff_argnums=(0,))
_log_probs.defvjp(_forward, _backward)


def _for_products(kernel_VD: Array, dtype: Any) -> Array:
    room = -len(kernel_VD) % ALIGNED if dtype == jnp.bfloat16 else 0
    return jnp.pad(kernel_VD.astype(dtype), ((0, room), (0, 0)))


def _logits(shape: LogitShape, hidden_nD: Array, kernel: Array, vocab_size: int, ids_n: Array) -> tuple[Array, Array]:
    """Float32 logits, -inf where the kernel is padding, and which of them is the given token's."""
    logits_nV, token_V = shape(float32_einsum("nD,VD->nV", hidden_nD, kernel)), jnp.arange(len(kernel))
    if len(kernel) > vocab_size:
        logits_nV = jnp.where(token_V < vocab_size, logits_nV, -jnp.inf)
    return logits_nV, token_V == ids_n[:, None]
