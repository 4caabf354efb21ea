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


def dropout(x: Shaped[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Shaped[Array, "..."]:
    """Zeroes a share `rate` of x and scales the rest up; without a key (evaluation) x as it is."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), jnp.zeros((), x.dtype))


def named_key(key: Key[Array, ""] | None, name: str) -> Key[Array, ""] | None:
    """The random stream called `name`: a new one never shifts the others."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))


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
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "B L H C"]:
    """Scaled dot-product attention, grouped heads, softmax in float32. A row that may look at nothing gives a mean."""
    B, L, H, C = query.shape
    G = key.shape[2]
    grouped = query.reshape(B, L, G, H // G, C) * (C**-0.5)
    scores = jnp.einsum("BLGRC,BMGC->BGRLM", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1).astype(value.dtype), rate, dropout_key)
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
        dropout_key: Key[Array, ""] | None = None,
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
        attended = attend(query, key, value, mask, self.dropout_rate, named_key(dropout_key, "attention"))
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
    remat: bool,
    dropout_key: Key[Array, ""] | None = None,
    xs: Any = None,
) -> tuple[Any, Any]:
    """Runs `body(layer, carry, x, dropout_key) -> (carry, y)` over stacked layers; the body is compiled once."""
    graphdef, params = nnx.split(layers)
    keys = None if dropout_key is None else jax.random.split(dropout_key, num_layers)

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        layer_params, x, key = inputs
        return body(nnx.merge(graphdef, layer_params), carry, x, key)

    # prevent_cse is only needed outside of a scan.
    return jax.lax.scan(jax.checkpoint(step, prevent_cse=False) if remat else step, carry, (params, xs, keys))
