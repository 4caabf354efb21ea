"""The peak FLOP/s that MFU is a share of."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rag_jax.planning import chips


class Peak(NamedTuple):
    """Of all devices of the run together."""

    flops: float  # FLOP/s
    kind: str  # whose: "bfloat16" products by the maker's figures, or "float32" ones, measured

    def __str__(self) -> str:
        return f"{self.flops / 1e12:.3g} TFLOP/s in {self.kind}"


def peak() -> Peak:
    """The makers' figures for bfloat16, whatever the run computes in; on other devices (CPUs) what float32 shows.

    Of float32 the table knows none: on what it has, that is done by other units, or by the same ones in several passes.
    """
    known = chips.peak_flops(jax.devices()[0].device_kind)
    if known is not None:
        return Peak(known * jax.device_count(), "bfloat16")
    # The CPU devices of a process share its cores, so one of them shows what all have.
    shared = jax.process_count() if jax.default_backend() == "cpu" else jax.device_count()
    return Peak(measured_flops() * shared, "float32")


def measured_flops(size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of a float32 product of square matrices on one device, the best of several."""
    a = jax.device_put(jnp.ones((size, size), jnp.float32), jax.local_devices()[0])
    product = jax.jit(lambda a: a @ a).lower(a).compile()
    jax.block_until_ready(product(a))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(product(a))
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)
