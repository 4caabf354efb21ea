"""Gemma, Gemma 2, Gemma 3 and what was made of its text model, EmbeddingGemma among them."""

from collections.abc import Mapping
from typing import Any

from rag_jax import untrusted
from rag_jax.hf.families import positions
from rag_jax.hf.families.entry import Family, is_number, is_size
from rag_jax.hf.families.llama import ATTENTION_BIAS, FIELDS, llama, rules
from rag_jax.models import LlamaConfig

_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_SHARED = {"mlp_bias": False, "norms": "both", "offset_norms": True}


def _check_causal(theirs: Mapping[str, Any], problems: list[str]) -> None:
    if theirs.get("use_bidirectional_attention"):
        problems.append("use_bidirectional_attention=True (supported: False)")


def _read_scales(theirs: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    width, scalar = theirs.get("hidden_size"), theirs.get("query_pre_attn_scalar")
    if not is_number(scalar) or scalar <= 0:
        problems.append(f"query_pre_attn_scalar={untrusted.short(scalar)} (must be a number above 0)")
        scalar = 1
    return {
        "embed_scale": float(width) ** 0.5 if is_size(width) else 1.0,
        "attention_scale": None if scalar == theirs.get("head_dim") else float(scalar) ** -0.5,
    }


def _write_scales(config: LlamaConfig) -> dict[str, Any]:
    scalar = config.head_dim if config.attention_scale is None else round(config.attention_scale**-2)
    return {"query_pre_attn_scalar": scalar}


def _read_gemma2(theirs: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    _check_causal(theirs, problems)
    return positions.read_windows(theirs, problems) | _read_scales(theirs, problems)


def _write_gemma2(config: LlamaConfig) -> dict[str, Any]:
    return positions.write_windows(config) | _write_scales(config)


def _read_gemma3(theirs: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    window = positions.window_of(theirs, problems)
    if theirs.get("use_bidirectional_attention"):
        window //= 2  # on either side
    kinds = positions.read_two_ropes(theirs, problems, window)
    return positions.fields_of(kinds) | _read_scales(theirs, problems)


def _write_gemma3(config: LlamaConfig) -> dict[str, Any]:
    kinds = positions.kinds_of(config)
    window = max(kind.sliding_window or 0 for kind in kinds) or config.max_positions
    sizes = {"sliding_window": window if config.causal else 2 * window}
    return positions.write_two_ropes(kinds) | positions.write_types(config) | sizes | _write_scales(config)


def _read_gemma(theirs: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    _check_causal(theirs, problems)
    width = theirs.get("hidden_size")
    return positions.read_one_rope(theirs, problems) | {"embed_scale": float(width) ** 0.5 if is_size(width) else 1.0}


def _gemma(architecture: str, fields: dict[str, Any], constants: dict[str, Any], **more: Any) -> Family:
    family = llama(architecture, fields, _SHARED | constants, rules=rules(_NORMS), **more)
    theirs = {("hidden_activation" if key == "hidden_act" else key): ours for key, ours in FIELDS.items()}
    return Family(**{**vars(family), "fields": theirs | fields})


FAMILIES = {
    "gemma": llama("GemmaForCausalLM", ATTENTION_BIAS, {"mlp_bias": False, "offset_norms": True}, read=_read_gemma),
    "gemma2": _gemma(
        "Gemma2ForCausalLM",
        ATTENTION_BIAS | {"attn_logit_softcapping": "score_softcap", "final_logit_softcapping": "logit_softcap"},
        {},
        read=_read_gemma2,
        write=_write_gemma2,
    ),
    "gemma3_text": _gemma(
        "Gemma3ForCausalLM",
        ATTENTION_BIAS | {"final_logit_softcapping": "logit_softcap"},
        {"qk_norm": True},
        only={"attn_logit_softcapping": None},
        causal_key=("use_bidirectional_attention", False),
        read=_read_gemma3,
        write=_write_gemma3,
    ),
}
