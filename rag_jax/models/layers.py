"""What the model families share: attention, dropout, positions and the scan over stacked layers.

Letters as in the whole project: B rows, L own tokens, M keys that may be looked at, D width, H heads, G key-value
heads, R query heads per key-value head (H = G * R), C channels of a head, N layers.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

KeysValues = tuple[Float[Array, "B _ G C"], Float[Array, "B _ G C"]]  # of any number of tokens
Rope = tuple[Float[Array, "B L C2"], Float[Array, "B L C2"]]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
# What of a layer's forward pass stays in memory for its backward pass; the rest is computed again.
REMAT: dict[str, Callable[..., bool]] = {
    "none": jax.checkpoint_policies.everything_saveable,  # as without a policy
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


def positions_of(mask: Bool[Array, "B L"]) -> Int[Array, "B L"]:
    """Position of each real token among the real ones, so that left and right padding give the same result."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)


def rotate(x: Float[Array, "B L heads C"], rope: Rope) -> Float[Array, "B L heads C"]:
    """Rotary position embedding (Su et al., 2021), halves convention: channel i turns with channel i + C/2."""
    cos, sin = rope[0][:, :, None, :], rope[1][:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    query: Float[Array, "B L H C"],
    key: Float[Array, "B M G C"],
    value: Float[Array, "B M G C"],
    mask: Bool[Array, "B L M"],
    rate: float = 0.0,
    dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B L H C"]:
    """Scaled dot-product attention, grouped heads, softmax in float32. A row that may look at nothing gives a mean."""
    B, L, H, C = query.shape
    G = key.shape[2]
    grouped = query.reshape(B, L, G, H // G, C) * (C**-0.5)
    scores = jnp.einsum("BLGRC,BMGC->BGRLM", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1).astype(value.dtype), rate, dropout_keys)
    return jnp.einsum("BGRLM,BMGC->BLGRC", weights, value).reshape(B, L, H, C)


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
        query = self.query(x).reshape(B, L, self.num_heads, self.head_dim)
        key = self.key(x).reshape(B, L, self.num_kv_heads, self.head_dim)
        value = self.value(x).reshape(B, L, self.num_kv_heads, self.head_dim)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        own = (key, value)
        if context is not None:
            key, value = (jnp.concatenate([old, new], axis=1) for old, new in zip(context, own, strict=True))
        attended = attend(query, key, value, mask, self.dropout_rate, named_keys(dropout_keys, "attention"))
        return self.out(attended.reshape(B, L, -1)), own


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
    graphdef, params = nnx.split(layers)
    layer_keys = jax.tree.map(lambda keys: named_keys(keys, "layers"), dropout_keys)

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        layer_params, x, n = inputs
        keys = jax.tree.map(lambda keys: numbered_keys(keys, n), layer_keys)
        return body(nnx.merge(graphdef, layer_params), carry, x, keys)

    if remat != "none":
        # prevent_cse is only needed outside of a scan.
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(step, carry, (params, xs, jnp.arange(num_layers)))
