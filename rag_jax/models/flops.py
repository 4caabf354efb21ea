"""Model FLOPs by formula: what the maths needs, no rematerialisation, padding included.

A product of (L, D) and (D, F) counts 2 L D F; a backward pass counts twice its forward pass, but once where the weights
are the frozen base of adapters; norms, activations and softmaxes are left out; a causal token looks at half of its own
stream on average.
"""

import functools
from typing import Any, NamedTuple

import jax

from rag_jax.models import ModelConfig, abstract, adapters, with_base


class Forward(NamedTuple):
    """FLOPs of a forward pass, by what its backward pass costs."""

    base: float = 0.0  # products with the model's own weights
    rest: float = 0.0  # with those of adapters, and of attention

    def plus(self, other: "Forward") -> "Forward":
        return Forward(self.base + other.base, self.rest + other.rest)

    @property
    def total(self) -> float:
        return self.base + self.rest

    def trained(self, config: ModelConfig) -> float:
        """With the backward pass."""
        return (3 if config.computing.lora is None else 2) * self.base + 3 * self.rest


def layer_stack(config: ModelConfig, tokens: float, seen: float, slots: float | None = None) -> Forward:
    """Of all layers for `tokens` tokens that look at `seen` tokens each.

    `slots`: from which attention looks, where tokens are packed for everything else; None: from the tokens.
    """
    H, _, C = config.heads
    attention = (slots or tokens) * config.num_layers * 4.0 * seen * H * C
    return Forward(
        2.0 * tokens * layer_weights(config, ("kernel",)),
        2.0 * tokens * layer_weights(config, adapters.LEAVES) + attention,
    )


@functools.lru_cache(maxsize=32)
def layer_weights(config: ModelConfig, names: tuple[str, ...]) -> int:
    """Elements of all matrices of these names that tokens are multiplied by in all layers, whatever the family."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract(with_base(config, "float32"))[1]["layers"])
    return sum(leaf.size for path, leaf in leaves if path[-1].key in names)


@functools.lru_cache(maxsize=16)
def parameters(config: ModelConfig) -> int:
    """How many numbers a model has learned."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(with_base(config, "float32"))[1]))


@functools.lru_cache(maxsize=16)
def held_bytes(config: ModelConfig) -> int:
    """Of all parameters, as they are kept."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract(config)[1]))


def trained_parameters(config: ModelConfig) -> int:
    """Of a model with adapters those alone."""
    return parameters(config) if config.computing.lora is None else layer_weights(config, adapters.LEAVES)


def kept_bytes(config: ModelConfig, tokens: int) -> float:
    """Bytes that stay of a forward pass of `tokens` tokens for its backward pass, by the rematerialisation; roughly."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract(with_base(config, "float32"))[1]["layers"])
    outputs = sum(leaf.shape[0] * leaf.shape[-1] for path, leaf in leaves if path[-1].key == "kernel")
    # Without any, about three more arrays of each product's size: its input, norms, activations.
    products = {"full": 0, "products": 1, "dots": 1, "sums": 1, "none": 4}[config.computing.remat]
    itemsize = 2 if config.computing.dtype == "bfloat16" else 4
    return float(tokens * itemsize * (config.num_layers * config.width + products * outputs))


def encoding(config: ModelConfig, rows: int, length: int, kept: float = 1.0) -> Forward:
    """Of embedding `rows` texts of `length` tokens, of which a share is `kept` where they are packed."""
    slots = float(rows * length)
    return layer_stack(config, kept * slots, length / 2 if config.causal else float(length), slots)


def shared_prefix(
    config: ModelConfig,
    prefixes: tuple[int, int],
    suffixes: tuple[int, int],
    tokens: float,
    kept: tuple[float, float] = (1.0, 1.0),
) -> Forward:
    """Of (count, length) prefixes and suffixes, and of the output matrix at `tokens` positions.

    `kept`: the shares of either that are packed.
    """
    (num_prefixes, prefix_len), (num_suffixes, suffix_len) = prefixes, suffixes
    prefix_slots, suffix_slots = float(num_prefixes * prefix_len), float(num_suffixes * suffix_len)
    before = layer_stack(config, kept[0] * prefix_slots, prefix_len / 2, prefix_slots)
    behind = layer_stack(config, kept[1] * suffix_slots, prefix_len + suffix_len / 2, suffix_slots)
    return before.plus(behind).plus(head(config, tokens))


def head(config: ModelConfig, tokens: float) -> Forward:
    """Of the output matrix at `tokens` positions."""
    return Forward(2.0 * tokens * config.width * config.vocab_size)


def training_step(
    configs: dict[str, ModelConfig],
    batch_size: int,
    candidates: int,
    lengths: Any,
    negatives: int = 0,
    evidence: str | None = None,
    generator_learns: bool = True,
) -> float:
    """FLOPs of one update of the models that are used; `lengths` as in `data.Lengths`, 0 for what is not read.

    `evidence`: what a listwise objective reads of every candidate, with no backward pass but of the row's own passage,
    from which the generator learns if it does. None: it learns from all candidates.
    """
    total, passages, packed = 0.0, batch_size * (1 + negatives), lengths.packed

    def kept(name: str, rows: int, slots: int = 1) -> float:
        """The share of a text's slots that is packed."""
        tokens = getattr(packed, name)
        return min(tokens / (rows * slots * getattr(lengths, name)), 1.0) if tokens else 1.0

    if "retriever" in configs:
        shares = kept("query", packed.encoded_rows), kept("passage", packed.encoded_rows, 1 + negatives)
        texts = ((batch_size, lengths.query, shares[0]), (passages, lengths.passage, shares[1]))
        total += sum(encoding(configs["retriever"], *text).trained(configs["retriever"]) for text in texts)
    if "generator" in configs and lengths.string:
        tokens, config = float(batch_size * lengths.string), configs["generator"]
        total += layer_stack(config, tokens, lengths.string / 2).plus(head(config, tokens)).trained(config)
    elif "generator" in configs:
        config, prefixes = configs["generator"], (passages, lengths.prefix)
        shares = kept("prefix", packed.read_rows, 1 + negatives), kept("suffix", packed.read_rows)
        tokens = lengths.answer * kept("answer", packed.read_rows)
        if evidence is None:
            pairs = batch_size * candidates
            forward = shared_prefix(config, prefixes, (pairs, lengths.suffix), pairs * tokens, shares)
            total += forward.trained(config)
        else:
            each = tokens if evidence == "answer" else (lengths.suffix - 1) * shares[1]
            own, pairs = batch_size * generator_learns, batch_size * (candidates - generator_learns)
            of_own = (own, lengths.prefix), (own, lengths.suffix)
            total += shared_prefix(config, *of_own, own * each, (1.0, shares[1])).trained(config)
            total += shared_prefix(config, prefixes, (pairs, lengths.suffix), pairs * each, shares).total
    return total
