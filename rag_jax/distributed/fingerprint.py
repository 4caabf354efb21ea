"""What parameters are, in two numbers each, computed where they lie."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt

# Odd numbers that scatter bits (murmur3's finalizer, Appleby, 2008) and the golden ratio's, one a digest.
SCATTER, SEEDS = (0x85EBCA6B, 0xC2B2AE35), (0x9E3779B9, 0x7F4A7C15)


def of_params(params: Any) -> dict[str, list[int]]:
    """Two numbers for each parameter, by its path, that change with any bit of it; wherever its parts lie."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): np.asarray(jax.device_get(_digests(leaf))).tolist() for path, leaf in leaves}


@jax.jit
def _digests(leaf: Array) -> UInt[Array, " 2"]:
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
    # Of each number by its place: sums of whole numbers are the same in any order, and so on any mesh.
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.stack([jnp.sum(_scattered(bits ^ _scattered(place + jnp.uint32(seed)))) for seed in SEEDS])


def _scattered(bits: UInt[Array, "..."]) -> UInt[Array, "..."]:
    for factor, shift in zip(SCATTER, (16, 13), strict=True):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)
