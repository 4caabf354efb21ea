"""The Llama family in one file: Llama 2 and 3, TinyLlama, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3.

They differ in sizes and in seven facts, all in `LlamaConfig`: grouped heads, biases, query-key norms, rope scaling,
sliding windows, whether the output matrix is tied to the word embedding, and whether it was made an encoder.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from rag_jax.models import layers
from rag_jax.models.attention import Attention
from rag_jax.models.config import Computing, ModelConfig
from rag_jax.models.decoder import Decoder, PreNormLayer
from rag_jax.models.packing import Packing


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a longer context than the trained one turns: `linear` slows every channel; `llama3` only the slow ones."""

    kind: str  # "linear" | "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """How layers tell positions apart, and how far they look."""

    rope_theta: float
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None


@dataclasses.dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    vocab_size: int  # V
    num_layers: int  # N
    num_heads: int  # H
    num_kv_heads: int  # G
    head_dim: int  # C
    width: int  # D
    mlp_width: int  # F
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    activation: str
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_head: bool
    sliding_window: int | None
    attention_dropout: float
    computing: Computing = Computing()
    layer_kinds: tuple[int, ...] = ()  # places in `kinds`, one a layer; (): all are of the first
    further_kinds: tuple[LayerKind, ...] = ()  # besides what stands above, such as local layers among global ones
    causal: bool = True  # not of an encoder: each of its tokens sees all

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        return LayerKind(self.rope_theta, self.rope_scaling, self.sliding_window), *self.further_kinds

    @property
    def heads(self) -> tuple[int, int, int]:
        return self.num_heads, self.num_kv_heads, self.head_dim

    def without_head(self) -> "LlamaConfig":
        return dataclasses.replace(self, tied_head=True)

    def build(self, rngs: nnx.Rngs) -> "Llama":
        return Llama(self, rngs=rngs)


def rope(kind: LayerKind, head_dim: int, positions: Int[Array, "B L"]) -> layers.Rope:
    angles = positions[:, :, None].astype(jnp.float32) * rope_frequencies(kind, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def rope_frequencies(kind: LayerKind, head_dim: int) -> np.ndarray:
    """Radians a position for each pair of channels, (C/2,) float32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(kind.rope_theta) ** exponents).astype(np.float32)
    scaling = kind.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    # Llama 3.1: channels that turn less than `low` times over the trained context are slowed by `factor`, those that
    # turn more than `high` times are kept, and the share in between moves linearly from one to the other.
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (frequencies * (kept + (1.0 - kept) / scaling.factor)).astype(np.float32)


class LlamaEmbed(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.word = layers.Embed(config.vocab_size, config.width, config.computing.dtype, rngs)


class LlamaMlp(nnx.Module):
    """Gated MLP (Shazeer, 2020)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.gate = layers.linear(config.width, config.mlp_width, bias=config.mlp_bias, rngs=rngs)
        self.up = layers.linear(config.width, config.mlp_width, bias=config.mlp_bias, rngs=rngs)
        self.down = layers.linear(config.mlp_width, config.width, bias=config.mlp_bias, rngs=rngs)
        self.activation = config.activation

    def __call__(
        self, x: Float[Array, "_ L D"], dropout_keys: Key[Array, " B"] | None = None, packing: Packing | None = None
    ) -> Float[Array, "_ L D"]:
        """`dropout_keys`, `packing`: of the adapters."""
        gate = layers.ACTIVATIONS[self.activation](self.gate(x, dropout_keys, packing))
        return self.down(gate * self.up(x, dropout_keys, packing), dropout_keys, packing)


class LlamaLayer(PreNormLayer):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attention_norm = layers.rms_norm(config.width, config.norm_eps, config.computing.dtype, rngs)
        self.attention = Attention(
            config.width,
            config.heads,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_norm=(config.norm_eps, config.computing.dtype) if config.qk_norm else None,
            dropout_rate=config.attention_dropout,
            rngs=rngs,
        )
        self.mlp_norm = layers.rms_norm(config.width, config.norm_eps, config.computing.dtype, rngs)
        self.mlp = LlamaMlp(config, rngs=rngs)


class Llama(Decoder):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = LlamaEmbed(config, rngs=rngs)
        self.layers = layers.stack(lambda rngs: LlamaLayer(config, rngs=rngs), config.num_layers, rngs)
        self.norm = layers.rms_norm(config.width, config.norm_eps, config.computing.dtype, rngs)
        if not config.tied_head:
            self.head = layers.linear(config.width, config.vocab_size, bias=False, rngs=rngs)

    def _embed(
        self,
        ids: Int[Array, "_ L"],
        positions: Int[Array, "_ L"],
        dropout_keys: Key[Array, " B"] | None,
        packing: Packing | None,
    ) -> Float[Array, "_ L D"]:
        return self.embed.word(ids)

    def _views(self, positions: Int[Array, "B L"]) -> list[layers.View]:
        def view(kind: LayerKind) -> layers.View:
            window = kind.sliding_window
            if window is not None and not self.config.causal:
                window += 1  # an encoder of `transformers` sees so many tokens on either side, besides the own one
            return layers.View(rope(kind, self.config.head_dim, positions), window)

        return [view(kind) for kind in self.config.kinds]

    def head_kernel(self) -> Float[Array, "V D"]:
        return self.embed.word.embedding[...] if self.config.tied_head else self.head.kernel[...].T
