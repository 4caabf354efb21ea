"""Rows of an array taken by number, with a gradient that is summed in float32 and in the same order every time.

GPUs add what is scattered as it comes. Told to keep an order, XLA sorts every number of it, not every row: a sort of
12.6 million for 16,384 tokens of width 768. bfloat16 sums stand still from the 256th equal addend on, and some tokens
are met thousands of times.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rag_jax.models.products import float32_einsum

# So many rows at most have their sums by one product with ones and zeros, whose work is the number of rows per addend.
FEW = 2048
# Addends that are summed at a time where rows are many.
BLOCK = 128


def taken(rows: Float[Array, "N ..."], index: Int[Array, " S"], dtype: Any) -> Float[Array, "S ..."]:
    """`rows[index]` in `dtype`; the gradient is in the dtype of the rows."""
    return _taken(rows, index, dtype)


def _as_they_are(rows: Array, index: Array, dtype: Any) -> Array:
    return rows[index].astype(dtype)


def _forward(rows: Array, index: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return _as_they_are(rows, index, dtype), (index, jnp.zeros_like(rows, shape=(len(rows), 0)))


def _backward(dtype: Any, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    index, like = residuals
    total = summed(cotangent.reshape(len(cotangent), -1), index, len(like))
    return total.astype(like.dtype).reshape(-1, *cotangent.shape[1:]), None


_taken = jax.custom_vjp(_as_they_are, nondiff_argnums=(2,))
_taken.defvjp(_forward, _backward)


@jax.custom_vjp
def taken_and_joined(
    rows: Float[Array, "N Lr ..."], index: Int[Array, " S"], own: Float[Array, "S Lo ..."]
) -> Float[Array, "S Lr+Lo ..."]:
    """`concatenate([rows[index], own], axis=1)`; on GPUs its gradient is summed first and cut then.

    What a product by cuBLAS reads lies in one piece: a cut of the gradient would be copied for it, and what is joined
    here, keys and values of all pairs, is the largest there is.
    """
    return jnp.concatenate([rows[index], own], axis=1)


def _joined_forward(rows: Array, index: Array, own: Array) -> tuple[Array, tuple[Array, Array]]:
    return taken_and_joined(rows, index, own), (index, jnp.zeros_like(rows, shape=(*rows.shape[:2], 0)))


def _joined_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, Array]:
    index, like = residuals
    num_rows, length, _ = like.shape
    of_rows = {"num_rows": num_rows, "length": length}
    cut_last = {"cuda": functools.partial(summed_and_cut, **of_rows)} if num_rows <= FEW else {}
    cut_first = functools.partial(cut_and_summed, **of_rows)
    total = jax.lax.platform_dependent(cotangent, index, default=cut_first, **cut_last)
    return total.astype(like.dtype), None, cotangent[:, length:]


taken_and_joined.defvjp(_joined_forward, _joined_backward)


def summed(addends: Float[Array, "S F"], index: Int[Array, " S"], num_rows: int) -> Float[Array, "N F"]:
    """sum_s [index_s = n] addend_s in float32, as each kind of device does it best and always in the same order."""
    ordered = summed_by_product if num_rows <= FEW else summed_in_blocks
    return jax.lax.platform_dependent(
        addends,
        index,
        cpu=functools.partial(summed_one_by_one, num_rows=num_rows),
        default=functools.partial(ordered, num_rows=num_rows),
    )


def cut_and_summed(
    joined: Float[Array, "S L ..."], index: Int[Array, " S"], num_rows: int, length: int
) -> Float[Array, "N {length} ..."]:
    """sum_s [index_s = n] joined_s[:length] in float32."""
    first = joined[:, :length]
    return summed(first.reshape(len(first), -1), index, num_rows).reshape(num_rows, *first.shape[1:])


def summed_and_cut(
    joined: Float[Array, "S L ..."], index: Int[Array, " S"], num_rows: int, length: int
) -> Float[Array, "N {length} ..."]:
    """The same by a product that reads what is joined as it lies."""
    total = summed_by_product(joined.reshape(len(joined), -1), index, num_rows)
    return total.reshape(num_rows, *joined.shape[1:])[:, :length]


def summed_one_by_one(addends: Float[Array, "S F"], index: Int[Array, " S"], num_rows: int) -> Float[Array, "N F"]:
    """The sums by a scatter, which a CPU does in the order of the addends."""
    return jnp.zeros((num_rows, addends.shape[1])).at[index].add(addends.astype(jnp.float32))


def summed_by_product(addends: Float[Array, "S F"], index: Int[Array, " S"], num_rows: int) -> Float[Array, "N F"]:
    """The same by a product with ones and zeros: nothing is scattered."""
    return float32_einsum("ns,sf->nf", (jnp.arange(num_rows)[:, None] == index).astype(addends.dtype), addends)


def summed_in_blocks(addends: Float[Array, "S F"], index: Int[Array, " S"], num_rows: int) -> Float[Array, "N F"]:
    """The same for many rows: addends are sorted by row, summed in blocks, and what is scattered goes to one row each.

    Blocks of sorted addends share no row but where one ends and the next begins.
    """
    S, F = addends.shape
    num_blocks = -(-S // BLOCK)
    index = jnp.pad(index, (0, num_blocks * BLOCK - S), constant_values=num_rows)
    order = jnp.argsort(index, stable=True)
    index_nT = index[order].reshape(num_blocks, BLOCK)
    addends_nTF = addends.at[order].get(mode="fill", fill_value=0).reshape(num_blocks, BLOCK, F)
    # Of a block, the row of slot j is the j-th different one.
    slot_nT = jnp.cumsum(jnp.pad(index_nT[:, 1:] != index_nT[:, :-1], ((0, 0), (1, 0))), axis=1)
    is_slot_njT = jnp.arange(BLOCK)[:, None] == slot_nT[:, None]
    sums_njF = float32_einsum("njt,ntf->njf", is_slot_njT.astype(addends_nTF.dtype), addends_nTF)
    row_nj = jnp.max(jnp.where(is_slot_njT, index_nT[:, None], -1), axis=2)
    # A block's first row that an earlier one began is added to the last row of the block that began it.
    last_n = slot_nT[:, -1]
    continues_n = jnp.pad(index_nT[1:, 0] == index_nT[:-1, -1], (1, 0))
    block_n = jnp.arange(num_blocks)
    begins_n = jax.lax.cummax(jnp.where(continues_n & (last_n == 0), 0, block_n))  # the block that began its last row
    owner_n = jnp.where(continues_n, jnp.roll(begins_n, 1), -1)
    is_owner_nm = block_n[:, None] == owner_n
    carried_nF = float32_einsum("nm,mf->nf", is_owner_nm.astype(jnp.float32), sums_njF[:, 0])
    is_last_nj = jnp.arange(BLOCK) == last_n[:, None]
    sums_njF += is_last_nj[:, :, None] * carried_nF[:, None]
    moved_nj = continues_n[:, None] & (jnp.arange(BLOCK) == 0)
    # Slots without a row go to places past the end, which are dropped; one each, as promised to the compiler.
    past_nj = num_rows + jnp.arange(num_blocks * BLOCK).reshape(num_blocks, BLOCK)
    row_nj = jnp.where(moved_nj | (row_nj < 0) | (row_nj >= num_rows), past_nj, row_nj)
    table_NF = jnp.zeros((num_rows, F))
    return table_NF.at[row_nj.reshape(-1)].set(sums_njF.reshape(-1, F), mode="drop", unique_indices=True)
