"""ModernBERT encoders (Warner et al., 2024): gte-modernbert, granite-embedding r2, ettin, modernbert-embed.

Layers look at all tokens or at those nearby and turn positions by kind; norms stand before attention and MLP, but not
before the first attention, as the embedding was just normed.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int, Key

from rag_jax.models import layers
from rag_jax.models.attention import Attention
from rag_jax.models.config import Computing, ModelConfig
from rag_jax.models.decoder import Decoder, Layer
from rag_jax.models.packing import Packing
from rag_jax.models.rope import LayerKind, rope


@dataclasses.dataclass(frozen=True)
class ModernBertConfig(ModelConfig):
    causal: ClassVar[bool] = False

    vocab_size: int  # V
    num_layers: int  # N
    num_heads: int  # H
    width: int  # D
    mlp_width: int  # F
    max_positions: int
    norm_eps: float
    activation: str
    attention_bias: bool
    mlp_bias: bool
    norm_bias: bool
    embed_dropout: float
    attention_dropout: float
    mlp_dropout: float
    kinds: tuple[LayerKind, ...]  # that of the first layer, which has no norm of what it reads, and further ones
    layer_kinds: tuple[int, ...]  # places in `kinds`, one a layer
    computing: Computing = Computing()

    def build(self, rngs: nnx.Rngs) -> "ModernBert":
        return ModernBert(self, rngs=rngs)

    def norm(self, rngs: nnx.Rngs) -> nnx.LayerNorm:
        return layers.layer_norm(self.width, self.norm_eps, self.computing.dtype, rngs, bias=self.norm_bias)


class ModernBertEmbed(nnx.Module):
    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs):
        self.word = layers.Embed(config.vocab_size, config.width, config.computing.dtype, rngs)
        self.norm = config.norm(rngs)


class ModernBertLayer(Layer):
    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs):
        self.attention_norm = config.norm(rngs)
        self.attention = Attention(
            config.width,
            config.heads,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            dropout_rate=config.attention_dropout,
            rngs=rngs,
        )
        self.mlp_norm = config.norm(rngs)
        self.mlp = layers.GatedMlp(
            config.width,
            config.mlp_width,
            config.activation,
            bias=config.mlp_bias,
            dropout=config.mlp_dropout,
            rngs=rngs,
        )


class ModernBert(Decoder):
    """An encoder, by what decoders have in common."""

    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = ModernBertEmbed(config, rngs=rngs)
        self.layers = layers.stack(lambda rngs: ModernBertLayer(config, rngs=rngs), config.num_layers, rngs)
        self.norm = config.norm(rngs)

    def _embed(
        self,
        words: Float[Array, "_ L D"],
        positions: Int[Array, "_ L"],
        dropout_keys: Key[Array, " B"] | None,
        packing: Packing | None,
    ) -> Float[Array, "_ L D"]:
        return layers.dropout(self.embed.norm(words), self.config.embed_dropout, dropout_keys, packing)

    def _views(self, positions: Int[Array, "B L"]) -> list[layers.View]:
        channels = self.config.width // self.config.num_heads
        return [
            layers.View(rope(kind, channels, positions), kind.sliding_window, normed=n > 0)
            for n, kind in enumerate(self.config.kinds)
        ]
