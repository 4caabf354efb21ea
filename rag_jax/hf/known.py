"""Sizes of well-known models as their config.json states them, for planning without a download.

Facts of the models' hub pages; 24 of them were compared with the copies of config.json in mlc-llm's presets (November
2026). What stands here is enough for shapes and FLOPs; a run reads the real folder.
"""

import json
import pathlib
import re
from typing import Any

# Of queries and passages, as their model cards ask for them; by what a name holds, the first that matches.
PREFIXES: dict[str, tuple[str, str]] = {
    r"e5-mistral|-instruct": ("", ""),  # an instruction of the user's own
    r"(^|[-_/])e5-": ("query: ", "passage: "),
    r"arctic-embed-[ml]-v2": ("query: ", ""),
    r"bge-(small|base|large)-en|arctic-embed|mxbai-embed": (
        "Represent this sentence for searching relevant passages: ",
        "",
    ),
    r"bge-(small|base|large)-zh": ("为这个句子生成表示以用于检索相关文章：", ""),
    r"nomic-embed|modernbert-embed": ("search_query: ", "search_document: "),
    r"embeddinggemma": ("task: search result | query: ", "title: none | text: "),
    r"qwen3-embedding": (
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
        "",
    ),
}


def prefixes_of(path: str, folder: pathlib.Path) -> tuple[str, str] | None:
    """Those that a well-known retriever is trained with, by its name or by the one that its config.json remembers."""
    try:
        remembered = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        remembered = None
    for name in filter(None, (path, str(folder), remembered)):
        for pattern, prefixes in PREFIXES.items():
            if re.search(pattern, str(name).lower()):
                return prefixes if any(prefixes) else None
    return None


_BERT = {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}


def _bert(width: int, layers: int, heads: int) -> tuple[str, dict[str, Any]]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return "bert", _BERT | sizes | {"intermediate_size": 4 * width}


def _gpt2(width: int, layers: int, heads: int) -> tuple[str, dict[str, Any]]:
    return "gpt2", {"vocab_size": 50257, "n_positions": 1024, "n_embd": width, "n_layer": layers, "n_head": heads}


def _llama(
    vocab: int,
    width: int,
    layers: int,
    heads: tuple[int, int],
    mlp: int,
    positions: int,
    kind: str = "llama",
    **more: int | float | bool,
) -> tuple[str, dict[str, Any]]:
    sizes = {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": mlp}
    shared = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "max_position_embeddings": positions}
    return kind, sizes | shared | {"tie_word_embeddings": False} | more


def _roberta(vocab: int, width: int, layers: int, heads: int, rows: int, kind: str) -> tuple[str, dict[str, Any]]:
    """`rows`: of the table of positions, of which the first two are not used."""
    more = {"vocab_size": vocab, "max_position_embeddings": rows, "type_vocab_size": 1, "pad_token_id": 1}
    return kind, _bert(width, layers, heads)[1] | more


def _modernbert(width: int, layers: int, heads: int, mlp: int) -> tuple[str, dict[str, Any]]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp}
    return "modernbert", {"vocab_size": 50368, "max_position_embeddings": 8192, "local_attention": 128} | sizes


def _gemma3(width: int, layers: int, heads: tuple[int, int], mlp: int, positions: int, **more: bool) -> Any:
    local: dict[str, Any] = {"head_dim": 256, "sliding_window": 512, "query_pre_attn_scalar": 256}
    tied = {"tie_word_embeddings": True}
    return _llama(262144, width, layers, heads, mlp, positions, "gemma3_text", **local | tied | more)


_SMALL, _BASE, _LARGE = _bert(384, 12, 12), _bert(768, 12, 12), _bert(1024, 24, 16)
_MPNET = "mpnet", _BASE[1] | {"vocab_size": 30527, "max_position_embeddings": 514, "pad_token_id": 1}
_DISTILBERT = "distilbert", {"vocab_size": 30522, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072}
# With XLM-R's tokenizer.
_MULTILINGUAL_SMALL = "bert", _SMALL[1] | {"vocab_size": 250037}
_XLM_LARGE = _roberta(250002, 1024, 24, 16, 8194, "xlm-roberta")
_MODERN_BASE = _modernbert(768, 22, 12, 1152)
_GRANITE = {
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "tie_word_embeddings": True,
}  # fmt: skip

KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "sentence-transformers/all-MiniLM-L6-v2": _bert(384, 6, 12),
    "sentence-transformers/all-MiniLM-L12-v2": _SMALL,
    "sentence-transformers/all-mpnet-base-v2": _MPNET,
    "sentence-transformers/multi-qa-mpnet-base-dot-v1": _MPNET,
    "sentence-transformers/multi-qa-distilbert-cos-v1": _DISTILBERT,
    "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2": _MULTILINGUAL_SMALL,
    "BAAI/bge-m3": _XLM_LARGE,
    "Snowflake/snowflake-arctic-embed-l-v2.0": _XLM_LARGE,
    "Snowflake/snowflake-arctic-embed-m": _BASE,
    "mixedbread-ai/mxbai-embed-large-v1": _LARGE,
    "thenlper/gte-small": _SMALL,
    "thenlper/gte-base": _BASE,
    "thenlper/gte-large": _LARGE,
    "intfloat/multilingual-e5-small": _MULTILINGUAL_SMALL,
    "intfloat/multilingual-e5-base": _roberta(250002, 768, 12, 12, 514, "xlm-roberta"),
    "intfloat/multilingual-e5-large": _roberta(250002, 1024, 24, 16, 514, "xlm-roberta"),
    "FacebookAI/roberta-base": _roberta(50265, 768, 12, 12, 514, "roberta"),
    "FacebookAI/xlm-roberta-base": _roberta(250002, 768, 12, 12, 514, "xlm-roberta"),
    "distilbert/distilbert-base-uncased": _DISTILBERT,
    "answerdotai/ModernBERT-base": _MODERN_BASE,
    "answerdotai/ModernBERT-large": _modernbert(1024, 28, 16, 2624),
    "Alibaba-NLP/gte-modernbert-base": _MODERN_BASE,
    "nomic-ai/modernbert-embed-base": _MODERN_BASE,
    "ibm-granite/granite-embedding-english-r2": _MODERN_BASE,
    "jhu-clsp/ettin-encoder-150m": _MODERN_BASE,
    "google/embeddinggemma-300m": _gemma3(768, 24, (3, 1), 1152, 2048, use_bidirectional_attention=True),
    "Qwen/Qwen3-Embedding-0.6B": _llama(
        151669, 1024, 28, (16, 8), 3072, 32768, "qwen3", head_dim=128, tie_word_embeddings=True
    ),
    "Qwen/Qwen3-Embedding-4B": _llama(151665, 2560, 36, (32, 8), 9728, 40960, "qwen3", head_dim=128),
    "Qwen/Qwen3-Embedding-8B": _llama(151665, 4096, 36, (32, 8), 12288, 40960, "qwen3", head_dim=128),
    "BAAI/bge-small-en": _SMALL,
    "BAAI/bge-base-en": _BASE,
    "BAAI/bge-large-en": _LARGE,
    "BAAI/bge-small-en-v1.5": _SMALL,
    "BAAI/bge-base-en-v1.5": _BASE,
    "BAAI/bge-large-en-v1.5": _LARGE,
    "intfloat/e5-small-v2": _SMALL,
    "intfloat/e5-base-v2": _BASE,
    "intfloat/e5-large-v2": _LARGE,
    "gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
    "openai-community/gpt2-large": _gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
    "HuggingFaceTB/SmolLM2-135M": _llama(49152, 576, 30, (9, 3), 1536, 8192, tie_word_embeddings=True),
    "HuggingFaceTB/SmolLM2-360M": _llama(49152, 960, 32, (15, 5), 2560, 8192, tie_word_embeddings=True),
    "HuggingFaceTB/SmolLM2-1.7B": _llama(49152, 2048, 24, (32, 32), 8192, 8192, tie_word_embeddings=True),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _llama(32000, 2048, 22, (32, 4), 5632, 2048),
    "meta-llama/Llama-2-7b-hf": _llama(32000, 4096, 32, (32, 32), 11008, 4096),
    "meta-llama/Llama-2-13b-hf": _llama(32000, 5120, 40, (40, 40), 13824, 4096),
    "meta-llama/Llama-3.1-8B": _llama(128256, 4096, 32, (32, 8), 14336, 131072),
    "meta-llama/Llama-3.2-1B": _llama(128256, 2048, 16, (32, 8), 8192, 131072, head_dim=64, tie_word_embeddings=True),
    "meta-llama/Llama-3.2-3B": _llama(128256, 3072, 28, (24, 8), 8192, 131072, head_dim=128, tie_word_embeddings=True),
    "mistralai/Mistral-7B-v0.1": _llama(32000, 4096, 32, (32, 8), 14336, 32768, "mistral", sliding_window=4096),
    "Qwen/Qwen2.5-0.5B": _llama(151936, 896, 24, (14, 2), 4864, 32768, "qwen2", tie_word_embeddings=True),
    "Qwen/Qwen2.5-1.5B": _llama(151936, 1536, 28, (12, 2), 8960, 131072, "qwen2", tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B": _llama(152064, 3584, 28, (28, 4), 18944, 131072, "qwen2"),
    "google/gemma-3-270m": _gemma3(640, 18, (4, 1), 2048, 32768),
    "google/gemma-3-1b-pt": _gemma3(1152, 26, (4, 1), 6912, 32768),
    "google/gemma-3-1b-it": _gemma3(1152, 26, (4, 1), 6912, 32768),
    "google/gemma-2-2b": _llama(256000, 2304, 26, (8, 4), 9216, 8192, "gemma2", head_dim=256, tie_word_embeddings=True),
    "google/gemma-2-9b": _llama(
        256000, 3584, 42, (16, 8), 14336, 8192, "gemma2", head_dim=256, tie_word_embeddings=True
    ),
    "HuggingFaceTB/SmolLM3-3B": _llama(128256, 2048, 36, (16, 4), 11008, 65536, "smollm3", tie_word_embeddings=True),
    "ibm-granite/granite-3.3-2b-instruct": _llama(
        49159, 2048, 40, (32, 8), 8192, 131072, "granite", attention_multiplier=0.015625, logits_scaling=8.0, **_GRANITE
    ),
    "ibm-granite/granite-3.3-8b-instruct": _llama(
        49159,
        4096,
        40,
        (32, 8),
        12800,
        131072,
        "granite",
        attention_multiplier=0.0078125,
        logits_scaling=16.0,
        **_GRANITE,
    ),
    "allenai/OLMo-2-0425-1B": _llama(100352, 2048, 16, (16, 16), 8192, 4096, "olmo2"),
    "allenai/OLMo-2-1124-7B": _llama(100352, 4096, 32, (32, 32), 11008, 4096, "olmo2"),
    "allenai/Olmo-3-1025-7B": _llama(100278, 4096, 32, (32, 32), 11008, 65536, "olmo3", sliding_window=4096),
    "microsoft/Phi-3-mini-4k-instruct": _llama(32064, 3072, 32, (32, 32), 8192, 4096, "phi3", sliding_window=2047),
    "microsoft/Phi-4-mini-instruct": _llama(
        200064, 3072, 32, (24, 8), 8192, 4096, "phi3", tie_word_embeddings=True, partial_rotary_factor=0.75
    ),
    "Qwen/Qwen2.5-3B": _llama(151936, 2048, 36, (16, 2), 11008, 32768, "qwen2", tie_word_embeddings=True),
    "Qwen/Qwen3-1.7B": _llama(151936, 2048, 28, (16, 8), 6144, 40960, "qwen3", head_dim=128, tie_word_embeddings=True),
    "Qwen/Qwen3-0.6B": _llama(151936, 1024, 28, (16, 8), 3072, 40960, "qwen3", head_dim=128, tie_word_embeddings=True),
    "Qwen/Qwen3-4B": _llama(151936, 2560, 36, (32, 8), 9728, 40960, "qwen3", head_dim=128, tie_word_embeddings=True),
    "Qwen/Qwen3-8B": _llama(151936, 4096, 36, (32, 8), 12288, 40960, "qwen3", head_dim=128),
}
