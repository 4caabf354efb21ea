"""BERT encoders (Devlin et al., 2018) and what has come of them: RoBERTa, XLM-R, MPNet, DistilBERT.

bge, MiniLM, e5, gte, contriever; bge-m3, multilingual e5; all-mpnet.
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from rag_jax.models import layers
from rag_jax.models.attention import Attention, Seen
from rag_jax.models.config import Computing, Kernel, ModelConfig
from rag_jax.models.packing import Packing, packed, packing_of, unpacked


@dataclasses.dataclass(frozen=True)
class BertConfig(ModelConfig):
    causal: ClassVar[bool] = False

    vocab_size: int  # V
    num_layers: int  # N
    num_heads: int  # H
    width: int  # D
    mlp_width: int  # F
    max_positions: int
    type_vocab_size: int  # 0: texts have no types
    norm_eps: float
    activation: str
    dropout: float
    attention_dropout: float
    computing: Computing = Computing()
    first_position: int = 0  # rows of the table of positions before that of a text's first token
    # Kinds of distances between tokens, of which each head adds one number to the score of such a pair; 0: none.
    distance_kinds: int = 0

    @property
    def unfused(self) -> str:
        return "its attention adds to scores by distance, which no fused kernel here does" * bool(self.distance_kinds)

    def build(self, rngs: nnx.Rngs) -> "Bert":
        return Bert(self, rngs=rngs)


class BertEmbed(nnx.Module):
    """Sum of word, position and token-type embeddings (the type is always 0: one text a row), normalised.

    `distance`: of each kind of distance what it adds to the scores of each head.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        dtype = config.computing.dtype
        self.word = layers.Embed(config.vocab_size, config.width, dtype, rngs)
        self.position = layers.Embed(config.first_position + config.max_positions, config.width, dtype, rngs)
        if config.type_vocab_size:
            self.token_type = layers.Embed(config.type_vocab_size, config.width, dtype, rngs)
        if config.distance_kinds:
            self.distance = layers.Embed(config.distance_kinds, config.num_heads, "float32", rngs)
        self.norm = layers.layer_norm(config.width, config.norm_eps, dtype, rngs)
        self.config = config

    def __call__(self, ids: Int[Array, "B L"], positions: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        x = self.word(ids) + self.position(positions + self.config.first_position)
        return self.norm(x + self.token_type(jnp.zeros_like(ids)) if self.config.type_vocab_size else x)

    def bias(self, length: int) -> Float[Array, "H L L"] | None:
        """What distances add to the scores of rows of so many slots, if they do."""
        if not self.config.distance_kinds:
            return None
        slots = np.arange(length)
        kinds = distance_kinds(slots[:, None] - slots, self.config.distance_kinds)
        return jnp.transpose(self.distance(jnp.asarray(kinds)), (2, 0, 1))


def distance_kinds(distance: Int[np.ndarray, "..."], count: int, far: int = 128) -> Int[np.ndarray, "..."]:
    """The kind of each distance, as T5 has them (Raffel et al., 2019).

    Half of them are of keys behind the query, half of keys before it. Of each half the first half are single distances,
    the others grow with the distance up to `far`, from which on all is one kind.
    """
    half = count // 2
    exact = half // 2
    length = np.abs(distance)
    grown = np.log(np.maximum(length, 1).astype(np.float32) / exact) / np.float32(math.log(far / exact))
    beyond = np.minimum(exact + (grown * (half - exact)).astype(np.int64), half - 1)
    return np.where(distance < 0, half, 0) + np.where(length < exact, length, beyond)


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
        self,
        x: Float[Array, "_ L D"],
        seen: Seen,
        dropout_keys: Key[Array, " B"] | None,
        packing: Packing | None,
        bias: Float[Array, "H S S"] | None,
    ) -> Float[Array, "_ L D"]:
        def drop(x: Float[Array, "_ L D"], name: str) -> Float[Array, "_ L D"]:
            return layers.dropout(x, self.dropout, layers.named_keys(dropout_keys, name), packing)

        attended, _ = self.attention(x, seen, kernel=self.kernel, dropout_keys=dropout_keys, packing=packing, bias=bias)
        x = self.attention_norm(x + drop(attended, "residual"))
        return self.mlp_norm(x + drop(self.mlp(x, dropout_keys, packing), "mlp"))


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
        num_tokens: int = 0,
    ) -> Float[Array, "B L D"]:
        """Hidden states after the last layer. Every token looks at every real token.

        `num_tokens`: as many as are real at least, of which alone states are made; 0: of all.
        """
        packing = packing_of(attention_mask, num_tokens)
        x = self.embed(*(packed(a, packing) for a in (ids, layers.positions_of(attention_mask))))
        x = layers.dropout(x, self.config.dropout, layers.named_keys(dropout_keys, "embed"), packing)
        seen, bias = Seen(attention_mask), self.embed.bias(ids.shape[1])
        x, _ = layers.scan(
            self.layers,
            lambda layer, x, _, keys: (layer(x, seen, keys, packing, bias), None),
            x,
            num_layers=self.config.num_layers,
            computing=self.config.computing,
            dropout_keys=dropout_keys,
        )
        return unpacked(x, packing)
