"""Products whose sums are float32, whatever the dtype of their operands."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def float32_einsum(axes: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Of operands of one dtype. Those in float32 keep all digits also where a device's products are rougher by default.

    bfloat16 has one way to multiply.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(axes, x, y, precision=precision, preferred_element_type=jnp.float32)
