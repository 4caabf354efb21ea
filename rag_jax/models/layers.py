"""What the model families share: attention, dropout, positions and the scan over stacked layers.

Letters as in the whole project: B rows, L own tokens, M keys that may be looked at, D width, H heads, G key-value
heads, R query heads per key-value head (H = G * R), C channels of a head, N layers.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

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
# A layer's parameters as `prepare` made them: whole, in the compute dtype. Never kept for the backward pass.
PREPARED = "prepared"
# What of a layer's forward pass stays in memory for its backward pass; the rest is computed again.
REMAT: dict[str, Callable[..., bool]] = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(PREPARED),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with weights, not attention
    "full": jax.checkpoint_policies.nothing_saveable,
}


def flat_dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, **kwargs: Any) -> jax.Array:
    """`x @ kernel` as a product of two matrices: XLA's CPU backend first copies operands that have more axes."""
    flat = x.reshape(-1, x.shape[-1])
    out = jax.lax.dot_general(flat, kernel, (((1,), (0,)), ((), ())), **kwargs)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


def linear(in_width: int, out_width: int, *, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(in_width, out_width, use_bias=bias, dot_general=flat_dot_general, rngs=rngs)


class Embed(nnx.Embed):
    """Rows of a table in the dtype that the table has by now: nnx.Embed returns the one that it was made in.

    A float32 row here would make all that follows float32, whatever the compute dtype.
    """

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        return jnp.take(self.embedding[...], ids, axis=0)


def layer_norm(width: int, eps: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance (E[x^2] - E[x]^2) loses digits that PyTorch keeps.
    return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, rngs=rngs)


def rms_norm(width: int, eps: float, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, epsilon=eps, rngs=rngs)


def dropout(x: Shaped[Array, "B ..."], rate: float, keys: Key[Array, " B"] | None) -> Shaped[Array, "B ..."]:
    """Zeroes a share `rate` of x and scales the rest up; without keys (evaluation) x as it is.

    Every row has its own key: what it loses does not depend on the rows beside it, be they chunks, groups or devices.
    """
    if keys is None or rate == 0.0:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros((), x.dtype))


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


def attend(
    query: Float[Array, "B H L C"],
    parts: Sequence[tuple[KeysValues, Bool[Array, "B L _"]]],
    rate: float = 0.0,
    dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B H L C"]:
    """Scaled dot-product attention over the keys of all parts as if they stood in one array; (L, M) masks beside them.

    Grouped heads, softmax in float32. A row that may look at nothing gives a mean. Parts are never joined: they share
    one maximum and one sum, by which the result is divided at the end.
    """
    B, H, L, C = query.shape
    G = parts[0][0][0].shape[1]
    R = H // G
    grouped = (query * C**-0.5).reshape(B, G, R * L, C)
    scores = []
    for (key, _), mask in parts:
        part = jax.lax.dot_general(grouped, key, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
        seen = jnp.where(mask[:, None, None], part.reshape(B, G, R, L, -1), jnp.finfo(jnp.float32).min)
        scores.append(seen.reshape(part.shape))
    highest = functools.reduce(jnp.maximum, (jnp.max(part, axis=-1, keepdims=True) for part in scores))
    out, total = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    for n, (part, ((_, value), _)) in enumerate(zip(scores, parts, strict=True)):
        weights = jnp.exp(part - jax.lax.stop_gradient(highest))
        total = total + jnp.sum(weights, axis=-1, keepdims=True)
        kept = dropout(weights.astype(value.dtype), rate, numbered_keys(dropout_keys, n))
        out = out + jax.lax.dot_general(
            kept, value, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
        )
    return (out / total).astype(query.dtype).reshape(B, H, L, C)


class Attention(nnx.Module):
    """Multi-head attention over the rows' own tokens and, where given, a context of earlier keys and values."""

    def __init__(
        self,
        width: int,
        heads: tuple[int, int, int],
        *,
        qkv_bias: bool,
        out_bias: bool,
        qk_norm_eps: float | None = None,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.num_kv_heads, self.head_dim = heads
        self.dropout_rate = dropout_rate
        self.query = linear(width, self.num_heads * self.head_dim, bias=qkv_bias, rngs=rngs)
        self.key = linear(width, self.num_kv_heads * self.head_dim, bias=qkv_bias, rngs=rngs)
        self.value = linear(width, self.num_kv_heads * self.head_dim, bias=qkv_bias, rngs=rngs)
        self.out = linear(self.num_heads * self.head_dim, width, bias=out_bias, rngs=rngs)
        self.qk_norm = qk_norm_eps is not None
        if qk_norm_eps is not None:
            self.query_norm = rms_norm(self.head_dim, qk_norm_eps, rngs)
            self.key_norm = rms_norm(self.head_dim, qk_norm_eps, rngs)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        mask: Bool[Array, "B L M"],
        *,
        rope: Rope | None = None,
        context: KeysValues | None = None,
        dropout_keys: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B L D"], KeysValues]:
        """The attended values, and the rows' own keys and values; M counts the context first, then the own tokens."""
        B, L, _ = x.shape

        def heads(projected: Array, count: int) -> Array:
            return jnp.swapaxes(projected.reshape(B, L, count, self.head_dim), 1, 2)

        query = heads(self.query(x), self.num_heads)
        key, value = heads(self.key(x), self.num_kv_heads), heads(self.value(x), self.num_kv_heads)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        own = (jnp.swapaxes(key, -1, -2), value)
        earlier = mask.shape[-1] - L
        parts = [(own, mask[:, :, earlier:])]
        if context is not None:
            parts = [(context, mask[:, :, :earlier]), *parts]
        attended = attend(query, parts, self.dropout_rate, named_keys(dropout_keys, "attention"))
        return self.out(jnp.swapaxes(attended, 1, 2).reshape(B, L, -1)), own


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
    prepare: Callable[[Any], Any] | None = None,
    dropout_keys: Any = None,
    xs: Any = None,
) -> tuple[Any, Any]:
    """Runs `body(layer, carry, x, dropout_keys) -> (carry, y)` over stacked layers; the body is compiled once.

    `prepare` makes what a layer computes with from its own parameters, which may be parts in another dtype.
    `dropout_keys`: rows' keys, or several sets of them, of which every layer gets its own.
    """
    graphdef, state = nnx.split(layers)
    params = nnx.to_pure_dict(state)
    layer_keys = jax.tree.map(lambda keys: named_keys(keys, "layers"), dropout_keys)

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        layer_params, x, n = inputs
        keys = jax.tree.map(lambda keys: numbered_keys(keys, n), layer_keys)
        if prepare is not None:
            layer_params = jax.tree.map(lambda a: checkpoint_name(a, PREPARED), prepare(layer_params))
        return body(nnx.merge(graphdef, layer_params), carry, x, keys)

    if remat != "none" or prepare is not None:
        # prevent_cse is only needed outside of a scan.
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(step, carry, (params, xs, jnp.arange(num_layers)))
