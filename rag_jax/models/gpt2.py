"""GPT-2 (Radford et al., 2019): learned positions, norms in front, output matrix tied to the word embedding."""

import dataclasses
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int, Key

from rag_jax.models import layers
from rag_jax.models.attention import Attention
from rag_jax.models.config import Computing, ModelConfig
from rag_jax.models.decoder import Decoder, Layer
from rag_jax.models.packing import Packing


@dataclasses.dataclass(frozen=True)
class Gpt2Config(ModelConfig):
    causal: ClassVar[bool] = True

    vocab_size: int  # V
    num_layers: int  # N
    num_heads: int  # H
    width: int  # D
    mlp_width: int  # F
    max_positions: int
    norm_eps: float
    activation: str
    dropout: float
    embed_dropout: float
    attention_dropout: float
    computing: Computing = Computing()

    def build(self, rngs: nnx.Rngs) -> "Gpt2":
        return Gpt2(self, rngs=rngs)


class Gpt2Embed(nnx.Module):
    def __init__(self, config: Gpt2Config, *, rngs: nnx.Rngs):
        self.word = layers.Embed(config.vocab_size, config.width, config.computing.dtype, rngs)
        self.position = layers.Embed(config.max_positions, config.width, config.computing.dtype, rngs)


class Gpt2Layer(Layer):
    def __init__(self, config: Gpt2Config, *, rngs: nnx.Rngs):
        self.attention_norm = layers.layer_norm(config.width, config.norm_eps, config.computing.dtype, rngs)
        self.attention = Attention(
            config.width, config.heads, qkv_bias=True, out_bias=True, dropout_rate=config.attention_dropout, rngs=rngs
        )
        self.mlp_norm = layers.layer_norm(config.width, config.norm_eps, config.computing.dtype, rngs)
        self.mlp = layers.Mlp(config.width, config.mlp_width, config.activation, rngs=rngs)
        self.attention_out_dropout = self.mlp_out_dropout = config.dropout


class Gpt2(Decoder):
    def __init__(self, config: Gpt2Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Gpt2Embed(config, rngs=rngs)
        self.layers = layers.stack(lambda rngs: Gpt2Layer(config, rngs=rngs), config.num_layers, rngs)
        self.norm = layers.layer_norm(config.width, config.norm_eps, config.computing.dtype, rngs)

    def _embed(
        self,
        words: Float[Array, "_ L D"],
        positions: Int[Array, "_ L"],
        dropout_keys: Key[Array, " B"] | None,
        packing: Packing | None,
    ) -> Float[Array, "_ L D"]:
        x = words + self.embed.position(positions)
        return layers.dropout(x, self.config.embed_dropout, dropout_keys, packing)

    def _views(self, positions: Int[Array, "B L"]) -> list[layers.View]:
        return [layers.View()]

    def head_kernel(self) -> Float[Array, "V D"]:
        return self.embed.word.embedding[...]
