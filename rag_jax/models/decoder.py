"""Causal language models, whatever the family: plain forward, shared-prefix forward, and decoding with a KV cache.

A family gives `_embed`, `_rope`, `head_kernel`, `layers`, `norm` and a layer called as
`layer(x, mask, rope=, context=, dropout_keys=) -> (x, keys and values)`; everything here is written once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from rag_jax.models import layers
from rag_jax.models.layers import Rope


class Cache(NamedTuple):
    """Keys and values of every layer; of each row's `max_len` slots the first `length` are filled."""

    key: Float[Array, "N S G C M"]
    value: Float[Array, "N S G M C"]
    length: Int[Array, " S"]


class Decoder(nnx.Module):
    config: Any
    layers: Any
    norm: Any
    prepare_layer: Any = None  # see `layers.scan`

    def _embed(
        self, ids: Int[Array, "B L"], positions: Int[Array, "B L"], dropout_keys: Key[Array, " B"] | None
    ) -> Float[Array, "B L D"]:
        raise NotImplementedError

    def _rope(self, positions: Int[Array, "B L"]) -> Rope | None:
        raise NotImplementedError

    def head_kernel(self) -> Float[Array, "V D"]:
        """The output matrix, a row a token: of its own, or the word embedding when tied."""
        raise NotImplementedError

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        return hidden @ self.head_kernel().T

    def __call__(
        self,
        ids: Int[Array, "B L"],
        attention_mask: Bool[Array, "B L"],
        dropout_keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Hidden states after the final norm; padding on the left or on the right."""
        return self.norm(self._forward(ids, attention_mask, dropout_keys=dropout_keys)[0])

    def prefix_suffix(
        self,
        prefix: tuple[Int[Array, "P Lp"], Bool[Array, "P Lp"]],
        suffix: tuple[Int[Array, "B Ls"], Bool[Array, "B Ls"]],
        candidates: Int[Array, "B K"],
        dropout_keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B K Ls D"]:
        """Hidden states of each suffix b behind each of its prefixes `candidates[b, k]`; (ids, mask), right-padded.

        A causal state on the prefix does not depend on the suffix, so each prefix runs once and each pair of suffix and
        candidate runs its suffix alone. Both advance through one scan: a layer's keys and values of the prefixes are
        gathered for that layer's suffixes and then forgotten. Dropout asks for whole numbers of prefixes a suffix: one
        each, then all the further ones of the first suffix, of the second and so on (P = B (1 + H)).
        """
        (prefix_ids, prefix_mask), (suffix_ids, suffix_mask) = prefix, suffix
        (B, Ls), K = suffix_ids.shape, candidates.shape[1]
        flat = candidates.reshape(B * K)

        prefix_positions = layers.positions_of(prefix_mask)
        prefix_rope, prefix_looks = self._rope(prefix_positions), self._causal_mask(prefix_mask)

        pairs_ids, pairs_mask = (jnp.repeat(a, K, axis=0) for a in (suffix_ids, suffix_mask))
        pairs_positions = prefix_mask.sum(axis=-1, dtype=jnp.int32)[flat][:, None] + layers.positions_of(pairs_mask)
        pairs_rope = self._rope(pairs_positions)
        before = self._in_window(pairs_positions, prefix_positions[flat]) & prefix_mask[flat][:, None, :]
        pairs_looks = jnp.concatenate([before, self._causal_mask(pairs_mask)], axis=-1)

        prefix_keys = layers.named_keys(dropout_keys, "prefix")
        further_keys = layers.several_keys(layers.named_keys(dropout_keys, "further"), len(prefix_ids) // B - 1)
        if prefix_keys is not None and further_keys is not None and len(prefix_ids) > B:
            prefix_keys = jnp.concatenate([prefix_keys, further_keys])
        pairs_keys = layers.several_keys(layers.named_keys(dropout_keys, "suffix"), K)

        def body(layer: Any, carry: Any, _: Any, keys: Any) -> tuple[Any, None]:
            prefix_x, pairs_x = carry
            prefix_x, keys_values = layer(prefix_x, prefix_looks, rope=prefix_rope, dropout_keys=keys[0])
            context = jax.tree.map(lambda a: a[flat], keys_values)
            pairs_x, _ = layer(pairs_x, pairs_looks, rope=pairs_rope, context=context, dropout_keys=keys[1])
            return (prefix_x, pairs_x), None

        start = (
            self._embed(prefix_ids, prefix_positions, layers.named_keys(prefix_keys, "embed")),
            self._embed(pairs_ids, pairs_positions, layers.named_keys(pairs_keys, "embed")),
        )
        (_, pairs_x), _ = self._scan(body, start, (prefix_keys, pairs_keys))
        return self.norm(pairs_x).reshape(B, K, Ls, -1)

    def prefill(
        self, ids: Int[Array, "S L"], attention_mask: Bool[Array, "S L"], max_len: int
    ) -> tuple[Float[Array, "S L D"], Cache]:
        """Runs right-padded prompts; their hidden states, and a cache with room for `max_len` tokens a row."""
        x, (key, value) = self._forward(ids, attention_mask, keep=True)
        none, room = (0, 0), (0, max_len - ids.shape[1])
        key = jnp.pad(key, (none, none, none, none, room))
        value = jnp.pad(value, (none, none, none, room, none))
        return self.norm(x), Cache(key, value, attention_mask.sum(axis=-1, dtype=jnp.int32))

    def extend(
        self, ids: Int[Array, "S L"], attention_mask: Bool[Array, "S L"], cache: Cache
    ) -> tuple[Float[Array, "S L D"], Cache]:
        """Further right-padded tokens a row: their hidden states, and the cache with them."""
        num_slots = cache.key.shape[-1]
        positions = cache.length[:, None] + layers.positions_of(attention_mask)
        x, (key, value) = self._further(ids, attention_mask, cache, None, keep=True)
        # Padding is written outside of the cache, that is nowhere.
        rows, into = jnp.arange(ids.shape[0])[:, None], jnp.where(attention_mask, positions, num_slots)
        cache = Cache(
            cache.key.at[:, rows, :, :, into].set(jnp.transpose(key, (1, 4, 0, 2, 3)), mode="drop"),
            cache.value.at[:, rows, :, into].set(jnp.transpose(value, (1, 3, 0, 2, 4)), mode="drop"),
            cache.length + attention_mask.sum(axis=-1, dtype=jnp.int32),
        )
        return self.norm(x), cache

    def behind(
        self, ids: Int[Array, "S L"], attention_mask: Bool[Array, "S L"], cache: Cache, rows: Int[Array, " S"]
    ) -> Float[Array, "S L D"]:
        """Hidden states of right-padded tokens behind row `rows[s]` of a cache, which stays as it is."""
        return self.norm(self._further(ids, attention_mask, cache, rows, keep=False)[0])

    def decode(self, ids: Int[Array, " S"], cache: Cache) -> tuple[Float[Array, "S D"], Cache]:
        """One more token a row: its hidden state, and the cache with it."""
        hidden, cache = self.extend(ids[:, None], jnp.ones((ids.shape[0], 1), bool), cache)
        return hidden[:, 0], cache

    def _forward(
        self,
        ids: Int[Array, "B L"],
        attention_mask: Bool[Array, "B L"],
        *,
        keep: bool = False,
        dropout_keys: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Any]:
        """Hidden states before the final norm, and every layer's keys and values where they are to be kept."""
        positions = layers.positions_of(attention_mask)
        rope, looks = self._rope(positions), self._causal_mask(attention_mask)

        def body(layer: Any, x: Any, _: Any, keys: Any) -> tuple[Any, Any]:
            x, keys_values = layer(x, looks, rope=rope, dropout_keys=keys)
            return x, keys_values if keep else None

        x = self._embed(ids, positions, layers.named_keys(dropout_keys, "embed"))
        return self._scan(body, x, dropout_keys)

    def _further(
        self,
        ids: Int[Array, "S L"],
        attention_mask: Bool[Array, "S L"],
        cache: Cache,
        rows: Int[Array, " S"] | None,
        *,
        keep: bool,
    ) -> tuple[Float[Array, "S L D"], Any]:
        """`_forward` of tokens behind the rows of a cache, or behind some of them."""
        length = cache.length if rows is None else cache.length[rows]
        positions = length[:, None] + layers.positions_of(attention_mask)
        num_slots = cache.key.shape[-1]
        slots = jnp.broadcast_to(jnp.arange(num_slots), (ids.shape[0], num_slots))
        before = self._in_window(positions, slots) & (slots < length[:, None])[:, None, :]
        looks = jnp.concatenate([before, self._causal_mask(attention_mask)], axis=-1)
        rope = self._rope(positions)

        def body(layer: Any, x: Any, layer_cache: Any, _: Any) -> tuple[Any, Any]:
            context = layer_cache if rows is None else jax.tree.map(lambda a: a[rows], layer_cache)
            x, keys_values = layer(x, looks, rope=rope, context=context)
            return x, keys_values if keep else None

        return self._scan(body, self._embed(ids, positions, None), None, (cache.key, cache.value))

    def _scan(self, body: Any, carry: Any, dropout_keys: Any, xs: Any = None) -> tuple[Any, Any]:
        config = self.config
        return layers.scan(
            self.layers,
            body,
            carry,
            num_layers=config.num_layers,
            remat=config.remat,
            prepare=self.prepare_layer,
            dropout_keys=dropout_keys,
            xs=xs,
        )

    def _causal_mask(self, mask: Bool[Array, "B L"]) -> Bool[Array, "B L L"]:
        positions = layers.positions_of(mask)
        earlier = jnp.tri(mask.shape[-1], dtype=bool)
        return earlier & mask[:, None, :] & self._in_window(positions, positions)

    def _in_window(self, query: Int[Array, "B L"], key: Int[Array, "B M"]) -> Bool[Array, "B L M"]:
        """Which key positions a sliding window lets a query position see; all, for a model without one."""
        window = getattr(self.config, "sliding_window", None)
        distance = query[:, :, None] - key[:, None, :]
        return jnp.ones_like(distance, dtype=bool) if window is None else distance < window
