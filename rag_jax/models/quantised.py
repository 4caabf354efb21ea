"""Frozen weights in fewer bits: the kernels of linear layers as codes and scales of blocks, made whole when they run.

A block is up to 64 neighbouring inputs of one output; its scale is its largest number, in bfloat16. "int8": evenly
spaced, -127 to 127. "int4": the sixteen values of NF4 (Dettmers et al., 2023), two codes a byte. 8.25 and 4.25 bits a
weight: with scales in bfloat16 there is next to nothing left for a second quantisation, of scales, to save.

**I** inputs, **O** outputs, **b** blocks.
"""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int8, Shaped, UInt8

CODES, SCALES = "codes", "scales"
LEAVES = (CODES, SCALES)
KINDS = ("int8", "int4")
BLOCK = 64
# Quantiles of the normal distribution, scaled to 1, with a zero among them.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def block_of(inputs: int) -> int:
    """The largest even block that divides so many inputs; ValueError for an odd number of them."""
    if inputs % 2:
        raise ValueError(f"{inputs} inputs are odd")
    return next(size for size in range(min(BLOCK, inputs), 0, -1) if inputs % size == 0 and size % 2 == 0)


def shapes(kind: str, inputs: int, outputs: int) -> dict[str, tuple[tuple[int, int], Any]]:
    """Shape and dtype of both leaves of a kernel."""
    codes = ((inputs, outputs), jnp.int8) if kind == "int8" else ((inputs // 2, outputs), jnp.uint8)
    return {CODES: codes, SCALES: ((inputs // block_of(inputs), outputs), jnp.bfloat16)}


def quantised(kernel: Float[np.ndarray, "I O"], kind: str) -> dict[str, Shaped[np.ndarray, "_ O"]]:
    """The leaves of a kernel, by name, on the host."""
    inputs, outputs = kernel.shape
    blocks = kernel.astype(np.float32).reshape(-1, block_of(inputs), outputs)
    largest = np.abs(blocks).max(axis=1)
    scales = largest.astype(ml_dtypes.bfloat16)
    # Never rounded down, or the largest number would not be reached.
    scales = np.where(scales.astype(np.float32) < largest, _next(scales), scales)
    shares = blocks / np.maximum(scales.astype(np.float32), np.finfo(np.float32).tiny)[:, None]
    if kind == "int8":
        codes = np.rint(shares * 127).astype(np.int8).reshape(inputs, outputs)
        return {CODES: codes, SCALES: scales}
    nearest = np.searchsorted((NF4[1:] + NF4[:-1]) / 2, shares).astype(np.uint8).reshape(-1, 2, outputs)
    return {CODES: nearest[:, 0] | nearest[:, 1] << 4, SCALES: scales}


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
