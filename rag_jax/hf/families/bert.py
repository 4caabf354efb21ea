"""BERT, RoBERTa, XLM-R, MPNet, DistilBERT."""

from collections.abc import Mapping
from typing import Any

from rag_jax import untrusted
from rag_jax.hf.families.entry import Family, Rule, is_size, linear, norm
from rag_jax.models import BertConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_positions",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
EMBED_RULES = (
    Rule("embeddings.word_embeddings.weight", "embed/word/embedding"),
    Rule("embeddings.position_embeddings.weight", "embed/position/embedding"),
    Rule("embeddings.token_type_embeddings.weight", "embed/token_type/embedding"),
    *norm("embeddings.LayerNorm", "embed/norm"),
)


def layer_rules(layer: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules of the layers called `layer`, by what is called otherwise in each of them."""
    linear_names = ("attention/query", "attention/key", "attention/value", "attention/out", "mlp/up", "mlp/down")
    linears = [rule for ours in linear_names for rule in linear(f"{layer}.{names[ours]}", f"layers/{ours}")]
    norms = [
        rule for ours in ("attention_norm", "mlp_norm") for rule in norm(f"{layer}.{names[ours]}", f"layers/{ours}")
    ]
    return (*linears, *norms)


_NAMES = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_MPNET_NAMES = _NAMES | {
    "attention/query": "attention.attn.q",
    "attention/key": "attention.attn.k",
    "attention/value": "attention.attn.v",
    "attention/out": "attention.attn.o",
    "attention_norm": "attention.LayerNorm",
}
_DISTILBERT_NAMES = {
    "attention/query": "attention.q_lin",
    "attention/key": "attention.k_lin",
    "attention/value": "attention.v_lin",
    "attention/out": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "mlp/up": "ffn.lin1",
    "mlp/down": "ffn.lin2",
    "mlp_norm": "output_layer_norm",
}
_RULES = (*EMBED_RULES, *layer_rules("encoder.layer.{i}", _NAMES))
_POOLER = r"pooler\.dense\.(weight|bias)"
_ENCODER = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}


def _read_positions(theirs: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Positions are counted from behind the padding token's number."""
    pad, rows = theirs.get("pad_token_id"), theirs.get("max_position_embeddings")
    if not isinstance(pad, int) or isinstance(pad, bool) or pad < 0:
        problems.append(f"pad_token_id={untrusted.short(pad)} (must be a whole number: positions begin behind it)")
        return {}
    if is_size(rows) and rows <= pad + 1:
        problems.append(f"max_position_embeddings={rows} (must be above pad_token_id + 1)")
    return {"first_position": pad + 1, "max_positions": rows - pad - 1} if is_size(rows) else {}


def _write_positions(config: BertConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": config.max_positions + config.first_position,
        "pad_token_id": config.first_position - 1,
    }


def _roberta(architecture: str) -> Family:
    return Family(
        BertConfig,
        architecture,
        FIELDS | {"type_vocab_size": "type_vocab_size"},
        _RULES,
        "roberta.",
        carried=_POOLER,
        dropped=r"(lm_head|classifier|qa_outputs)\..*",
        only=_ENCODER,
        read=_read_positions,
        write=_write_positions,
    )


FAMILIES = {
    "bert": Family(
        BertConfig,
        "BertModel",
        FIELDS | {"type_vocab_size": "type_vocab_size"},
        _RULES,
        "bert.",
        carried=_POOLER,
        dropped=r"cls\..*",
        only=_ENCODER,
    ),
    "roberta": _roberta("RobertaModel"),
    "xlm-roberta": _roberta("XLMRobertaModel"),
    "mpnet": Family(
        BertConfig,
        "MPNetModel",
        FIELDS,
        (
            *EMBED_RULES,
            Rule("encoder.relative_attention_bias.weight", "embed/distance/embedding"),
            *layer_rules("encoder.layer.{i}", _MPNET_NAMES),
        ),
        "mpnet.",
        carried=_POOLER,
        dropped=r"(lm_head|classifier|qa_outputs)\..*",
        constants={"type_vocab_size": 0, "distance_kinds": 32},
        only={"relative_attention_num_buckets": 32, "pad_token_id": 1},
        read=_read_positions,
        write=_write_positions,
    ),
    "distilbert": Family(
        BertConfig,
        "DistilBertModel",
        {
            "vocab_size": "vocab_size",
            "n_layers": "num_layers",
            "n_heads": "num_heads",
            "dim": "width",
            "hidden_dim": "mlp_width",
            "max_position_embeddings": "max_positions",
            "activation": "activation",
            "dropout": "dropout",
            "attention_dropout": "attention_dropout",
        },
        (*EMBED_RULES, *layer_rules("transformer.layer.{i}", _DISTILBERT_NAMES)),
        "distilbert.",
        dropped=r"(vocab_transform|vocab_layer_norm|vocab_projector|pre_classifier|classifier|qa_outputs)\..*",
        constants={"type_vocab_size": 0, "norm_eps": 1e-12},
    ),
}
