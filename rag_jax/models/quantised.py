"""Frozen weights in fewer bits: the kernels of linear layers as codes and scales of blocks, made whole when they run.

A block is some neighbouring inputs of one output, its scale a number in bfloat16. "int8": evenly spaced up to the
largest number of up to 64, 8.25 bits a weight. "int4": the sixteen values of NF4 (Dettmers et al., 2023), two codes a
byte, up to the largest number of up to 32 or to a little less, by which the block is missed least: 4.5 bits a weight.
Blocks of 64 with their largest number as scale, as others have them, save a quarter of a bit and miss half as much
again (mean squares, SmolLM2-135M). "uint4": sixteen values evenly spaced between the least and the largest number of
up to 32, or of a little less; the least and the step are float16, the two halves of a number of 32 bits: 5 bits a
weight. Weights that came out of such codes (GGUF's Q4_1) go into them again as they were.

**I** inputs, **O** outputs, **b** blocks, **s** inputs of a block, **F** scales that are tried.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int, Int8, Shaped, UInt8, UInt32

CODES, SCALES = "codes", "scales"
LEAVES = (CODES, SCALES)
KINDS = ("int8", "int4", "uint4")
BLOCK = {"int8": 64, "int4": 32, "uint4": 32}
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
    scale = jnp.uint32 if kind == "uint4" else jnp.bfloat16
    return {CODES: codes, SCALES: ((inputs // block_of(kind, inputs), outputs), scale)}


def quantised(kernel: Float[np.ndarray, "I O"], kind: str) -> dict[str, Shaped[np.ndarray, "_ O"]]:
    """The leaves of a kernel, by name, on the host."""
    inputs, outputs = kernel.shape
    blocks = kernel.astype(np.float32).reshape(-1, block_of(kind, inputs), outputs)
    if kind == "uint4":
        with jax.default_device(_host()):
            codes, ranges = (np.asarray(array) for array in _evenly(blocks, *_ranges(blocks)))
        return {CODES: codes, SCALES: ranges}
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


def _ranges(blocks: Float[np.ndarray, "b s O"]) -> tuple[Float[np.ndarray, "F b O"], Float[np.ndarray, "F b O"]]:
    """The least number and the step of each block, float16, as they are and drawn together."""
    low, high = blocks.min(axis=1), blocks.max(axis=1)
    middle, half = (high + low) / 2, (high - low) / 2
    lows = [low, *(middle - share * half for share in SHRUNK)]
    steps = [(high - low) / 15, *(share * (high - low) / 15 for share in SHRUNK)]
    return np.stack(lows).astype(np.float16), np.stack(steps).astype(np.float16)


@jax.jit
def _evenly(
    blocks: Float[Array, "b s O"], lows: Float[Array, "F b O"], steps: Float[Array, "F b O"]
) -> tuple[UInt8[Array, "_ O"], UInt32[Array, "b O"]]:
    """The codes by the range that misses each block least, and its two numbers in one."""

    def coded(low: Float[Array, "b O"], step: Float[Array, "b O"]) -> tuple[Float[Array, "b s O"], Array]:
        low, step = (a.astype(jnp.float32)[:, None] for a in (low, step))
        codes = jnp.clip(jnp.round((blocks - low) / jnp.maximum(step, TINY)), 0, 15)
        # In steps of the whole range, and whole numbers: their sums do not depend on the order of the terms.
        missed = (codes * step + low - blocks) / jnp.maximum(jnp.abs(blocks).max(axis=1, keepdims=True), TINY)
        return codes, jnp.sum(jnp.round(jnp.square(missed) * 2.0**24).astype(jnp.int32), axis=1)

    which = jnp.argmin(jax.lax.map(lambda each: coded(*each)[1], (lows, steps)), axis=0)[None]
    low, step = (jnp.take_along_axis(tried, which, axis=0)[0] for tried in (lows, steps))
    halves = coded(low, step)[0].astype(jnp.uint8).reshape(-1, 2, blocks.shape[-1])
    bits = [jax.lax.bitcast_convert_type(a, jnp.uint16).astype(jnp.uint32) for a in (low, step)]
    return halves[:, 0] | halves[:, 1] << 4, bits[0] | bits[1] << 16


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
    codes: Int8[Array, "I O"] | UInt8[Array, "_ O"], scales: Float[Array, "b O"] | UInt32[Array, "b O"], dtype: Any
) -> Float[Array, "I O"]:
    """The kernel that is computed with, in `dtype`."""
    if codes.dtype == jnp.int8:
        shares = codes.astype(jnp.float32) / 127
    else:
        halves = codes[:, None] >> jnp.array([0, 4], jnp.uint8)[:, None] & 15  # (I/2, 2, O)
        if scales.dtype == jnp.uint32:
            numbers = halves.reshape(scales.shape[0], -1, scales.shape[1]).astype(jnp.float32)
            low, step = (_half(scales >> shift)[:, None] for shift in (0, 16))
            return (numbers * step + low).reshape(-1, scales.shape[1]).astype(dtype)
        shares = _nf4(halves).reshape(-1, codes.shape[-1])
    blocks = shares.reshape(scales.shape[0], -1, scales.shape[1]) * scales.astype(jnp.float32)[:, None]
    return blocks.reshape(shares.shape).astype(dtype)


def _half(bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """The float16 in the lower half of each number."""
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16).astype(jnp.float32)


def _nf4(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """By comparisons, which every device does many of at a time, where a look-up of each number takes its turn."""
    value = jnp.full(codes.shape, NF4[0])
    for code in range(1, len(NF4)):
        value = jnp.where(codes >= code, NF4[code], value)
    return value
