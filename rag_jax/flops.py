"""Model FLOPs by formula: what the maths needs, no rematerialisation, padding included.

A product of (M, D) and (D, F) counts 2 M D F; a backward pass counts twice its forward pass; norms, activations and
softmaxes are left out; a causal token looks at half of its own stream on average.
"""

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
    return layer_stack(config, rows * length, length if isinstance(config, BertConfig) else length / 2)


def shared_prefix(config: ModelConfig, prefixes: tuple[int, int], suffixes: tuple[int, int], tokens: int) -> float:
    """Forward FLOPs of (count, length) prefixes and suffixes, and of the output matrix at `tokens` positions."""
    (num_prefixes, prefix_len), (num_suffixes, suffix_len) = prefixes, suffixes
    return (
        layer_stack(config, num_prefixes * prefix_len, prefix_len / 2)
        + layer_stack(config, num_suffixes * suffix_len, prefix_len + suffix_len / 2)
        + 2.0 * tokens * config.width * config.vocab_size
    )
