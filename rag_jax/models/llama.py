"""Llama and what has come of it: Mistral, Qwen, SmolLM, Granite, Phi, OLMo, Gemma.

They differ in sizes and in facts, all in `LlamaConfig`: grouped heads, biases, where norms stand and what they norm,
how positions turn and how far layers look, constants that values are multiplied by or kept below, whether the output
matrix is tied to the word embedding, and whether it was made an encoder.
"""

import dataclasses
import functools

from flax import nnx
from jaxtyping import Array, Float, Int, Key

from rag_jax.models import layers
from rag_jax.models.attention import Attention
from rag_jax.models.config import Computing, LogitShape, ModelConfig
from rag_jax.models.decoder import Decoder, Layer
from rag_jax.models.packing import Packing
from rag_jax.models.rope import LayerKind, RopeScaling, rope


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
    rope_theta: float | None
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
    rotary_channels: int | None = None  # that turn, of each head's; None: all
    norms: str = "before"  # attention and MLP, or "after" them, or "both"
    offset_norms: bool = False  # what they have learned is added to 1
    qk_norm_all: bool = False  # `qk_norm` is of all heads' channels together, not of each head's
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    attention_scale: float | None = None  # of scores; None: C**-0.5
    score_softcap: float | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    dropout: float = 0.0

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        return LayerKind(self.rope_theta, self.rope_scaling, self.sliding_window), *self.further_kinds

    @property
    def heads(self) -> tuple[int, int, int]:
        return self.num_heads, self.num_kv_heads, self.head_dim

    @property
    def logit_shape(self) -> LogitShape:
        return LogitShape(self.logit_scale, self.logit_softcap)

    @property
    def unfused(self) -> str:
        return "its attention's scores are kept below a number, which no fused kernel here does" * bool(
            self.score_softcap
        )

    def norm(self, width: int, rngs: nnx.Rngs) -> nnx.Module:
        make = layers.OffsetRmsNorm if self.offset_norms else layers.rms_norm
        return make(width, self.norm_eps, self.computing.dtype, rngs)

    def without_head(self) -> "LlamaConfig":
        return dataclasses.replace(self, tied_head=True)

    def build(self, rngs: nnx.Rngs) -> "Llama":
        return Llama(self, rngs=rngs)


class LlamaEmbed(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.word = layers.Embed(config.vocab_size, config.width, config.computing.dtype, rngs)


class LlamaLayer(Layer):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        before, after = config.norms in ("before", "both"), config.norms in ("after", "both")
        if before:
            self.attention_norm = config.norm(config.width, rngs)
        self.attention = Attention(
            config.width,
            config.heads,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_norm=functools.partial(config.norm, rngs=rngs) if config.qk_norm else None,
            norms_all=config.qk_norm_all,
            scale=config.attention_scale,
            softcap=config.score_softcap,
            dropout_rate=config.attention_dropout,
            rngs=rngs,
        )
        if before:
            self.mlp_norm = config.norm(config.width, rngs)
        self.mlp = layers.GatedMlp(config.width, config.mlp_width, config.activation, bias=config.mlp_bias, rngs=rngs)
        if after:
            self.attention_post_norm, self.mlp_post_norm = (config.norm(config.width, rngs) for _ in range(2))
        self.attention_out_dropout = self.mlp_out_dropout = config.dropout
        self.residual_scale = config.residual_scale


class Llama(Decoder):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = LlamaEmbed(config, rngs=rngs)
        self.layers = layers.stack(lambda rngs: LlamaLayer(config, rngs=rngs), config.num_layers, rngs)
        self.norm = config.norm(config.width, rngs)
        if not config.tied_head:
            self.head = layers.linear(config.width, config.vocab_size, bias=False, rngs=rngs)

    def _embed(
        self,
        words: Float[Array, "_ L D"],
        positions: Int[Array, "_ L"],
        dropout_keys: Key[Array, " B"] | None,
        packing: Packing | None,
    ) -> Float[Array, "_ L D"]:
        scale = self.config.embed_scale
        return words if scale == 1.0 else words * scale

    def _views(self, positions: Int[Array, "B L"]) -> list[layers.View]:
        def view(kind: LayerKind) -> layers.View:
            window = kind.sliding_window
            if window is not None and not self.config.causal:
                window += 1  # an encoder of `transformers` sees so many tokens on either side, besides the own one
            return layers.View(rope(kind, self.config.rotary_channels or self.config.head_dim, positions), window)

        return [view(kind) for kind in self.config.kinds]

    def head_kernel(self) -> Float[Array, "V D"]:
        return self.embed.word.embedding[...] if self.config.tied_head else self.head.kernel[...].T
