"""What the config of every model family says, whatever it says besides."""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

# Of attention: ours for any device, cuDNN's for GPUs, ours for TPUs; and what takes the arrays of these on any device.
Kernel = Literal["plain", "cudnn", "pallas", "xla", "pallas-interpreted"]


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al., 2021): beside W, `scale` (drop(x) A) B with A (in, R) and B (R, out)."""

    rank: int  # R
    alpha: float
    targets: tuple[str, ...]  # patterns, one of which is found in the path of each adapted layer
    rank_stabilised: bool = False  # Kalajdzievski (2023)
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


@dataclasses.dataclass(frozen=True)
class Dense:
    """A linear layer behind the pooling, and a key of `projection.ACTIVATIONS` behind that."""

    inputs: int
    width: int
    bias: bool
    activation: str


@dataclasses.dataclass(frozen=True)
class Norm:
    """A layer norm behind the pooling."""

    width: int
    eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class Unit:
    """A division by the length of the vector, where more follows."""


Part = Dense | Norm | Unit


@dataclasses.dataclass(frozen=True)
class Computing:
    """How a run holds and computes a model, whatever the model is."""

    dtype: str = "float32"  # of activations and of the kernels that they meet; all other parameters are float32
    remat: str = "none"  # a key of layers.REMAT
    attention: Kernel = "plain"  # where there is no cache
    unrolls: bool = False  # compiles each layer, so that what stays for the backward pass is not copied into stacks
    lora: Lora | None = None  # adapters that its layers have
    # Of weights that are not trained: "float32" | "bfloat16" | a key of quantised.KINDS, of the kernels of layers, and
    # then bfloat16 of embeddings and of the output matrix. Norms and biases stay float32.
    base_dtype: str = "float32"
    projection: tuple[Part, ...] = ()  # of a retriever, behind its pooling


@dataclasses.dataclass(frozen=True)
class LogitShape:
    """What becomes of the products of states and output matrix."""

    scale: float = 1.0
    softcap: float | None = None  # logits come no further than that from 0

    def __call__(self, products: Float[Array, "..."]) -> Float[Array, "..."]:
        scaled = products if self.scale == 1.0 else products * self.scale
        return scaled if self.softcap is None else self.softcap * jnp.tanh(scaled / self.softcap)

    def slope(self, logits: Float[Array, "..."]) -> Float[Array, "..."]:
        """By how much they grow with the products, where they are these."""
        slope = jnp.full((), self.scale)
        return slope if self.softcap is None else slope * (1.0 - jnp.square(logits / self.softcap))


class ModelConfig:
    """A family's config is a frozen dataclass of these fields and its own, in the order that it likes."""

    vocab_size: int  # V
    num_layers: int  # N
    num_heads: int  # H
    width: int  # D
    max_positions: int
    computing: Computing

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    layer_kinds: tuple[
        int, ...
    ] = ()  # of each layer, which of the family's kinds of layers it is; (): all of the first
    logit_shape: LogitShape = LogitShape()
    unfused: str = ""  # why no fused kernel computes its attention; empty: one may
    causal: bool  # a token sees what stands before it and no more, so the model can generate

    @property
    def heads(self) -> tuple[int, int, int]:
        """(H, G, C): heads, key-value heads, channels of each."""
        return self.num_heads, self.num_heads, self.width // self.num_heads

    def without_head(self) -> "ModelConfig":
        """The same model without an output matrix of its own, which a retriever has no use for."""
        return self

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model with freshly drawn parameters."""
        raise NotImplementedError
