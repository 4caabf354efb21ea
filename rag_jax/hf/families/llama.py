"""Llama, Mistral, Qwen, SmolLM3, Granite, Phi-3 and OLMo."""

from collections.abc import Mapping
from typing import Any

from rag_jax import untrusted
from rag_jax.hf.families import positions
from rag_jax.hf.families.entry import HEADS, Family, Rule, is_number, is_size, linear
from rag_jax.models import LayerKind, LlamaConfig

FIELDS: dict[str, str | tuple[str, ...]] = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_eps",
    "hidden_act": "activation",
    "tie_word_embeddings": "tied_head",
    "attention_dropout": "attention_dropout",
}
# Our norm -> its name in a layer of theirs.
NORMS_BEFORE = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
NORMS_AFTER = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
_FUSED = {
    "self_attn.qkv_proj": ("attention/query", "attention/key", "attention/value"),
    "self_attn.o_proj": ("attention/out",),
    "mlp.gate_up_proj": ("mlp/gate", "mlp/up"),
    "mlp.down_proj": ("mlp/down",),
}
_LINEARS = {
    "self_attn.q_proj": ("attention/query",),
    "self_attn.k_proj": ("attention/key",),
    "self_attn.v_proj": ("attention/value",),
    "self_attn.o_proj": ("attention/out",),
    "mlp.gate_proj": ("mlp/gate",),
    "mlp.up_proj": ("mlp/up",),
    "mlp.down_proj": ("mlp/down",),
}
ATTENTION_BIAS = {"attention_bias": ("qkv_bias", "out_bias")}
NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}


def rules(norms: Mapping[str, str], linears: Mapping[str, tuple[str, ...]] | None = None) -> tuple[Rule, ...]:
    layer = "model.layers.{i}"
    of_layers = [Rule(f"{layer}.{theirs}.weight", f"layers/{ours}/scale") for ours, theirs in norms.items()]
    for theirs, ours in (linears or _LINEARS).items():
        of_layers += linear(f"{layer}.{theirs}", *(f"layers/{part}" for part in ours))
    for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
        of_layers.append(Rule(f"{layer}.self_attn.{theirs}.weight", f"layers/attention/{ours}/scale"))
    return (
        Rule("model.embed_tokens.weight", "embed/word/embedding"),
        *of_layers,
        Rule("model.norm.weight", "norm/scale"),
        Rule("lm_head.weight", "head/kernel", transpose=True),
    )


def llama(architecture: str, fields: dict[str, Any], constants: dict[str, Any], **more: Any) -> Family:
    """An entry of what is `LlamaConfig` here: more of their keys than `FIELDS`, and what they do not say."""
    given: dict[str, Any] = {
        "rules": rules(NORMS_BEFORE),
        "read": positions.read_one_rope,
        "write": positions.write_one_rope,
    }
    return Family(
        LlamaConfig,
        architecture,
        FIELDS | fields,
        prefix="model.",
        dropped=HEADS,
        constants={"qk_norm": False, "sliding_window": None} | constants,
        absent={
            "num_kv_heads": lambda ours: ours["num_heads"],
            "head_dim": lambda ours: ours["width"] // ours["num_heads"],
        },
        **given | more,
    )


def _read_smollm3(theirs: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Some layers know no positions; some may look at nearby tokens alone."""
    ours = positions.read_windows(theirs, problems)
    turns, count = theirs.get("no_rope_layers"), theirs.get("num_hidden_layers")
    if not is_size(count):
        return ours
    if not isinstance(turns, list) or len(turns) < count:
        problems.append(f"no_rope_layers={untrusted.short(turns)} (must hold 1 or 0 for each layer)")
        return ours
    places = ours.get("layer_kinds") or (0,) * count
    kinds = [
        LayerKind(ours["rope_theta"], ours["rope_scaling"], ours["sliding_window"]), *ours.get("further_kinds", ())
    ]  # fmt: skip
    of_layers = [kinds[place] for place in places[:count]]
    return ours | positions.fields_of(
        [
            kind if turn else LayerKind(None, None, kind.sliding_window)
            for kind, turn in zip(of_layers, turns, strict=False)
        ]
    )


def _write_smollm3(config: LlamaConfig) -> dict[str, Any]:
    kinds = positions.kinds_of(config)
    turning = next((kind for kind in kinds if kind.rope_theta is not None), LayerKind(10000.0))
    return positions.write_windows(config) | {
        "rope_parameters": positions.write_rope(turning),
        "no_rope_layers": [int(kind.rope_theta is not None) for kind in kinds],
    }


def _read_granite(theirs: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    divisor = theirs.get("logits_scaling")
    if not is_number(divisor) or divisor <= 0:
        problems.append(f"logits_scaling={untrusted.short(divisor)} (must be a number above 0)")
        return {}
    return positions.read_one_rope(theirs, problems) | {"logit_scale": 1.0 / divisor}


def _write_granite(config: LlamaConfig) -> dict[str, Any]:
    return positions.write_one_rope(config) | {"logits_scaling": 1.0 / config.logit_scale}


def _read_phi3(theirs: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """A share of each head's channels may turn."""
    rope = dict(theirs.get("rope_parameters") or {})
    channels, share = positions.channels_of(theirs), rope.pop("partial_rotary_factor", 1.0)
    if channels is not None and (not 0 < share <= 1 or channels < 2 or channels % 2):
        problems.append(f"partial_rotary_factor={untrusted.short(share)} (must leave an even number of channels)")
    read = positions.read_rope(theirs, rope, channels, problems)
    limit = {} if read.max_positions is None else {"max_positions": read.max_positions}
    turning = {} if share == 1.0 else {"rotary_channels": channels}
    return {"rope_theta": read.theta, "rope_scaling": read.scaling} | limit | turning


def _write_phi3(config: LlamaConfig) -> dict[str, Any]:
    rope = positions.write_rope(config.kinds[0])
    share = (config.rotary_channels or config.head_dim) / config.head_dim
    theirs: dict[str, Any] = {"rope_parameters": rope | {"partial_rotary_factor": share}}
    if config.rope_scaling is not None:
        theirs["original_max_position_embeddings"] = config.rope_scaling.original_max_positions
    return theirs


def _read_olmo3(theirs: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    window = positions.window_of(theirs, problems)
    return positions.fields_of(positions.read_two_ropes(theirs, problems, window))


def _write_olmo3(config: LlamaConfig) -> dict[str, Any]:
    kinds = positions.kinds_of(config)
    window = max(kind.sliding_window or 0 for kind in kinds) or config.max_positions
    return positions.write_two_ropes(kinds) | positions.write_types(config) | {"sliding_window": window}


_WINDOWS: dict[str, Any] = {"read": positions.read_windows, "write": positions.write_windows}
_OLMO = {"mlp_bias": False, "qk_norm": True, "qk_norm_all": True, "norms": "after"}

FAMILIES = {
    "llama": llama("LlamaForCausalLM", ATTENTION_BIAS | {"mlp_bias": "mlp_bias"}, {}),
    "mistral": llama("MistralForCausalLM", {"sliding_window": "sliding_window"}, NO_BIAS),
    "qwen2": llama("Qwen2ForCausalLM", {}, NO_BIAS | {"qkv_bias": True}, **_WINDOWS),
    "qwen3": llama("Qwen3ForCausalLM", ATTENTION_BIAS, {"mlp_bias": False, "qk_norm": True}, **_WINDOWS),
    "smollm3": llama(
        "SmolLM3ForCausalLM",
        ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
        {},
        read=_read_smollm3,
        write=_write_smollm3,
    ),
    "granite": llama(
        "GraniteForCausalLM",
        ATTENTION_BIAS
        | {
            "mlp_bias": "mlp_bias",
            "embedding_multiplier": "embed_scale",
            "residual_multiplier": "residual_scale",
            "attention_multiplier": "attention_scale",
        },
        {},
        read=_read_granite,
        write=_write_granite,
    ),
    "phi3": llama(
        "Phi3ForCausalLM",
        {"sliding_window": "sliding_window", "resid_pdrop": "dropout"},
        NO_BIAS,
        rules=rules(NORMS_BEFORE, _FUSED),
        read=_read_phi3,
        write=_write_phi3,
    ),
    "olmo2": llama("Olmo2ForCausalLM", ATTENTION_BIAS, _OLMO, rules=rules(NORMS_AFTER)),
    "olmo3": llama(
        "Olmo3ForCausalLM", ATTENTION_BIAS, _OLMO, rules=rules(NORMS_AFTER), read=_read_olmo3, write=_write_olmo3
    ),
}
