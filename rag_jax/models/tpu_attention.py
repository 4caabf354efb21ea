"""Attention for TPUs: a Pallas kernel that keeps scores on the chip and reads a row's context where it lies.

Several rows may stand behind one context. Rows run in the order of their contexts, so that each is fetched once, and
the gradient of its keys and values is summed on the chip. All keys that a row sees are there at a time: softmax needs
no second pass, and the backward pass nothing but what the forward pass had.

Letters as in `attention`; **R** contexts of **Lc** tokens. Heads lie side by side in the last axis, as products with
weights leave them: HC is H times C wide.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

# Queries whose scores exist at a time.
QUERY_BLOCK = 256
# Of a chip's fast memory, what a call may take: scores, and blocks twice, one computed on and one on its way.
MOST_BYTES = 13 * 2**20
# What the compiler may take of it after all: twice its default. Chips since the v5e have as much.
VMEM_LIMIT = 2**25
# Blocks of queries and heads that a call computes one after the other: each is compiled.
MOST_UNROLLED = 16
# What a row may see, its own keys and its context's.
MOST_TOKENS = 1024
LANES = 128
LOWEST = float(np.finfo(np.float32).min)
FAR = np.iinfo(np.int32).max


class Shape(NamedTuple):
    """What the kernel is compiled for."""

    heads: tuple[int, int, int]  # (H, G, C)
    causal: bool  # a row's own tokens see no later ones
    windowed: bool
    interpret: bool  # by jax on any device, for tests


class Own(NamedTuple):
    """A row's own keys and values."""

    key: Float[Array, "B L GC"]
    value: Float[Array, "B L GC"]
    bias: Float[Array, "B 1 L"]  # 0, or the lowest number where a key is padding


class Shared(NamedTuple):
    """Contexts, and which of them a row sees."""

    key: Float[Array, "R Lc GC"]
    value: Float[Array, "R Lc GC"]
    bias: Float[Array, "R 1 Lc"]
    index: Int[Array, " B"]
    offset: Int[Array, " B"]  # query i of a row stands at offset + i of its context


def attend(
    query: Float[Array, "B L H C"],
    own: tuple[Float[Array, "B L G C"], Float[Array, "B L G C"], Bool[Array, "B L"]],
    context: tuple[Float[Array, "R Lc G C"], Float[Array, "R Lc G C"], Bool[Array, "R Lc"]] | None = None,
    index: Int[Array, " B"] | None = None,
    offset: Int[Array, " B"] | None = None,
    *,
    causal: bool,
    window: int | Int[Array, ""] | None = None,
    interpret: bool = False,
) -> Float[Array, "B L H C"]:
    """Softmax in float32 over a row's own keys and its context's as if they stood in one array.

    `own`, `context`: keys, values, and which of them are no padding. `index`: each row's context; none: as they lie.
    `offset`: where a row's queries stand in its context, for the window: keys further away are not seen.
    """
    (B, L, H, C), G = query.shape, own[0].shape[2]

    def flat(key: Array, value: Array, real: Array) -> tuple[Array, Array, Array]:
        rows, length = real.shape
        return key.reshape(rows, length, -1), value.reshape(rows, length, -1), jnp.where(real, 0.0, LOWEST)[:, None]

    shared = None
    if context is not None:
        index = jnp.arange(B) if index is None else index
        shared = Shared(*flat(*context), index, jnp.zeros(B, jnp.int32) if offset is None else offset)
    limit = jnp.asarray(FAR if window is None else window, jnp.int32).reshape(1)
    shape = Shape((H, G, C), causal, window is not None, interpret)
    return _attention(shape, query.reshape(B, L, -1), Own(*flat(*own)), shared, limit).reshape(B, L, H, C)


def _attended(shape: Shape, query: Array, own: Own, shared: Shared | None, window: Array) -> Float[Array, "B L HC"]:
    return _call(shape, query, own, shared, window)[0]


def _forward(shape: Shape, query: Array, own: Own, shared: Shared | None, window: Array) -> tuple[Array, Any]:
    return _attended(shape, query, own, shared, window), (query, own, shared, window)


def _backward(shape: Shape, operands: Any, cotangent: Array) -> tuple[Array, Own, Shared | None, None]:
    query, own, shared, window = operands
    query_grad, key_grad, value_grad, *context_grads = _call(shape, query, own, shared, window, cotangent)
    if shared is not None:
        # What no row reads is never written.
        is_read_R = (shared.index == jnp.arange(len(shared.key))[:, None]).any(axis=1)
        context_grads = [jnp.where(is_read_R[:, None, None], gradient, 0) for gradient in context_grads]
        shared = Shared._make([*context_grads, None, None, None])
    return query_grad, Own._make([key_grad, value_grad, None]), shared, None


_attention = jax.custom_vjp(_attended, nondiff_argnums=(0,))
_attention.defvjp(_forward, _backward)


def _call(
    shape: Shape, query: Array, own: Own, shared: Shared | None, window: Array, cotangent: Array | None = None
) -> Sequence[Array]:
    """The kernel over all rows and blocks of heads: the attended values, or the gradients of the operands."""
    (B, L, _), (H, G, C), is_backward = query.shape, shape.heads, cotangent is not None
    Lc = 0 if shared is None else shared.key.shape[1]
    # Of one key-value head: what is as wide as its query heads, what is as wide as itself, sums of gradients.
    wide, narrow = (3 * H // G, 4) if is_backward else (2 * H // G, 2)
    head_bytes = C * 2 * query.dtype.itemsize * (L * (wide + narrow) + Lc * narrow) + is_backward * 8 * C * (L + Lc)
    left = MOST_BYTES - 4 * 4 * min(L, QUERY_BLOCK) * (L + Lc)
    num_heads = heads_at_a_time(shape.heads, left // head_bytes, MOST_UNROLLED // -(-L // QUERY_BLOCK))
    queries, keys = num_heads * C * H // G, num_heads * C

    # Grid: blocks of heads, rows by their contexts.
    def of_row(length: int, width: int, h: int = 1) -> pl.BlockSpec:
        return pl.BlockSpec((1, length, width), lambda head, b, order, *_: (order[b], 0, head * h))

    def of_context(length: int, width: int, h: int = 1) -> pl.BlockSpec:
        return pl.BlockSpec((1, length, width), lambda head, b, order, index, *_: (index[b], 0, head * h))

    order, index, offset = jnp.arange(B, dtype=jnp.int32), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)
    arrays: list[Array] = [query, *own]
    specs = [of_row(L, queries), of_row(L, keys), of_row(L, keys), of_row(1, L, 0)]
    gradients, gradient_specs = [query, own.key, own.value], specs[:3]
    if shared is not None:
        order = jnp.argsort(shared.index).astype(jnp.int32)
        index, offset = shared.index[order].astype(jnp.int32), shared.offset[order].astype(jnp.int32)
        arrays += shared[:3]
        specs += [of_context(Lc, keys), of_context(Lc, keys), of_context(1, Lc, 0)]
        gradients, gradient_specs = [*gradients, *shared[:2]], [*gradient_specs, *specs[-3:-1]]
    scalars, scratch, products = [order, index, offset, window], [], 2
    body = functools.partial(_forward_kernel, shape)
    if cotangent is None:
        gradients, gradient_specs = gradients[:1], gradient_specs[:1]
    else:
        arrays, specs, products = [*arrays, cotangent], [*specs, specs[0]], 5
        body = functools.partial(_backward_kernel, shape, shared is not None)
        scratch = [pltpu.VMEM((length, keys), jnp.float32) for length in (L, L, Lc, Lc) if length]
    pairs = B * H * (L * Lc + (_causal_pairs(L) if shape.causal else L * L))
    moved = sum(math.prod(array.shape) * array.dtype.itemsize for array in [*arrays, *gradients])
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=(G // num_heads, B), in_specs=specs, out_specs=gradient_specs,
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in gradients],
        cost_estimate=pl.CostEstimate(flops=2 * products * pairs * C, transcendentals=pairs, bytes_accessed=moved),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=shape.interpret,
        name="attention_backward" if is_backward else "attention",
    )(*scalars, *arrays)  # fmt: skip


def _causal_pairs(length: int) -> int:
    """Pairs of queries and keys that are computed: of a block of queries, all keys up to its last."""
    starts = range(0, length, QUERY_BLOCK)
    return sum(end * (end - start) for start in starts for end in [min(start + QUERY_BLOCK, length)])


def heads_at_a_time(heads: tuple[int, int, int], most_shared: int, most: int) -> int:
    """Key-value heads of a block: as many as there may be, and so many that it is cut where the chip's lanes are.

    `most_shared`: of these; `most`: of query heads. More where there is no other way to cut.
    """
    H, G, C = heads
    lanes = (n * C % LANES == 0 and n * C * (H // G) % LANES == 0 for n in range(1, G))
    ways = [n for n, is_whole in enumerate(lanes, 1) if G % n == 0 and is_whole] + [G]
    return max((n for n in ways if n <= most_shared and n * H // G <= most), default=ways[0])


def _forward_kernel(shape: Shape, *refs: Any) -> None:
    (_, _, offset, window), (query, *parts, out) = refs[:4], refs[4:]
    for head, shared, rows in _blocks(shape, query):
        weights, total, (_, *values) = _weights(shape, offset, window, query, parts, (head, shared, rows))
        attended = jnp.zeros((len(weights[0]), shape.heads[2]), jnp.float32)
        for weight, value in zip(weights, values, strict=True):
            attended += _dot(weight.astype(value.dtype), value)
        out[0, rows, head] = (attended / total).astype(out.dtype)


def _backward_kernel(shape: Shape, has_context: bool, *refs: Any) -> None:
    (_, index, offset, window), refs, num_parts = refs[:4], refs[4:], 1 + has_context
    (query, *parts, cotangent), refs = refs[: 2 + 3 * num_parts], refs[2 + 3 * num_parts :]
    (query_grad, *grads), sums = refs[: 1 + 2 * num_parts], refs[1 + 2 * num_parts :]
    row, last_row = pl.program_id(1), pl.num_programs(1) - 1
    first_of_context = (row == 0) | (index[jnp.maximum(row - 1, 0) * has_context] != index[row * has_context])
    last_of_context = (row == last_row) | (
        index[jnp.minimum(row + 1, last_row) * has_context] != index[row * has_context]
    )

    def clear(sums: Sequence[Any]) -> None:
        for total in sums:
            total[...] = jnp.zeros_like(total)

    def write(grads: Sequence[Any], sums: Sequence[Any]) -> None:
        for gradient, total in zip(grads, sums, strict=True):
            gradient[0] = total[...].astype(gradient.dtype)

    clear(sums[:2])
    pl.when(first_of_context)(functools.partial(clear, sums[2:]))
    for head, shared, rows in _blocks(shape, query):
        weights, total, (q, *values) = _weights(shape, offset, window, query, parts, (head, shared, rows))
        gradient = cotangent[0, rows, head]
        weights = [weight / total for weight in weights]
        weight_grads = [_dot_transposed(gradient, value) for value in values]
        mean = _total(w * g for w, g in zip(weights, weight_grads, strict=True))
        of_query = jnp.zeros(q.shape, jnp.float32)
        for n, (weight, weight_grad) in enumerate(zip(weights, weight_grads, strict=True)):
            length = weight.shape[1]
            score_grad = (weight * (weight_grad - mean) * shape.heads[2] ** -0.5).astype(q.dtype)
            of_query += _dot(score_grad, parts[3 * n][0, :length, shared])
            sums[2 * n][:length, shared] += _transposed_dot(score_grad, q)
            sums[2 * n + 1][:length, shared] += _transposed_dot(weight.astype(gradient.dtype), gradient)
        query_grad[0, rows, head] = of_query.astype(query_grad.dtype)
    write(grads[:2], sums[:2])
    pl.when(last_of_context)(functools.partial(write, grads[2:], sums[2:]))


def _blocks(shape: Shape, query: Any) -> Iterator[tuple[slice, slice, slice]]:
    """Channels of a query head, those of its key-value head, and queries, of everything that a call computes."""
    (H, G, C), L = shape.heads, query.shape[1]
    for n in range(query.shape[2] // C):
        shared = n // (H // G) * C
        for start in range(0, L, QUERY_BLOCK):
            yield slice(n * C, (n + 1) * C), slice(shared, shared + C), slice(start, min(start + QUERY_BLOCK, L))


def _weights(
    shape: Shape, offset: Any, window: Any, query: Any, parts: Sequence[Any], block: tuple[slice, slice, slice]
) -> tuple[list[Array], Array, list[Array]]:
    """exp(score - highest) of the own keys and of the context's, and their sum; the queries, and the values of both.

    `parts`: keys, values and biases of the row's own, then of its context if there is one.
    """
    head, shared, rows = block
    q, scores, values = query[0, rows, head], [], []
    for n, (key, value, bias) in enumerate(zip(parts[::3], parts[1::3], parts[2::3], strict=True)):
        is_own = n == 0
        length = rows.stop if is_own and shape.causal else key.shape[1]  # these queries see no later keys
        score = _dot_transposed(q, key[0, :length, shared]) * shape.heads[2] ** -0.5 + bias[0, :, :length]
        first = rows.start if is_own else offset[pl.program_id(1)] + rows.start
        place, other = (jax.lax.broadcasted_iota(jnp.int32, score.shape, axis) for axis in (0, 1))
        distance = first + place - other
        if is_own and shape.causal:
            score = jnp.where(distance < 0, LOWEST, score)
        if shape.windowed:
            score = jnp.where(jnp.abs(distance) >= window[0], LOWEST, score)
        # The lowest number and a score may add up to -inf, and a row that sees nothing but that would be NaN.
        scores.append(jnp.maximum(score, LOWEST))
        values.append(value[0, :length, shared])
    highest = functools.reduce(jnp.maximum, (jnp.max(score, axis=1, keepdims=True) for score in scores))
    weights = [jnp.exp(score - highest) for score in scores]
    return weights, _total(weights), [q, *values]


def _total(parts: Any) -> Float[Array, "m 1"]:
    return functools.reduce(jnp.add, (jnp.sum(part, axis=1, keepdims=True) for part in parts))


def _product(x: Array, y: Array, contracted: tuple[int, int]) -> Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def _dot(x: Float[Array, "m k"], y: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return _product(x, y, (1, 0))


def _dot_transposed(x: Float[Array, "m k"], y: Float[Array, "n k"]) -> Float[Array, "m n"]:
    return _product(x, y, (1, 1))


def _transposed_dot(x: Float[Array, "k m"], y: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return _product(x, y, (0, 0))
