"""What the model families share: attention, dropout, positions and the scan over stacked layers.

**B** rows, **L** their own tokens, **Lk** keys that are looked at, **D** width, **H** heads, **G** key-value heads,
**C** channels of a head, **N** layers.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt32

# Of any number of tokens. Keys are kept transposed, as their product with queries reads them: XLA's CPU backend would
# turn all of them around again at every token that is decoded.
KeysValues = tuple[Float[Array, "B G C _"], Float[Array, "B G _ C"]]
Rope = tuple[Float[Array, "B L C2"], Float[Array, "B L C2"]]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
# What `Deferred.prepare` makes of a layer's parameters: whole ones in the compute dtype.
PREPARED = "prepared"
# What of a layer's forward pass stays in memory for its backward pass; the rest is computed again.
REMAT: dict[str, Callable[..., bool]] = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(PREPARED),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with weights, not attention
    "full": jax.checkpoint_policies.nothing_saveable,
}


def matrix_product(x: Float[Array, "... in"], kernel: Float[Array, "in out"]) -> Float[Array, "... out"]:
    """`x @ kernel` as a product of two matrices: XLA's CPU backend first copies operands that have more axes."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nnx.Linear):
    """`x @ kernel` in their dtype. The bias is added in float32: its gradient is a sum over all tokens."""

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        y = matrix_product(x, self.kernel[...])
        return y if self.bias is None else (y + self.bias[...]).astype(y.dtype)


def linear(in_width: int, out_width: int, *, bias: bool, rngs: nnx.Rngs) -> Linear:
    return Linear(in_width, out_width, use_bias=bias, rngs=rngs)


class Mlp(nnx.Module):
    def __init__(self, width: int, mlp_width: int, activation: str, *, rngs: nnx.Rngs):
        self.up = linear(width, mlp_width, bias=True, rngs=rngs)
        self.down = linear(mlp_width, width, bias=True, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class Embed(nnx.Embed):
    """Rows of a float32 table in `dtype`: the table's gradient, a sum over all tokens, is then made in float32.

    bfloat16 sums stand still from the 256th equal addend on, and some tokens are met thousands of times.
    """

    def __init__(self, num_rows: int, width: int, dtype: str, rngs: nnx.Rngs):
        super().__init__(num_rows, width, dtype=jnp.dtype(dtype), rngs=rngs)

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        return jnp.take(self.embedding[...], ids, axis=0).astype(self.dtype)


def layer_norm(width: int, eps: float, dtype: str, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Computed in float32; `dtype`: of the result."""
    # The fast variance (E[x^2] - E[x]^2) loses digits that PyTorch keeps.
    return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, dtype=jnp.dtype(dtype), rngs=rngs)


def rms_norm(width: int, eps: float, dtype: str, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Computed in float32; `dtype`: of the result."""
    return nnx.RMSNorm(width, epsilon=eps, dtype=jnp.dtype(dtype), rngs=rngs)


def dropout(x: Shaped[Array, "B ..."], rate: float, keys: Key[Array, " B"] | None) -> Shaped[Array, "B ..."]:
    """Zeroes a share `rate` of x and scales the rest up; without keys (evaluation) x as it is.

    Every row has its own key: what it loses does not depend on the rows beside it, be they chunks, groups or devices.
    """
    if keys is None or rate == 0.0:
        return x
    kept = random_bits(keys, x.shape[1:]) < np.uint32(round((1.0 - rate) * 2**32))
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros((), x.dtype))


def random_bits(keys: Key[Array, " B"], shape: tuple[int, ...]) -> UInt32[Array, "B ..."]:
    """Uniform 32-bit numbers, those of a row a function of its key and of their place in it.

    murmur3's finalizer (Appleby, 2011) of the place and one half of the key, and once more of that and the other half:
    an eighth of the operations that jax's own threefry takes, which are a third of a step where every attention weight
    may be dropped.
    """
    halves = jax.random.key_data(keys).reshape(-1, 2, *(1,) * len(shape))
    place = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    return _mixed(_mixed(place ^ halves[:, 0]) ^ halves[:, 1])


def _mixed(bits: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def named_keys(keys: Key[Array, " B"] | None, name: str) -> Key[Array, " B"] | None:
    """The random streams called `name`: a new name never shifts the others."""
    return numbered_keys(keys, zlib.crc32(name.encode()))


def numbered_keys(keys: Key[Array, " B"] | None, number: int | Int[Array, ""]) -> Key[Array, " B"] | None:
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def several_keys(keys: Key[Array, " B"] | None, num: int) -> Key[Array, " BN"] | None:
    """`num` random streams of each row, those of a row side by side."""
    if keys is None:
        return None
    fold_in = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return fold_in(keys, jnp.arange(num)).reshape(-1)


def positions_of(mask: Bool[Array, "B L"]) -> Int[Array, "B L"]:
    """Position of each real token among the real ones, so that left and right padding give the same result."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)


def rotate(x: Float[Array, "B heads L C"], rope: Rope) -> Float[Array, "B heads L C"]:
    """Rotary position embedding (Su et al., 2021), halves convention: channel i turns with channel i + C/2."""
    cos, sin = rope[0][:, None], rope[1][:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Seen(NamedTuple):
    """Which of a part's keys a query may look at.

    The (L, Lk) mask that this stands for is made in `attend` alone: a fused kernel, which never makes one, can take its
    place.
    """

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


class View(NamedTuple):
    """How layers of one kind place tokens and how far they look; of several kinds, stacked."""

    rope: Rope | None = None
    window: int | Int[Array, "..."] | None = None


def stacked_views(views: Sequence[View]) -> View:
    """Of every kind one; a single one stays as it is, its window a number that is known when compiling."""
    if len(views) == 1:
        return views[0]
    far = np.iinfo(np.int32).max
    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *(View(view.rope, jnp.asarray(far if view.window is None else view.window)) for view in views),
    )


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
    parts: Sequence[tuple[KeysValues, Seen]],
    rate: float = 0.0,
    dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B H L C"]:
    """Scaled dot-product attention over the keys of all parts as if they stood in one array, softmax in float32.

    Heads may share keys. A row that may look at nothing gives a mean.
    """
    B, H, L, C = query.shape
    # Heads that share keys are rows of one product with them.
    grouped = (query * C**-0.5).reshape(B, parts[0][0][0].shape[1], -1, C)
    attended = [
        attend_part(grouped, keys_values, seen.mask(L), rate, numbered_keys(dropout_keys, n))
        for n, (keys_values, seen) in enumerate(parts)
    ]
    out, _, total = functools.reduce(merged, attended)
    # Divided once, at the end: (L, C) divisions in place of (L, Lk), and the parts' sums are only all known here.
    return (out / total).astype(query.dtype).reshape(B, H, L, C)


def attend_part(
    query: Float[Array, "B G HL C"],
    keys_values: KeysValues,
    mask: Bool[Array, "B _ Lk"],
    rate: float,
    dropout_keys: Key[Array, " B"] | None,
) -> Part:
    """The plain way, for any device, dtype and length."""
    (key, value), (B, G, *_) = keys_values, query.shape
    scores = float32_product(query, key)
    by_head = scores.reshape(B, G, -1, *mask.shape[1:])  # rows are heads and queries
    # The lowest number, not -inf: a part of which a row sees nothing must count nothing beside others, and no NaN.
    scores = jnp.where(mask[:, None, None], by_head, jnp.finfo(jnp.float32).min).reshape(scores.shape)
    # It cancels when sums are divided, so no gradient needs to pass through it.
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    kept = dropout(weights.astype(value.dtype), rate, dropout_keys)
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


class Attention(nnx.Module):
    """Multi-head attention over the rows' own tokens and, where given, a context of earlier keys and values.

    `qk_norm`: eps and dtype of norms of queries and keys.
    """

    def __init__(
        self,
        width: int,
        heads: tuple[int, int, int],
        *,
        qkv_bias: bool,
        out_bias: bool,
        qk_norm: tuple[float, str] | None = None,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.num_kv_heads, self.head_dim = heads
        self.dropout_rate = dropout_rate
        self.query = linear(width, self.num_heads * self.head_dim, bias=qkv_bias, rngs=rngs)
        self.key = linear(width, self.num_kv_heads * self.head_dim, bias=qkv_bias, rngs=rngs)
        self.value = linear(width, self.num_kv_heads * self.head_dim, bias=qkv_bias, rngs=rngs)
        self.out = linear(self.num_heads * self.head_dim, width, bias=out_bias, rngs=rngs)
        self.qk_norm = qk_norm is not None
        if qk_norm is not None:
            self.query_norm = rms_norm(self.head_dim, *qk_norm, rngs)
            self.key_norm = rms_norm(self.head_dim, *qk_norm, rngs)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        own: Seen,
        *,
        rope: Rope | None = None,
        context: tuple[KeysValues, Seen] | None = None,
        dropout_keys: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B L D"], KeysValues]:
        """The attended values, and the rows' own keys and values; `own`: which of these are seen."""
        B, L, _ = x.shape

        def heads(projected: Array, count: int) -> Array:
            return jnp.swapaxes(projected.reshape(B, L, count, self.head_dim), 1, 2)

        query = heads(self.query(x), self.num_heads)
        key, value = heads(self.key(x), self.num_kv_heads), heads(self.value(x), self.num_kv_heads)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        keys_values = (jnp.swapaxes(key, -1, -2), value)
        parts = [(keys_values, own)] if context is None else [context, (keys_values, own)]
        attended = attend(query, parts, self.dropout_rate, named_keys(dropout_keys, "attention"))
        return self.out(jnp.swapaxes(attended, 1, 2).reshape(B, L, -1)), keys_values


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stored"], meta_fields=["prepare"])
@dataclasses.dataclass(frozen=True)
class Deferred:
    """A parameter of stacked layers that is made ready when its layer runs; until then a share, or in another dtype."""

    stored: Any
    prepare: Callable[[Any], Array]  # of one layer's


def deferred(params: Any, prepare: Callable[[tuple[str, ...], Any], Any]) -> Any:
    """The parameters of stacked layers, each to become `prepare(path, it)` when its layer runs."""

    def defer(path: Any, leaf: Any) -> Deferred:
        return Deferred(leaf, functools.partial(prepare, tuple(key.key for key in path)))

    return jax.tree_util.tree_map_with_path(defer, params)


def stack(make_layer: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`num_layers` layers as one module whose parameters carry a leading axis N."""
    return nnx.vmap(lambda key: make_layer(nnx.Rngs(key)))(jax.random.split(rngs.params(), num_layers))


def scan(
    layers: nnx.Module,
    body: Callable[[Any, Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    *,
    num_layers: int,
    remat: str,
    dropout_keys: Any = None,
    xs: Any = None,
) -> tuple[Any, Any]:
    """Runs `body(layer, carry, x, dropout_keys) -> (carry, y)` over stacked layers; the body is compiled once.

    `dropout_keys`: rows' keys, or several sets of them, of which every layer gets its own.
    """
    graphdef, state = nnx.split(layers)
    params = nnx.to_pure_dict(state)
    layer_keys = jax.tree.map(lambda keys: named_keys(keys, "layers"), dropout_keys)
    deferred = [leaf for leaf in jax.tree.leaves(params, is_leaf=_is_deferred) if _is_deferred(leaf)]

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        layer_params, x, n = inputs
        keys = jax.tree.map(lambda keys: numbered_keys(keys, n), layer_keys)
        layer_params = jax.tree.map(_prepared, layer_params, is_leaf=_is_deferred)
        return body(nnx.merge(graphdef, layer_params), carry, x, keys)

    if remat != "none" or deferred:
        # Also without rematerialisation, where only what was deferred is made again: kept for the backward pass, all
        # layers would be whole at one time after all. prevent_cse is only needed outside of a scan.
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(step, carry, (params, xs, jnp.arange(num_layers)))


def _is_deferred(leaf: Any) -> bool:
    return isinstance(leaf, Deferred)


def _prepared(leaf: Any) -> Any:
    return checkpoint_name(leaf.prepare(leaf.stored), PREPARED) if _is_deferred(leaf) else leaf
