"""Causal language models, whatever the family: plain forward, shared-prefix forward, and decoding with a KV cache.

A family gives `_embed`, `_views`, `head_kernel`, `layers`, `norm` and a layer called as `Layer` is; everything else is
written once, here.

Letters as in `layers`; **P** prefixes, **K** of which each of B suffixes is read behind; **S** rows behind a cache's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from rag_jax.models import layers
from rag_jax.models.attention import Attention, Context, KeysValues, Seen
from rag_jax.models.config import Kernel
from rag_jax.models.head import gold_log_probs
from rag_jax.models.layers import View
from rag_jax.models.packing import Packing, packed, packing_of, repeated, unpacked
from rag_jax.models.products import float32_einsum


class Cache(NamedTuple):
    """Keys and values of every layer; of each row's Lk slots the first `length` are filled."""

    key: Float[Array, "N B G C Lk"]
    value: Float[Array, "N B G Lk C"]
    length: Int[Array, " B"]


class Layer(nnx.Module):
    """Attention and MLP, each inside a residual sum, with norms of what it reads, of what it gives, or of both."""

    attention_norm: Any = None
    attention: Attention
    attention_post_norm: Any = None
    mlp_norm: Any = None
    mlp: Any
    mlp_post_norm: Any = None
    attention_out_dropout: float = 0.0  # of what is added
    mlp_out_dropout: float = 0.0
    residual_scale: float = 1.0  # of what is added

    def __call__(
        self,
        x: Float[Array, "_ L D"],
        own: Seen,
        *,
        rope: layers.Rope | None = None,
        context: Context | None = None,
        kernel: Kernel = "plain",
        dropout_keys: Key[Array, " B"] | None = None,
        packing: Packing | None = None,
        normed: bool | Bool[Array, ""] | None = None,
    ) -> tuple[Float[Array, "_ L D"], KeysValues]:
        """`normed`: whether attention reads what its norm gives; None: it does."""

        def added(part: Float[Array, "_ L D"], norm: Any, rate: float, name: str) -> Float[Array, "_ L D"]:
            part = part if norm is None else norm(part)
            part = layers.dropout(part, rate, layers.named_keys(dropout_keys, name), packing)
            return part if self.residual_scale == 1.0 else part * self.residual_scale

        read = x if self.attention_norm is None else self.attention_norm(x)
        attended, keys_values = self.attention(
            read if normed is None else jnp.where(normed, read, x), own, rope=rope, context=context, kernel=kernel,
            dropout_keys=dropout_keys, packing=packing,
        )  # fmt: skip
        x = x + added(attended, self.attention_post_norm, self.attention_out_dropout, "residual")
        read = x if self.mlp_norm is None else self.mlp_norm(x)
        x = x + added(self.mlp(read, dropout_keys, packing), self.mlp_post_norm, self.mlp_out_dropout, "mlp")
        return x, keys_values


class Decoder(nnx.Module):
    config: Any  # the ModelConfig of its family
    embed: Any  # `word` and what else a family adds
    layers: Any
    norm: Any

    def _embed(
        self,
        words: Float[Array, "_ L D"],
        positions: Int[Array, "_ L"],
        dropout_keys: Key[Array, " B"] | None,
        packing: Packing | None,
    ) -> Float[Array, "_ L D"]:
        """Of words, rows of `embed.word`, that may be packed; `dropout_keys` are those of the rows."""
        raise NotImplementedError

    def _views(self, positions: Int[Array, "B L"]) -> Sequence[View]:
        """What tells the kinds of layers apart, for tokens at these positions."""
        raise NotImplementedError

    def head_kernel(self) -> Float[Array, "V D"]:
        """The output matrix, float32, a row a token: of its own, or the word embedding when tied."""
        raise NotImplementedError

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Of the next token, float32."""
        products = float32_einsum("...D,VD->...V", hidden, self.head_kernel().astype(hidden.dtype))
        return self.config.logit_shape(products)

    def gold_log_probs(
        self, hidden: Float[Array, "n D"], ids: Int[Array, " n"], chunk: int = 512
    ) -> Float[Array, " n"]:
        """log p of given next tokens, float32, of `chunk` at a time."""
        return gold_log_probs(hidden, self.head_kernel(), ids, chunk, self.config.logit_shape)

    def __call__(
        self,
        ids: Int[Array, "B L"],
        attention_mask: Bool[Array, "B L"],
        dropout_keys: Key[Array, " B"] | None = None,
        num_tokens: int = 0,
    ) -> Float[Array, "B L D"]:
        """Hidden states after the final norm; padding on the left or on the right.

        `num_tokens`: as many as are real at least, of which alone states are made; 0: of all.
        """
        packing = packing_of(attention_mask, num_tokens)
        return unpacked(
            self.norm(self._read(ids, attention_mask, dropout_keys=dropout_keys, packing=packing)[0]), packing
        )

    def forward_shared_prefix(
        self,
        prefix: tuple[Int[Array, "P Lp"], Bool[Array, "P Lp"]],
        suffix: tuple[Int[Array, "B Ls"], Bool[Array, "B Ls"]],
        candidates: Int[Array, "B K"],
        dropout_keys: Key[Array, " B"] | None = None,
        num_tokens: tuple[int, int] = (0, 0),
    ) -> Float[Array, "B K Ls D"]:
        """Hidden states of each suffix b behind each of its prefixes `candidates[b, k]`; (ids, mask), right-padded.

        A causal state on the prefix does not depend on the suffix, so each prefix runs once and each pair of suffix and
        candidate runs its suffix alone. Both advance through one scan: a layer's keys and values of the prefixes are
        gathered for that layer's suffixes and then forgotten. Dropout asks for a whole number of prefixes a suffix,
        those of the first one first (P = B S). `num_tokens`: of all prefixes and of all suffixes, as in `__call__`.
        """
        (prefix_ids, prefix_mask), (suffix_ids, suffix_mask) = prefix, suffix
        (B, Ls), K = suffix_ids.shape, candidates.shape[1]
        flat = candidates.reshape(B * K)

        prefix_positions, prefix_len = layers.positions_of(prefix_mask), prefix_mask.sum(axis=-1, dtype=jnp.int32)
        pairs_ids, pairs_mask = (jnp.repeat(a, K, axis=0) for a in (suffix_ids, suffix_mask))
        pairs_prefix_len = prefix_len[flat]
        pairs_positions = pairs_prefix_len[:, None] + layers.positions_of(pairs_mask)

        prefix_keys = layers.several_keys(layers.named_keys(dropout_keys, "prefix"), len(prefix_ids) // B)
        pairs_keys = layers.several_keys(layers.named_keys(dropout_keys, "suffix"), K)

        kernel = self.config.computing.attention
        prefix_packing, suffix_packing = (
            packing_of(*of) for of in zip((prefix_mask, suffix_mask), num_tokens, strict=True)
        )
        pairs_packing = repeated(suffix_packing, K)

        def body(layer: Any, carry: Any, _: Any, views: Sequence[View], keys: Any) -> tuple[Any, None]:
            (prefix_x, pairs_x), (prefix_view, pairs_view) = carry, views
            own = Seen(prefix_mask, prefix_view.window, causal=True)
            prefix_x, keys_values = layer(
                prefix_x, own, rope=prefix_view.rope, kernel=kernel, dropout_keys=keys[0], packing=prefix_packing,
                normed=prefix_view.normed,
            )  # fmt: skip
            before = Seen(prefix_mask, pairs_view.window, offset=pairs_prefix_len)
            context = Context(keys_values, before, flat)
            own = Seen(pairs_mask, pairs_view.window, causal=True)
            pairs_x, _ = layer(
                pairs_x, own, rope=pairs_view.rope, context=context, kernel=kernel, dropout_keys=keys[1],
                packing=pairs_packing, normed=pairs_view.normed,
            )  # fmt: skip
            return (prefix_x, pairs_x), None

        prefix_ids, prefix_positions = (packed(a, prefix_packing) for a in (prefix_ids, prefix_positions))
        pairs_ids, pairs_positions = (packed(a, pairs_packing) for a in (pairs_ids, pairs_positions))
        # Looked up together: the gradient is one table as large as the vocabulary, not two.
        words = self.embed.word(jnp.concatenate([prefix_ids.ravel(), pairs_ids.ravel()]))
        prefix_words = words[: prefix_ids.size].reshape(*prefix_ids.shape, -1)
        pairs_words = words[prefix_ids.size :].reshape(*pairs_ids.shape, -1)
        start = (
            self._embed(prefix_words, prefix_positions, layers.named_keys(prefix_keys, "embed"), prefix_packing),
            self._embed(pairs_words, pairs_positions, layers.named_keys(pairs_keys, "embed"), pairs_packing),
        )
        (_, pairs_x), _ = self._scan(body, start, [prefix_positions, pairs_positions], (prefix_keys, pairs_keys))
        return unpacked(self.norm(pairs_x), pairs_packing).reshape(B, K, Ls, -1)

    def fill_cache(
        self, ids: Int[Array, "B L"], attention_mask: Bool[Array, "B L"], max_len: int
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """Runs right-padded prompts; their hidden states, and a cache with room for `max_len` tokens a row."""
        x, (key, value) = self._read(ids, attention_mask, keep=True)
        none, room = (0, 0), (0, max_len - ids.shape[1])
        key = jnp.pad(key, (none, none, none, none, room))
        value = jnp.pad(value, (none, none, none, room, none))
        return self.norm(x), Cache(key, value, attention_mask.sum(axis=-1, dtype=jnp.int32))

    def extend_cache(
        self, ids: Int[Array, "B L"], attention_mask: Bool[Array, "B L"], cache: Cache
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """Further right-padded tokens a row: their hidden states, and the cache with them."""
        num_slots = cache.key.shape[-1]
        positions = cache.length[:, None] + layers.positions_of(attention_mask)
        x, (key, value) = self._read(ids, attention_mask, cache=cache, keep=True)
        # Padding is written outside of the cache, that is nowhere.
        rows, into = jnp.arange(ids.shape[0])[:, None], jnp.where(attention_mask, positions, num_slots)
        cache = Cache(
            cache.key.at[:, rows, :, :, into].set(jnp.transpose(key, (1, 4, 0, 2, 3)), mode="drop"),
            cache.value.at[:, rows, :, into].set(jnp.transpose(value, (1, 3, 0, 2, 4)), mode="drop"),
            cache.length + attention_mask.sum(axis=-1, dtype=jnp.int32),
        )
        return self.norm(x), cache

    def read_cache(
        self, ids: Int[Array, "S L"], attention_mask: Bool[Array, "S L"], cache: Cache, rows: Int[Array, " S"]
    ) -> Float[Array, "S L D"]:
        """Hidden states of right-padded tokens behind row `rows[s]` of a cache, which stays as it is."""
        return self.norm(self._read(ids, attention_mask, cache=cache, rows=rows)[0])

    def decode_step(self, ids: Int[Array, " B"], cache: Cache) -> tuple[Float[Array, "B D"], Cache]:
        """One more token a row: its hidden state, and the cache with it."""
        hidden, cache = self.extend_cache(ids[:, None], jnp.ones((ids.shape[0], 1), bool), cache)
        return hidden[:, 0], cache

    def _read(
        self,
        ids: Int[Array, "B L"],
        attention_mask: Bool[Array, "B L"],
        *,
        cache: Cache | None = None,
        rows: Int[Array, " B"] | None = None,
        keep: bool = False,
        dropout_keys: Key[Array, " B"] | None = None,
        packing: Packing | None = None,
    ) -> tuple[Float[Array, "_ _ D"], Any]:
        """Hidden states before the final norm, packed if a packing is given, and every layer's keys and values to keep.

        Of tokens that stand alone, behind the rows of a cache, or behind some of its rows.
        """
        positions, length, filled = layers.positions_of(attention_mask), None, attention_mask
        if cache is not None:
            length = cache.length if rows is None else cache.length[rows]
            filled = jnp.arange(cache.key.shape[-1]) < length[:, None]
            positions = positions + length[:, None]

        # A cache keeps keys and values as the plain kernel takes them, which is the best for a token at a time.
        kernel = self.config.computing.attention if cache is None and not keep else "plain"

        def body(layer: Any, x: Any, layer_cache: Any, views: Sequence[View], keys: Any) -> tuple[Any, Any]:
            (view,), context = views, None
            if layer_cache is not None:
                keys_values = layer_cache if rows is None else jax.tree.map(lambda a: a[rows], layer_cache)
                context = Context(keys_values, Seen(filled, view.window, offset=length))
            own = Seen(attention_mask, view.window, causal=self.config.causal)
            x, keys_values = layer(
                x, own, rope=view.rope, context=context, kernel=kernel, dropout_keys=keys, packing=packing,
                normed=view.normed,
            )  # fmt: skip
            return x, keys_values if keep else None

        ids, positions = (packed(a, packing) for a in (ids, positions))
        x = self._embed(self.embed.word(ids), positions, layers.named_keys(dropout_keys, "embed"), packing)
        return self._scan(body, x, [positions], dropout_keys, None if cache is None else cache[:2])

    def _scan(
        self, body: Any, carry: Any, positions: Sequence[Int[Array, "_ _"]], dropout_keys: Any, xs: Any = None
    ) -> tuple[Any, Any]:
        """`body(layer, carry, x, views, dropout_keys)` over the layers, each with its kind's view of all positions."""
        config, views = self.config, [layers.stacked_views(self._views(each)) for each in positions]

        def step(layer: Any, carry: Any, inputs: Any, keys: Any) -> tuple[Any, Any]:
            x, kind = inputs
            return body(layer, carry, x, views if kind is None else jax.tree.map(lambda a: a[kind], views), keys)

        return layers.scan(
            self.layers,
            step,
            carry,
            num_layers=config.num_layers,
            computing=config.computing,
            dropout_keys=dropout_keys,
            xs=(xs, jnp.asarray(config.layer_kinds) if config.layer_kinds else None),
        )
