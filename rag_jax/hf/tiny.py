"""Tiny random models with byte-level tokenizers, for tests and first tries: `random:bert|gpt2|llama|qwen3`."""

import pathlib
import zlib

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, pre_tokenizers, processors

from rag_jax import files, models
from rag_jax.hf import config as configs
from rag_jax.hf import weights

POSITIONS = 512
_LLAMA = models.LlamaConfig(
    vocab_size=258, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, width=64, mlp_width=128,
    max_positions=POSITIONS, norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None, activation="silu", qkv_bias=False,
    out_bias=False, mlp_bias=False, qk_norm=False, tied_head=False, sliding_window=None, attention_dropout=0.0,
)  # fmt: skip
MODELS: dict[str, models.ModelConfig] = {
    "bert": models.BertConfig(259, 2, 4, 64, 128, POSITIONS, 2, 1e-12, "gelu", 0.1, 0.1),
    "gpt2": models.Gpt2Config(257, 2, 4, 64, 256, POSITIONS, 1e-5, "gelu_tanh", 0.1, 0.1, 0.1),
    "llama": _LLAMA,
    "qwen3": models.LlamaConfig(**{**vars(_LLAMA), "qk_norm": True, "tied_head": True}),
}
# (name in tokenizer_config.json, token) in the order of their ids; bytes follow.
SPECIAL = {
    "bert": (("pad_token", "[PAD]"), ("cls_token", "[CLS]"), ("sep_token", "[SEP]")),
    "gpt2": (("bos_token", "<|endoftext|>"), ("eos_token", "<|endoftext|>")),
    "llama": (("bos_token", "<s>"), ("eos_token", "</s>")),
    "qwen3": (("bos_token", "<s>"), ("eos_token", "</s>")),
}


def build(name: str, folder: pathlib.Path, config: models.ModelConfig | None = None) -> None:
    """Fill a folder with the model called `name`, or one of its kind with another config: the same bits every time."""
    config = config or MODELS[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    shapes = models.abstract(config)[1]
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: _draw(rng, path[-1].key, leaf.shape), shapes)
    weights.save_params(params, folder, name, config, np.float32)
    tokens = dict(SPECIAL[name])
    special = list(dict.fromkeys(tokens.values()))
    ids = {f"{kind}_id": special.index(token) for kind, token in tokens.items()}
    files.write_json(folder / "config.json", configs.to_hf(config, name) | ids)
    tokenizer(special, first_last=name == "bert").save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, "model_max_length": POSITIONS}
    files.write_json(folder / "tokenizer_config.json", settings)


def tokenizer(special: list[str], *, first_last: bool) -> tokenizers.Tokenizer:
    """One token a byte, behind the special ones; `first_last`: texts stand between the last two of those."""
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if first_last:
        first, last = ((token, special.index(token)) for token in special[-2:])
        tokenizer.post_processor = processors.BertProcessing(last, first)
    return tokenizer


def _draw(rng: np.random.Generator, leaf: str, shape: tuple[int, ...]) -> np.ndarray:
    if leaf in ("scale", "bias"):
        return np.full(shape, float(leaf == "scale"), np.float32)
    std = 0.02 if leaf == "embedding" else shape[-2] ** -0.5
    return (std * rng.standard_normal(shape)).astype(np.float32)
