"""Attention: over the tokens of a row, and over a context of earlier keys and values.

Letters as in `layers`; **Lk** keys that are looked at. Keys and values lie as the kernel that computes wants them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from rag_jax.models.config import Kernel
from rag_jax.models.layers import ATTENDED, Rope, dropout, linear, named_keys, numbered_keys, rotate
from rag_jax.models.packing import Packing, packed, unpacked
from rag_jax.models.rows import taken, taken_and_joined

# Of any number of tokens. The plain kernel's keys are transposed, as their product with queries reads them: XLA's CPU
# backend would turn all of them around again at every token that is decoded.
PlainKeysValues = tuple[Float[Array, "B G C _"], Float[Array, "B G _ C"]]
FusedKeysValues = tuple[Float[Array, "B _ G C"], Float[Array, "B _ G C"]]
KeysValues = tuple[Float[Array, "B _ _ _"], Float[Array, "B _ _ _"]]  # either of them
# So many slots a row are told apart by dropout of attention, however few there are: padding changes nothing.
LONGEST = np.uint32(4096)


class Seen(NamedTuple):
    """Which of a part's keys a query may look at; the (L, Lk) mask that this stands for is made by each kernel."""

    real: Bool[Array, "B Lk"]  # the keys that are tokens, not padding: left or right of them
    window: int | Int[Array, ""] | None = None  # only keys less than that far away; None: all
    causal: bool = False  # only keys at the query's own slot and before it
    offset: Int[Array, " B"] | None = None  # query i stands at slot offset + i of the keys; None: at slot i

    def mask(self, num_queries: int) -> Bool[Array, "B _ Lk"]:
        mask = self.real[:, None, :]
        if not self.causal and self.window is None:
            return mask
        first = 0 if self.offset is None else self.offset[:, None, None]
        distance = first + jnp.arange(num_queries)[:, None] - jnp.arange(mask.shape[-1])
        if self.causal:
            mask = mask & (distance >= 0)
        return mask if self.window is None else mask & (jnp.abs(distance) < self.window)


class Context(NamedTuple):
    """Earlier keys and values that rows see besides their own."""

    keys_values: KeysValues  # of R contexts
    seen: Seen  # of their keys; `offset` of rows
    index: Int[Array, " B"] | None = None  # each row's context; None: the one that lies where the row does

    def of_rows(self) -> tuple[KeysValues, Seen]:
        """A copy for each row."""
        index = self.index
        if index is None:
            return self.keys_values, self.seen
        return jax.tree.map(lambda a: taken(a, index, a.dtype), self.keys_values), self.seen_by_rows

    @property
    def seen_by_rows(self) -> Seen:
        return self.seen if self.index is None else self.seen._replace(real=self.seen.real[self.index])

    def joined(self, keys_values: FusedKeysValues) -> FusedKeysValues:
        """A copy for each row, and behind it the row's own."""
        key, value = (
            jnp.concatenate([of_context, own], axis=1)
            if self.index is None
            else taken_and_joined(of_context, self.index, own)
            for of_context, own in zip(self.keys_values, keys_values, strict=True)
        )
        return key, value


@jax.custom_vjp
def float32_product(x: Float[Array, "B G n m"], y: Float[Array, "B G m o"]) -> Float[Array, "B G n o"]:
    """`x @ y` in float32, of operands of one dtype; its gradients are products in the operands' dtype.

    Left to itself, jax multiplies the float32 cotangent as it is: on an accelerator at half the rate or less.
    """
    return _batched_product(x, y, preferred_element_type=jnp.float32)


def _batched_product(x: Array, y: Array, **kwargs: Any) -> Array:
    return jax.lax.dot_general(x, y, (((3,), (2,)), ((0, 1), (0, 1))), **kwargs)


def _float32_product_forward(x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return float32_product(x, y), (x, y)


def _float32_product_backward(operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    _, transposed = jax.vjp(_batched_product, *operands)
    return transposed(cotangent.astype(operands[0].dtype))


float32_product.defvjp(_float32_product_forward, _float32_product_backward)


class Part(NamedTuple):
    """Attention to some of the keys, not divided yet: each counts w_j = exp(score_j - highest).

    A kernel that divides, and gives the logarithm of its sum instead, gives Part(its output, that logarithm, 1).
    """

    out: Float[Array, "B G _ C"]  # sum_j w_j value_j
    highest: Float[Array, "B G _ 1"]
    total: Float[Array, "B G _ 1"]  # sum_j w_j


def attend(
    query: Float[Array, "B H L C"],
    parts: Sequence[tuple[PlainKeysValues, Seen]],
    rate: float = 0.0,
    dropout_keys: Key[Array, " B"] | None = None,
    softcap: float | None = None,
    bias: Float[Array, "H L Lk"] | None = None,
) -> Float[Array, "B H L C"]:
    """Scaled dot-product attention over the keys of all parts as if they stood in one array, softmax in float32.

    Heads may share keys. A row that may look at nothing gives a mean. `softcap`: scores come no further than that from
    0. `bias`: is added to the scores, of one part alone.
    """
    B, H, L, C = query.shape
    # Heads that share keys are rows of one product with them.
    grouped = (query * C**-0.5).reshape(B, parts[0][0][0].shape[1], -1, C)
    rows = jnp.arange(H, dtype=jnp.uint32)[:, None] * LONGEST + jnp.arange(L, dtype=jnp.uint32)
    rows = rows.reshape(grouped.shape[1], -1)
    attended = [
        attend_part(grouped, keys_values, seen.mask(L), rate, numbered_keys(dropout_keys, n), rows, softcap, bias)
        for n, (keys_values, seen) in enumerate(parts)
    ]
    out, _, total = functools.reduce(merged, attended)
    # Divided once, at the end: (L, C) divisions in place of (L, Lk), and the parts' sums are only all known here.
    return (out / total).astype(query.dtype).reshape(B, H, L, C)


def attend_part(
    query: Float[Array, "B G HL C"],
    keys_values: PlainKeysValues,
    mask: Bool[Array, "B _ Lk"],
    rate: float = 0.0,
    dropout_keys: Key[Array, " B"] | None = None,
    rows: UInt32[Array, "G HL"] | None = None,
    softcap: float | None = None,
    bias: Float[Array, "H L Lk"] | None = None,
) -> Part:
    """The plain way, for any device, dtype and length. `rows`: numbers of heads and queries, for dropout."""
    (key, value), (B, G, *_) = keys_values, query.shape
    scores = float32_product(query, key)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.reshape(1, G, -1, bias.shape[-1])
    by_head = scores.reshape(B, G, -1, *mask.shape[1:])  # rows are heads and queries
    # The lowest number, not -inf: a part of which a row sees nothing must count nothing beside others, and no NaN.
    scores = jnp.where(mask[:, None, None], by_head, jnp.finfo(jnp.float32).min).reshape(scores.shape)
    # It cancels when sums are divided, so no gradient needs to pass through it.
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    places = None if rows is None else rows[..., None] * LONGEST + jnp.arange(mask.shape[-1], dtype=jnp.uint32)
    kept = dropout(weights.astype(value.dtype), rate, dropout_keys, places=places)
    out = float32_product(kept, value)
    return Part(out, highest, total)


def merged(one: Part, other: Part) -> Part:
    """Attention to the keys of both.

    Only the new `highest` is a constant. A part's own may be the logarithm of the sum that its output was divided by,
    and then gradients must pass through it.
    """
    highest = jax.lax.stop_gradient(jnp.maximum(one.highest, other.highest))
    scales = jnp.exp(one.highest - highest), jnp.exp(other.highest - highest)
    out, total = (one[n] * scales[0] + other[n] * scales[1] for n in (0, 2))
    return Part(out, highest, total)


def attend_fused(
    query: Float[Array, "B L H C"], keys_values: FusedKeysValues, own: Seen, context: Context | None, kernel: Kernel
) -> Float[Array, "B L H C"]:
    """`attend` by a kernel that never writes scores to memory."""
    attend_by = _attend_pallas if kernel.startswith("pallas") else _attend_jax
    of_context = None if context is None else context.keys_values
    masks, structure = jax.tree.flatten((own, context and (context.seen, context.index)))
    arrays, others = zip(*((leaf, None) if isinstance(leaf, Array) else (None, leaf) for leaf in masks), strict=True)

    def attended(query: Array, keys_values: FusedKeysValues, of_context: Any, arrays: Any) -> Array:
        masks = [other if array is None else array for array, other in zip(arrays, others, strict=True)]
        own, more = jax.tree.unflatten(structure, masks)
        return attend_by(kernel, query, keys_values, own, more and Context(of_context, *more))

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes and mesh.auto_axes:
        # Where some axes are split by hand, the compiler cannot split such a kernel along the others.
        by_head = PartitionSpec(None, None, mesh.auto_axes)
        attended = jax.shard_map(
            attended, in_specs=(by_head, by_head, by_head, PartitionSpec()), out_specs=by_head,
            axis_names=set(mesh.auto_axes), check_vma=False,
        )  # fmt: skip
    return checkpoint_name(attended(query, keys_values, of_context, arrays), ATTENDED)


def _attend_jax(
    kernel: Kernel, query: Array, keys_values: FusedKeysValues, own: Seen, context: Context | None
) -> Array:
    """By `jax.nn.dot_product_attention`.

    Parts that are merged by their logarithms of sums would save a copy of the keys, but jax gives those no gradient.
    """
    key, value = keys_values if context is None else context.joined(keys_values)
    (B, L, *_), Lk = query.shape, key.shape[1]
    parts = [own] if context is None else [context.seen_by_rows, own]
    seen = (jnp.broadcast_to(part.mask(L), (B, L, part.real.shape[1])) for part in parts)
    mask = jnp.concatenate(list(seen), axis=-1)[:, None]
    fits_cudnn = L % 2 == 0 and Lk % 2 == 0  # it takes even lengths alone
    implementation = "cudnn" if kernel == "cudnn" and fits_cudnn else "xla"
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)


def _attend_pallas(
    kernel: Kernel, query: Array, keys_values: FusedKeysValues, own: Seen, context: Context | None
) -> Array:
    """By our own kernel for TPUs, as long as what a row sees fits into the chip."""
    from rag_jax.models import tpu_attention  # half a second of Pallas, for nobody else

    if query.shape[1] + (0 if context is None else context.keys_values[0].shape[1]) > tpu_attention.MOST_TOKENS:
        return _attend_jax(kernel, query, keys_values, own, context)
    shared: tuple[Any, ...] = ()
    if context is not None:
        shared = (*context.keys_values, context.seen.real), context.index, context.seen.offset
    return tpu_attention.attend(
        query,
        (*keys_values, own.real),
        *shared,
        causal=own.causal,
        window=own.window,
        interpret=kernel == "pallas-interpreted",
    )


class Attention(nnx.Module):
    """Multi-head attention over the rows' own tokens and, where given, a context of earlier keys and values.

    `qk_norm`: makes a norm of so many channels, of queries and of keys; of each head's, or with `norms_all` of all
    heads' together. `scale`: of scores, in place of C**-0.5. `softcap`: see `attend`.
    """

    def __init__(
        self,
        width: int,
        heads: tuple[int, int, int],
        *,
        qkv_bias: bool,
        out_bias: bool,
        qk_norm: Callable[[int], nnx.Module] | None = None,
        norms_all: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.num_kv_heads, self.head_dim = heads
        self.dropout_rate = dropout_rate
        self.query = linear(width, self.num_heads * self.head_dim, bias=qkv_bias, rngs=rngs)
        self.key = linear(width, self.num_kv_heads * self.head_dim, bias=qkv_bias, rngs=rngs)
        self.value = linear(width, self.num_kv_heads * self.head_dim, bias=qkv_bias, rngs=rngs)
        self.out = linear(self.num_heads * self.head_dim, width, bias=out_bias, rngs=rngs)
        self.scale, self.softcap = scale, softcap
        self.qk_norm, self.norms_all = qk_norm is not None, norms_all
        if qk_norm is not None:
            counts = (self.num_heads, self.num_kv_heads) if norms_all else (1, 1)
            self.query_norm, self.key_norm = (qk_norm(count * self.head_dim) for count in counts)

    def __call__(
        self,
        x: Float[Array, "_ L D"],
        own: Seen,
        *,
        rope: Rope | None = None,
        context: Context | None = None,
        kernel: Kernel = "plain",
        dropout_keys: Key[Array, " B"] | None = None,
        packing: Packing | None = None,
        bias: Float[Array, "H S S"] | None = None,
    ) -> tuple[Float[Array, "_ L D"], KeysValues]:
        """The attended values, and the rows' own keys and values; `own`: which of these are seen.

        `kernel`: what computes it, and so how keys and values lie, those of the context too. A fused one knows no
        dropout, no softcap and no bias: with some, the plain one takes its place. `packing`: how x, and what is
        attended, is packed; keys and values never are. `bias`: of scores between a row's S slots, where there
        is no context.
        """

        def heads(projected: Array, count: int) -> Array:
            return projected.reshape(*x.shape[:2], count, self.head_dim)

        query, key, value = (of(x, dropout_keys, packing) for of in (self.query, self.key, self.value))
        if self.qk_norm and self.norms_all:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = heads(query, self.num_heads), heads(key, self.num_kv_heads), heads(value, self.num_kv_heads)
        if self.qk_norm and not self.norms_all:
            query, key = self.query_norm(query), self.key_norm(key)
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        if self.scale is not None:
            query = query * (self.scale * self.head_dim**0.5)
        query, key, value = (unpacked(array, packing) for array in (query, key, value))
        drops = dropout_keys is not None and self.dropout_rate > 0
        is_plain = kernel == "plain" or drops or self.softcap is not None or bias is not None
        keys_values = (jnp.transpose(key, (0, 2, 3, 1)), jnp.swapaxes(value, 1, 2)) if is_plain else (key, value)
        if is_plain:
            parts = [(keys_values, own)] if context is None else [context.of_rows(), (keys_values, own)]
            keys = named_keys(dropout_keys, "attention")
            attended = attend(jnp.swapaxes(query, 1, 2), parts, self.dropout_rate, keys, self.softcap, bias)
            attended = jnp.swapaxes(attended, 1, 2)
        else:
            attended = attend_fused(query, keys_values, own, context, kernel)
        attended = packed(attended.reshape(*attended.shape[:2], -1), packing)
        return self.out(attended, dropout_keys, packing), keys_values
