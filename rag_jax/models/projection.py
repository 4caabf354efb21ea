"""What some encoders have behind their pooling: linear layers, norms and divisions by the length of an embedding.

**n** embeddings, **E** width of an embedding.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rag_jax.models.config import Dense, Norm, Part
from rag_jax.models.layers import layer_norm
from rag_jax.models.products import float32_einsum

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "none": lambda x: x,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}


class Projection(nnx.Module):
    """The parts one after the other, float32: there are few embeddings, and they are compared by small differences."""

    def __init__(self, parts: Sequence[Part], *, rngs: nnx.Rngs):
        self.parts = tuple(parts)
        for i, part in enumerate(parts):
            if isinstance(part, Dense):
                setattr(self, name_of(i, part), nnx.Linear(part.inputs, part.width, use_bias=part.bias, rngs=rngs))
            elif isinstance(part, Norm):
                setattr(self, name_of(i, part), layer_norm(part.width, part.eps, "float32", rngs))

    def __call__(self, emb: Float[Array, "n _"]) -> Float[Array, "n E"]:
        for i, part in enumerate(self.parts):
            if isinstance(part, Dense):
                emb = self._dense(emb, getattr(self, name_of(i, part)), part)
            elif isinstance(part, Norm):
                emb = getattr(self, name_of(i, part))(emb)
            else:
                emb = emb / jnp.maximum(jnp.linalg.norm(emb, axis=-1, keepdims=True), 1e-12)
        return emb

    @staticmethod
    def _dense(emb: Float[Array, "n _"], layer: nnx.Linear, part: Dense) -> Float[Array, "n _"]:
        emb = float32_einsum("ni,io->no", emb, layer.kernel[...].astype(jnp.float32))
        return ACTIVATIONS[part.activation](emb if layer.bias is None else emb + layer.bias[...])


def name_of(place: int, part: Part) -> str:
    """Of a part's parameters."""
    return f"{type(part).__name__.lower()}_{place}"


def width_of(parts: Sequence[Part], inputs: int) -> int:
    """The width of an embedding behind the parts."""
    return next((part.width for part in reversed(parts) if isinstance(part, Dense)), inputs)


def problem(parts: Sequence[Part], inputs: int) -> str | None:
    """What does not fit together; None where all does."""
    for part in parts:
        asked = part.inputs if isinstance(part, Dense) else part.width if isinstance(part, Norm) else inputs
        if asked != inputs:
            return f"a module {type(part).__name__} of {asked} channels behind {inputs}"
        inputs = width_of([part], inputs)
    return None


def attached(model: nnx.Module, parts: Sequence[Part]) -> nnx.Module:
    """The model with what stands behind its pooling, if anything does."""
    if parts:
        setattr(model, "projection", Projection(parts, rngs=nnx.Rngs(0)))  # noqa: B010
    return model


def leaves(parts: Sequence[Part]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path in a model."""
    found: dict[str, tuple[int, ...]] = {}
    for i, part in enumerate(parts):
        path = f"projection/{name_of(i, part)}"
        if isinstance(part, Dense):
            found[f"{path}/kernel"] = (part.inputs, part.width)
            found |= {f"{path}/bias": (part.width,)} if part.bias else {}
        elif isinstance(part, Norm):
            found |= {f"{path}/scale": (part.width,), f"{path}/bias": (part.width,)}
    return found
