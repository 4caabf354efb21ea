"""BERT encoders: bge, MiniLM, e5, gte, contriever (Devlin et al., 2018)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from rag_jax.models import layers
from rag_jax.models.attention import Attention, Seen
from rag_jax.models.config import Computing, Kernel, ModelConfig


@dataclasses.dataclass(frozen=True)
class BertConfig(ModelConfig):
    causal: ClassVar[bool] = False

    vocab_size: int  # V
    num_layers: int  # N
    num_heads: int  # H
    width: int  # D
    mlp_width: int  # F
    max_positions: int
    type_vocab_size: int
    norm_eps: float
    activation: str
    dropout: float
    attention_dropout: float
    computing: Computing = Computing()

    def build(self, rngs: nnx.Rngs) -> "Bert":
        return Bert(self, rngs=rngs)


class BertEmbed(nnx.Module):
    """Sum of word, position and token-type embeddings (the type is always 0: one text a row), normalised."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        dtype = config.computing.dtype
        self.word = layers.Embed(config.vocab_size, config.width, dtype, rngs)
        self.position = layers.Embed(config.max_positions, config.width, dtype, rngs)
        self.token_type = layers.Embed(config.type_vocab_size, config.width, dtype, rngs)
        self.norm = layers.layer_norm(config.width, config.norm_eps, dtype, rngs)

    def __call__(self, ids: Int[Array, "B L"], positions: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return self.norm(self.word(ids) + self.position(positions) + self.token_type(jnp.zeros_like(ids)))


class BertLayer(nnx.Module):
    """Attention and MLP, each followed by a residual sum and a norm."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(
            config.width, config.heads, qkv_bias=True, out_bias=True, dropout_rate=config.attention_dropout, rngs=rngs
        )
        self.attention_norm = layers.layer_norm(config.width, config.norm_eps, config.computing.dtype, rngs)
        self.mlp = layers.Mlp(config.width, config.mlp_width, config.activation, rngs=rngs)
        self.mlp_norm = layers.layer_norm(config.width, config.norm_eps, config.computing.dtype, rngs)
        self.dropout = config.dropout
        self.kernel: Kernel = config.computing.attention

    def __call__(
        self, x: Float[Array, "B L D"], seen: Seen, dropout_keys: Key[Array, " B"] | None
    ) -> Float[Array, "B L D"]:
        attended, _ = self.attention(x, seen, kernel=self.kernel, dropout_keys=dropout_keys)
        x = self.attention_norm(x + self._drop(attended, dropout_keys, "residual"))
        return self.mlp_norm(x + self._drop(self.mlp(x), dropout_keys, "mlp"))

    def _drop(self, x: Float[Array, "B L D"], keys: Key[Array, " B"] | None, name: str) -> Float[Array, "B L D"]:
        return layers.dropout(x, self.dropout, layers.named_keys(keys, name))


class Bert(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = BertEmbed(config, rngs=rngs)
        self.layers = layers.stack(lambda rngs: BertLayer(config, rngs=rngs), config.num_layers, rngs)

    def __call__(
        self,
        ids: Int[Array, "B L"],
        attention_mask: Bool[Array, "B L"],
        dropout_keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Hidden states after the last layer. Every token looks at every real token."""
        x = self.embed(ids, layers.positions_of(attention_mask))
        x = layers.dropout(x, self.config.dropout, layers.named_keys(dropout_keys, "embed"))
        seen = Seen(attention_mask)
        x, _ = layers.scan(
            self.layers,
            lambda layer, x, _, keys: (layer(x, seen, keys), None),
            x,
            num_layers=self.config.num_layers,
            computing=self.config.computing,
            dropout_keys=dropout_keys,
        )
        return x
