"""Frozen weights in fewer bits: the kernels of linear layers as codes and scales of blocks, made whole when they run.

A block is some neighbouring inputs of one output, its scale a number in bfloat16. "int8": evenly spaced up to the
largest number of up to 64, 8.25 bits a weight. "int4": the sixteen values of NF4 (Dettmers et al., 2023), two codes a
byte, up to the largest number of up to 32 or to a little less, by which the block is missed least: 4.5 bits a weight.
Blocks of 64 with their largest number as scale, as others have them, save a quarter of a bit and miss half as much
again (mean squares, SmolLM2-135M).

**I** inputs, **O** outputs, **b** blocks, **s** inputs of a block, **F** scales that are tried.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int, Int8, Shaped, UInt8

CODES, SCALES = "codes", "scales"
LEAVES = (CODES, SCALES)
KINDS = ("int8", "int4")
BLOCK = {"int8": 64, "int4": 32}
# Scales of four-bit blocks that are tried besides the largest number, as shares of it.
SHRUNK = (0.92, 0.84)
TINY = np.finfo(np.float32).tiny
# Quantiles of the normal distribution, scaled to 1, with a zero among them.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def block_of(kind: str, inputs: int) -> int:
    """The largest even block that divides so many inputs; ValueError for an odd number of them."""
    if inputs % 2:
        raise ValueError(f"{inputs} inputs are odd")
    return next(size for size in range(min(BLOCK[kind], inputs), 0, -1) if inputs % size == 0 and size % 2 == 0)


def shapes(kind: str, inputs: int, outputs: int) -> dict[str, tuple[tuple[int, int], Any]]:
    """Shape and dtype of both leaves of a kernel."""
    codes = ((inputs, outputs), jnp.int8) if kind == "int8" else ((inputs // 2, outputs), jnp.uint8)
    return {CODES: codes, SCALES: ((inputs // block_of(kind, inputs), outputs), jnp.bfloat16)}


def quantised(kernel: Float[np.ndarray, "I O"], kind: str) -> dict[str, Shaped[np.ndarray, "_ O"]]:
    """The leaves of a kernel, by name, on the host."""
    inputs, outputs = kernel.shape
    blocks = kernel.astype(np.float32).reshape(-1, block_of(kind, inputs), outputs)
    largest = np.abs(blocks).max(axis=1)
    scales = largest.astype(ml_dtypes.bfloat16)
    # Never rounded down, or the largest number would not be reached.
    scales = np.where(scales.astype(np.float32) < largest, _next(scales), scales)
    if kind == "int8":
        shares = blocks / np.maximum(scales.astype(np.float32), TINY)[:, None]
        codes = np.rint(shares * 127).astype(np.int8).reshape(inputs, outputs)
        return {CODES: codes, SCALES: scales}
    tried = np.stack([scales, *((share * largest).astype(ml_dtypes.bfloat16) for share in SHRUNK)])
    with jax.default_device(_host()):
        codes, which = (np.asarray(array) for array in _fitted(blocks, tried))
    return {CODES: codes, SCALES: np.take_along_axis(tried, which[None], axis=0)[0]}


def _host() -> Any:
    """The processor, whatever the devices are: codes must not depend on them."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # jax was told to do without it
        return jax.local_devices()[0]


@jax.jit
def _fitted(
    blocks: Float[Array, "b s O"], tried: Float[Array, "F b O"]
) -> tuple[UInt8[Array, "_ O"], Int[Array, "b O"]]:
    """The codes by the scale that misses each block least, and which of those that are tried it is."""
    middles = (NF4[1:] + NF4[:-1]) / 2

    def shares_of(scale: Float[Array, "b O"]) -> Float[Array, "b s O"]:
        return blocks / jnp.maximum(scale.astype(jnp.float32), TINY)[:, None]

    def missed(scale: Float[Array, "b O"]) -> Float[Array, "b O"]:
        shares = shares_of(scale)
        nearest = jnp.full(shares.shape, NF4[0])
        for middle, value in zip(middles, NF4[1:], strict=True):
            nearest = jnp.where(shares > middle, value, nearest)
        # Sums of whole numbers do not depend on their order, which differs between processors.
        squares = jnp.round(jnp.square(nearest - shares) * 2.0**24).astype(jnp.int32)
        return jnp.sum(squares, axis=1).astype(jnp.float32) * jnp.square(scale.astype(jnp.float32))

    which = jnp.argmin(jax.lax.map(missed, tried), axis=0)
    shares = shares_of(jnp.take_along_axis(tried, which[None], axis=0)[0])
    codes = jnp.zeros(shares.shape, jnp.uint8)
    for middle in middles:
        codes += (shares > middle).astype(jnp.uint8)
    halves = codes.reshape(-1, 2, blocks.shape[-1])
    return halves[:, 0] | halves[:, 1] << 4, which


def _next(scales: Any) -> Any:
    """The bfloat16 above each, which are not negative."""
    return (scales.view(np.uint16) + 1).astype(np.uint16).view(ml_dtypes.bfloat16)


def dequantised(
    codes: Int8[Array, "I O"] | UInt8[Array, "_ O"], scales: Float[Array, "b O"], dtype: Any
) -> Float[Array, "I O"]:
    """The kernel that is computed with, in `dtype`."""
    if codes.dtype == jnp.int8:
        shares = codes.astype(jnp.float32) / 127
    else:
        halves = codes[:, None] >> jnp.array([0, 4], jnp.uint8)[:, None] & 15  # (I/2, 2, O)
        shares = _nf4(halves).reshape(-1, codes.shape[-1])
    blocks = shares.reshape(scales.shape[0], -1, scales.shape[1]) * scales.astype(jnp.float32)[:, None]
    return blocks.reshape(shares.shape).astype(dtype)


def _nf4(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """By comparisons, which every device does many of at a time, where a look-up of each number takes its turn."""
    value = jnp.full(codes.shape, NF4[0])
    for code in range(1, len(NF4)):
        value = jnp.where(codes >= code, NF4[code], value)
    return value
