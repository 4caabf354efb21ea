"""ModernBERT."""

from collections.abc import Mapping
from typing import Any

from rag_jax.hf.families import positions
from rag_jax.hf.families.entry import Family, Rule, linear, norm
from rag_jax.models import ModernBertConfig

_LAYER = "layers.{i}"


def _read(theirs: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Layers look at all tokens or at half of `local_attention` on either side; the first is a kind by itself."""
    window = positions.window_of(theirs, problems, "local_attention") // 2 + 1
    first, *others = positions.read_two_ropes(theirs, problems, window)
    further = list(dict.fromkeys(others))
    return {"kinds": (first, *further), "layer_kinds": (0, *(1 + further.index(kind) for kind in others))}


def _write(config: ModernBertConfig) -> dict[str, Any]:
    kinds = [config.kinds[place] for place in config.layer_kinds]
    windows = [kind.sliding_window for kind in kinds if kind.sliding_window is not None]
    return positions.write_two_ropes(kinds) | {
        "layer_types": [positions.FULL if kind.sliding_window is None else positions.SLIDING for kind in kinds],
        "local_attention": 2 * (max(windows) - 1) if windows else 2 * config.max_positions,
    }


FAMILIES = {
    "modernbert": Family(
        ModernBertConfig,
        "ModernBertModel",
        {
            "vocab_size": "vocab_size",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "hidden_size": "width",
            "intermediate_size": "mlp_width",
            "max_position_embeddings": "max_positions",
            "norm_eps": "norm_eps",
            "hidden_activation": "activation",
            "attention_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
            "norm_bias": "norm_bias",
            "embedding_dropout": "embed_dropout",
            "attention_dropout": "attention_dropout",
            "mlp_dropout": "mlp_dropout",
        },
        (
            Rule("embeddings.tok_embeddings.weight", "embed/word/embedding"),
            *norm("embeddings.norm", "embed/norm"),
            *norm(f"{_LAYER}.attn_norm", "layers/attention_norm", first=1),
            *linear(f"{_LAYER}.attn.Wqkv", *(f"layers/attention/{part}" for part in ("query", "key", "value"))),
            *linear(f"{_LAYER}.attn.Wo", "layers/attention/out"),
            *norm(f"{_LAYER}.mlp_norm", "layers/mlp_norm"),
            *linear(f"{_LAYER}.mlp.Wi", "layers/mlp/gate", "layers/mlp/up"),
            *linear(f"{_LAYER}.mlp.Wo", "layers/mlp/down"),
            *norm("final_norm", "norm"),
        ),
        "model.",
        dropped=r"(head|decoder|classifier)\..*",
        read=_read,
        write=_write,
    )
}
