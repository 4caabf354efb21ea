"""What the model families share: products, norms, dropout, positions and the scan over stacked layers.

**B** rows, **L** their own tokens, **D** width, **H** heads, **G** key-value heads,
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

from rag_jax.models.config import Computing, Lora
from rag_jax.models.packing import Packing
from rag_jax.models.quantised import KINDS, dequantised
from rag_jax.models.rows import taken

Rope = tuple[Float[Array, "_ L C2"], Float[Array, "_ L C2"]]


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by tanh (Hendrycks and Gimpel, 2016); of bfloat16 numbers in float32, and rounded once.

    There as x sigmoid(2u), for (1 + tanh u) / 2: XLA keeps a tanh in memory for the backward pass of a GPU, and makes a
    sigmoid again.
    """
    if x.dtype == jnp.float32:
        return jax.nn.gelu(x, approximate=True)
    x32 = x.astype(jnp.float32)
    return (x32 * jax.nn.sigmoid((8 / math.pi) ** 0.5 * (x32 + 0.044715 * x32**3))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
# What `Deferred.prepare` makes of a layer's parameters, and what quantised ones become: whole, in the compute dtype.
PREPARED = "prepared"
# What a fused kernel of attention has computed, and what a layer with an adapter has.
ATTENDED, ADAPTED = "attended", "adapted"


def _products(primitive: Any, *args: Any, **params: Any) -> bool:
    """Products with weights."""
    is_product = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
    return is_product or (primitive.name == "name" and params["name"] == ADAPTED)


def _products_and_attention(primitive: Any, *args: Any, **params: Any) -> bool:
    """Products with weights, not those of attention, but what its fused kernels return: no more than one of the former.

    cuDNN's returns, besides, what its gradient needs and no name can be given to.
    """
    return (
        _products(primitive, *args, **params)
        or (primitive.name == "name" and params["name"] == ATTENDED)
        or primitive.name == "dot_product_attention_fwd_wrapper"
    )


def _and_sums(primitive: Any, *args: Any, **params: Any) -> bool:
    """Those, and the sums of norms, a number or two a token.

    A GPU that has to make them again writes what a scale's gradient sums to memory first, in float32.
    """
    return _products_and_attention(primitive, *args, **params) or primitive.name == "reduce_sum"


# What of a layer's forward pass stays in memory for its backward pass; the rest is computed again. A run chooses
# "products" itself, in place of "dots" where memory is short, and "sums" on GPUs.
REMAT: dict[str, Callable[..., bool]] = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(PREPARED),
    "dots": _products_and_attention,
    "products": _products,
    "sums": _and_sums,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def matrix_product(x: Float[Array, "... in"], kernel: Float[Array, "in out"]) -> Float[Array, "... out"]:
    """`x @ kernel` as a product of two matrices: XLA's CPU backend first copies operands that have more axes."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def unkept_product(x: Float[Array, "... in"], kernel: Float[Array, "in out"]) -> Float[Array, "... out"]:
    """`matrix_product` as a batch of one, of which REMAT keeps nothing: what it is added to is kept in its place."""
    one = ((2,), (1,)), ((0,), (0,))
    product = jax.lax.dot_general(x.reshape(1, -1, x.shape[-1]), kernel[None], one)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nnx.Linear):
    """`x @ kernel` in their dtype. The bias is added in float32: its gradient is a sum over all tokens.

    `adapters.attach` gives some of them a low-rank adapter.
    """

    lora: Lora | None = None
    lora_name: str = ""  # of its dropout's random keys
    lora_a: nnx.Param
    lora_b: nnx.Param
    is_quantised: bool = False
    codes: nnx.Param  # in place of the kernel, of one that is quantised
    scales: nnx.Param

    def __call__(
        self,
        x: Float[Array, "... in"],
        dropout_keys: Key[Array, " B"] | None = None,
        packing: Packing | None = None,
    ) -> Float[Array, "... out"]:
        """`dropout_keys`, `packing`: as in `dropout`, of the adapter."""
        kernel = self.whole_kernel(x.dtype)
        if self.lora is None:
            y = matrix_product(x, kernel)
        else:
            keys = named_keys(dropout_keys, self.lora_name) if self.lora.dropout else None
            down = matrix_product(dropout(x, self.lora.dropout, keys, packing), self.lora_a[...]) * self.lora.scale
            y = unkept_product(x, kernel) + unkept_product(down, self.lora_b[...])
            y = checkpoint_name(y, ADAPTED)
        return y if self.bias is None else (y + self.bias[...]).astype(y.dtype)

    def whole_kernel(self, dtype: Any) -> Float[Array, "in out"]:
        """The kernel; made for this one time where it is quantised, so that it is made again for the backward pass."""
        if not self.is_quantised:
            return self.kernel[...]
        return checkpoint_name(dequantised(self.codes[...], self.scales[...], dtype), PREPARED)


def linear(in_width: int, out_width: int, *, bias: bool, rngs: nnx.Rngs) -> Linear:
    return Linear(in_width, out_width, use_bias=bias, rngs=rngs)


class Mlp(nnx.Module):
    def __init__(self, width: int, mlp_width: int, activation: str, *, rngs: nnx.Rngs):
        self.up = linear(width, mlp_width, bias=True, rngs=rngs)
        self.down = linear(mlp_width, width, bias=True, rngs=rngs)
        self.activation = activation

    def __call__(
        self, x: Float[Array, "_ L D"], dropout_keys: Key[Array, " B"] | None = None, packing: Packing | None = None
    ) -> Float[Array, "_ L D"]:
        """`dropout_keys`, `packing`: of the adapters."""
        hidden = ACTIVATIONS[self.activation](self.up(x, dropout_keys, packing))
        return self.down(hidden, dropout_keys, packing)


class GatedMlp(nnx.Module):
    """`down(activation(gate(x)) * up(x))` (Shazeer, 2020); `dropout`: of what `down` reads."""

    def __init__(
        self, width: int, mlp_width: int, activation: str, *, bias: bool, dropout: float = 0.0, rngs: nnx.Rngs
    ):
        self.gate = linear(width, mlp_width, bias=bias, rngs=rngs)
        self.up = linear(width, mlp_width, bias=bias, rngs=rngs)
        self.down = linear(mlp_width, width, bias=bias, rngs=rngs)
        self.activation, self.dropout = activation, dropout

    def __call__(
        self, x: Float[Array, "_ L D"], dropout_keys: Key[Array, " B"] | None = None, packing: Packing | None = None
    ) -> Float[Array, "_ L D"]:
        """`packing`: as in `dropout`."""
        gate = ACTIVATIONS[self.activation](self.gate(x, dropout_keys, packing))
        hidden = gate * self.up(x, dropout_keys, packing)
        hidden = dropout(hidden, self.dropout, named_keys(dropout_keys, "hidden"), packing)
        return self.down(hidden, dropout_keys, packing)


class Embed(nnx.Embed):
    """Rows of a float32 table in `dtype`."""

    def __init__(self, num_rows: int, width: int, dtype: str, rngs: nnx.Rngs):
        super().__init__(num_rows, width, dtype=jnp.dtype(dtype), rngs=rngs)

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        return taken(self.embedding[...], ids.reshape(-1), self.dtype).reshape(*ids.shape, -1)


def layer_norm(width: int, eps: float, dtype: str, rngs: nnx.Rngs, *, bias: bool = True) -> nnx.LayerNorm:
    """Computed in float32; `dtype`: of the result."""
    # The fast variance (E[x^2] - E[x]^2) loses digits that PyTorch keeps.
    return nnx.LayerNorm(width, epsilon=eps, use_bias=bias, use_fast_variance=False, dtype=jnp.dtype(dtype), rngs=rngs)


def rms_norm(width: int, eps: float, dtype: str, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Computed in float32; `dtype`: of the result."""
    return nnx.RMSNorm(width, epsilon=eps, dtype=jnp.dtype(dtype), rngs=rngs)


class OffsetRmsNorm(nnx.Module):
    """`rms_norm` whose learned scale is what is added to 1, as Gemma has it."""

    def __init__(self, width: int, eps: float, dtype: str, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.zeros(width))
        self.eps, self.dtype = eps, jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (normed * (1.0 + self.scale[...])).astype(self.dtype)


def dropout(
    x: Shaped[Array, "_ ..."],
    rate: float,
    keys: Key[Array, " B"] | None,
    packing: Packing | None = None,
    places: UInt32[Array, "..."] | None = None,
) -> Shaped[Array, "_ ..."]:
    """Zeroes a share `rate` of x and scales the rest up; without keys (evaluation) x as it is.

    Every row has its own key: what it loses does not depend on the rows beside it, be they chunks, groups or devices.
    Nor on whether it is packed: x (1, T, D) then, and `keys` are still those of the rows. Nor on its padding, as slots
    are numbered from the first on. `places` (...): other numbers than those of x[0] as it lies.
    """
    if keys is None or rate == 0.0:
        return x
    if places is not None:
        bits = bits_at(keys, places[None])
    elif packing is None:
        bits = random_bits(keys, x.shape[1:])
    else:
        row, slot = jnp.divmod(packing.slot.astype(jnp.uint32), np.uint32(packing.place.shape[1]))
        width = np.uint32(x.shape[-1])
        bits = bits_at(keys[row], slot[:, None] * width + jnp.arange(width))[None]
    return jnp.where(bits < np.uint32(round((1.0 - rate) * 2**32)), x / (1.0 - rate), jnp.zeros((), x.dtype))


def random_bits(keys: Key[Array, " B"], shape: tuple[int, ...]) -> UInt32[Array, "B ..."]:
    """Uniform 32-bit numbers, those of a row a function of its key and of their place in it."""
    return bits_at(keys, jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(1, *shape))


def bits_at(keys: Key[Array, " B"], place: UInt32[Array, "_ ..."]) -> UInt32[Array, "B ..."]:
    """`random_bits` at these places, of every row its own or the same ones of all.

    murmur3's finalizer (Appleby, 2011) of the place and one half of the key, and once more of that and the other half:
    an eighth of the operations that jax's own threefry takes, which are a third of a step where every attention weight
    may be dropped.
    """
    halves = jax.random.key_data(keys).reshape(-1, 2, *(1,) * (place.ndim - 1))
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


def rotate(x: Float[Array, "B L heads C"], rope: Rope) -> Float[Array, "B L heads C"]:
    """Rotary position embedding (Su et al., 2021), halves convention: channel i turns with channel i + C/2.

    Of a rope of fewer channels than x has, x turns in its first ones alone.
    """
    cos, sin = rope[0][:, :, None], rope[1][:, :, None]
    turned, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], axis=-1)


class View(NamedTuple):
    """How layers of one kind place tokens and how far they look; of several kinds, stacked."""

    rope: Rope | None = None
    window: int | Int[Array, "..."] | None = None
    normed: bool | Bool[Array, "..."] | None = (
        None  # whether attention reads what the layer's norm gives; None: it does
    )


def stacked_views(views: Sequence[View]) -> View:
    """Of every kind one; a single one stays as it is, its window a number that is known when compiling."""
    if len(views) == 1:
        return views[0]
    far = np.iinfo(np.int32).max
    as_arrays = [
        view._replace(
            window=jnp.asarray(far if view.window is None else view.window),
            normed=None if view.normed is None else jnp.asarray(view.normed),
        )
        for view in views
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *as_arrays)


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
    computing: Computing,
    dropout_keys: Any = None,
    xs: Any = None,
) -> tuple[Any, Any]:
    """Runs `body(layer, carry, x, dropout_keys) -> (carry, y)` over stacked layers.

    The body is compiled once, or for each layer where that saves more than it costs (`computing.unrolls`).

    `dropout_keys`: rows' keys, or several sets of them, of which every layer gets its own.
    """
    graphdef, state = nnx.split(layers)
    params = nnx.to_pure_dict(state)
    layer_keys = jax.tree.map(lambda keys: named_keys(keys, "layers"), dropout_keys)
    deferred = [leaf for leaf in jax.tree.leaves(params, is_leaf=_is_deferred) if _is_deferred(leaf)]

    def prepared(inputs: Any) -> Any:
        layer_params, *others = inputs
        return jax.tree.map(_prepared, layer_params, is_leaf=_is_deferred), *others

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        layer_params, x, n = inputs if computing.unrolls else prepared(inputs)
        keys = jax.tree.map(lambda keys: numbered_keys(keys, n), layer_keys)
        return body(nnx.merge(graphdef, layer_params), carry, x, keys)

    is_quantised = computing.base_dtype in KINDS
    if computing.remat != "none" or is_quantised or (deferred and not computing.unrolls):
        # Also without rematerialisation, where only what was deferred is made again: kept for the backward pass, all
        # layers would be whole at one time after all. A loop needs no barrier between the first and the second time.
        step = jax.checkpoint(step, policy=REMAT[computing.remat], prevent_cse=computing.unrolls)
    inputs = params, xs, jnp.arange(num_layers)
    if not computing.unrolls:
        return jax.lax.scan(step, carry, inputs)
    # On one device whole layers are nothing but copies in another dtype: made once, they serve the backward pass too.
    return jax.lax.scan(lambda carry, inputs: step(carry, prepared(inputs)), carry, inputs, unroll=True)


def _is_deferred(leaf: Any) -> bool:
    return isinstance(leaf, Deferred)


def _prepared(leaf: Any) -> Any:
    return checkpoint_name(leaf.prepare(leaf.stored), PREPARED) if _is_deferred(leaf) else leaf
