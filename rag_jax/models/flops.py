"""Model FLOPs by formula: what the maths needs, no rematerialisation, padding included.

A product of (M, D) and (D, F) counts 2 M D F; a backward pass counts twice its forward pass; norms, activations and
softmaxes are left out; a causal token looks at half of its own stream on average.
"""

from typing import Any

from rag_jax.models import BertConfig, LlamaConfig, ModelConfig


def layer_stack(config: ModelConfig, tokens: int, seen: float) -> float:
    """Forward FLOPs of all layers for `tokens` tokens that look at `seen` tokens each."""
    width, mlp = config.width, config.mlp_width
    if isinstance(config, LlamaConfig):
        queries, keys_values, mlp_products = (
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
            3,
        )
    else:
        queries, keys_values, mlp_products = width, width, 2
    weights = width * (2 * queries + 2 * keys_values) + mlp_products * width * mlp
    return config.num_layers * tokens * (2.0 * weights + 4.0 * seen * queries)


def encoding(config: ModelConfig, rows: int, length: int) -> float:
    """Forward FLOPs of embedding `rows` texts of `length` tokens."""
    return layer_stack(config, rows * length, float(length) if isinstance(config, BertConfig) else length / 2)


def shared_prefix(config: ModelConfig, prefixes: tuple[int, int], suffixes: tuple[int, int], tokens: int) -> float:
    """Forward FLOPs of (count, length) prefixes and suffixes, and of the output matrix at `tokens` positions."""
    (num_prefixes, prefix_len), (num_suffixes, suffix_len) = prefixes, suffixes
    return (
        layer_stack(config, num_prefixes * prefix_len, prefix_len / 2)
        + layer_stack(config, num_suffixes * suffix_len, prefix_len + suffix_len / 2)
        + 2.0 * tokens * config.width * config.vocab_size
    )


def training_step(
    configs: dict[str, ModelConfig], batch_size: int, candidates: int, lengths: Any, negatives: int = 0
) -> float:
    """FLOPs of one update of the models that are used; `lengths` as in `data.Lengths`, 0 for what is not read."""
    forward, passages = 0.0, batch_size * (1 + negatives)
    if "retriever" in configs:
        texts = ((batch_size, lengths.query), (passages, lengths.passage))
        forward += sum(encoding(configs["retriever"], rows, length) for rows, length in texts)
    if "generator" in configs and lengths.string:
        tokens, config = batch_size * lengths.string, configs["generator"]
        forward += layer_stack(config, tokens, lengths.string / 2) + 2.0 * tokens * config.width * config.vocab_size
    elif "generator" in configs:
        pairs = batch_size * candidates
        prefixes, suffixes = (passages, lengths.prefix), (pairs, lengths.suffix)
        forward += shared_prefix(configs["generator"], prefixes, suffixes, pairs * lengths.answer)
    return 3 * forward
