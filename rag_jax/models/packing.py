"""Rows of tokens without most of their padding, end to end as if they were one row.

Embeddings, norms and products with weights look at one token at a time: they run on what is kept. Attention looks at
rows: around it they are laid out again, which copies their queries, keys and values. Tokens keep their bits of dropout.

**B** rows of **L** slots, of which **T** are kept; **F** channels of any kind.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


class Packing(NamedTuple):
    """Which slots are kept, and where."""

    slot: Int[Array, " T"]  # of those that are kept, among all B L
    place: Int[Array, "B L"]  # of every slot among the kept ones; T or more: it is left out


def packing_of(mask: Bool[Array, "B L"], num_tokens: int) -> Packing | None:
    """Keeps the real tokens in their order and then padding, `num_tokens` in all, which must be as many as are real.

    None, for rows as they are, where that would leave nothing out, and of 0 tokens.
    """
    if not 0 < num_tokens < mask.size:
        return None
    real = mask.reshape(-1)
    place = jnp.where(real, jnp.cumsum(real), jnp.sum(real) + jnp.cumsum(~real)) - 1
    return Packing(jnp.argsort(~real, stable=True)[:num_tokens], place.astype(jnp.int32).reshape(mask.shape))


def repeated(packing: Packing | None, num: int) -> Packing | None:
    """Of rows that stand `num` times each, side by side."""
    if packing is None:
        return None
    (slot, place), (B, L) = packing, packing.place.shape
    each = jnp.arange(num)
    slots = ((slot // L * num)[:, None] + each) * L + (slot % L)[:, None]
    return Packing(slots.reshape(-1), (place[:, None] * num + each[:, None]).reshape(B * num, L))


def packed(rows: Shaped[Array, "B L ..."], packing: Packing | None) -> Shaped[Array, "_ _ ..."]:
    """What is kept of the rows, (1, T, ...) as one of T tokens; without a packing the rows."""
    if packing is None:
        return rows
    (slot, place), (B, L, *channels) = packing, rows.shape
    return _moved(rows.reshape(B * L, *channels), slot, place.reshape(-1))[None]


def unpacked(tokens: Shaped[Array, "_ _ ..."], packing: Packing | None) -> Shaped[Array, "B L ..."]:
    """The rows again, of what `packed` gives; zeros in slots that were left out."""
    if packing is None:
        return tokens
    slot, place = packing
    return _moved(tokens[0], place.reshape(-1), slot).reshape(*place.shape, *tokens.shape[2:])


def _from(array: Array, index: Array) -> Array:
    return array.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _moved(array: Shaped[Array, "n ..."], index: Int[Array, " m"], back: Int[Array, " n"]) -> Shaped[Array, "m ..."]:
    """`array[index]`, zeros where the index is past the end; `back`: the same from the result to the array.

    No element goes to two places, so the gradient is such a move back: nothing is scattered.
    """
    return _from(array, index)


def _forward(array: Array, index: Array, back: Array) -> tuple[Array, Array]:
    return _from(array, index), back


def _backward(back: Array, cotangent: Array) -> tuple[Array, None, None]:
    return _from(cotangent, back), None, None


_moved.defvjp(_forward, _backward)
