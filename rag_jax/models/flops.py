"""Model FLOPs by formula: what the maths needs, no rematerialisation, padding included.

A product of (L, D) and (D, F) counts 2 L D F; a backward pass counts twice its forward pass; norms, activations and
softmaxes are left out; a causal token looks at half of its own stream on average.
"""

import functools
from typing import Any

import jax

from rag_jax.models import ModelConfig, abstract


def layer_stack(config: ModelConfig, tokens: int, seen: float) -> float:
    """Forward FLOPs of all layers for `tokens` tokens that look at `seen` tokens each."""
    H, _, C = config.heads
    return tokens * (2.0 * layer_weights(config) + config.num_layers * 4.0 * seen * H * C)


@functools.lru_cache(maxsize=16)
def layer_weights(config: ModelConfig) -> int:
    """Elements of all matrices that tokens are multiplied by in all layers, whatever the family."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract(config)[1]["layers"])
    return sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")


@functools.lru_cache(maxsize=16)
def parameters(config: ModelConfig) -> int:
    """How many numbers a model has learned."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(config)[1]))


def kept_bytes(config: ModelConfig, tokens: int) -> float:
    """Bytes that stay of a forward pass of `tokens` tokens for its backward pass, by the rematerialisation; roughly."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract(config)[1]["layers"])
    outputs = sum(leaf.shape[0] * leaf.shape[-1] for path, leaf in leaves if path[-1].key == "kernel")
    # Without any, about three more arrays of each product's size: its input, norms, activations.
    products = {"full": 0, "dots": 1, "none": 4}[config.computing.remat]
    itemsize = 2 if config.computing.dtype == "bfloat16" else 4
    return float(tokens * itemsize * (config.num_layers * config.width + products * outputs))


def encoding(config: ModelConfig, rows: int, length: int) -> float:
    """Forward FLOPs of embedding `rows` texts of `length` tokens."""
    return layer_stack(config, rows * length, length / 2 if config.causal else float(length))


def shared_prefix(config: ModelConfig, prefixes: tuple[int, int], suffixes: tuple[int, int], tokens: int) -> float:
    """Forward FLOPs of (count, length) prefixes and suffixes, and of the output matrix at `tokens` positions."""
    (num_prefixes, prefix_len), (num_suffixes, suffix_len) = prefixes, suffixes
    return (
        layer_stack(config, num_prefixes * prefix_len, prefix_len / 2)
        + layer_stack(config, num_suffixes * suffix_len, prefix_len + suffix_len / 2)
        + 2.0 * tokens * config.width * config.vocab_size
    )


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
    forward, read, passages = 0.0, 0.0, batch_size * (1 + negatives)
    if "retriever" in configs:
        texts = ((batch_size, lengths.query), (passages, lengths.passage))
        forward += sum(encoding(configs["retriever"], rows, length) for rows, length in texts)
    if "generator" in configs and lengths.string:
        tokens, config = batch_size * lengths.string, configs["generator"]
        forward += layer_stack(config, tokens, lengths.string / 2) + 2.0 * tokens * config.width * config.vocab_size
    elif "generator" in configs:
        config, prefixes, tokens = configs["generator"], (passages, lengths.prefix), lengths.answer
        if evidence is None:
            pairs = batch_size * candidates
            forward += shared_prefix(config, prefixes, (pairs, lengths.suffix), pairs * tokens)
        else:
            each = tokens if evidence == "answer" else lengths.suffix - 1
            own, pairs = batch_size * generator_learns, batch_size * (candidates - generator_learns)
            forward += shared_prefix(config, (own, lengths.prefix), (own, lengths.suffix), own * each)
            read = shared_prefix(config, prefixes, (pairs, lengths.suffix), pairs * each)
    return 3 * forward + read
