"""The model families: how Hugging Face's config.json and tensors become ours, one entry a model type.

An entry and its module in `models` are all that a family needs. Both tables are read in both directions.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from rag_jax import untrusted
from rag_jax.models import BertConfig, Gpt2Config, LayerKind, LlamaConfig, ModelConfig, RopeScaling

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of theirs and ours. `{i}` counts layers, which ours stack on a leading axis.

    Several of ours lie side by side along their last axis. `transpose`: PyTorch's linear layers are (out, in).
    """

    hf: str
    ours: str | tuple[str, ...]
    transpose: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def stacked(self) -> bool:
        return "{i}" in self.hf


@dataclasses.dataclass(frozen=True)
class Family:
    """One of Hugging Face's model types: its keys in one of our configs, and its tensors in our trees."""

    config: type[ModelConfig]
    architecture: str  # the class that reads what export writes
    fields: Mapping[str, str | tuple[str, ...]]  # their key -> our field or fields of the same value
    rules: tuple[Rule, ...]
    prefix: str  # which tensor names have or lack, depending on whether the head was saved with the model
    # Patterns of tensors that no rule names and that may stand in a file. Carried: part of the model, but not of our
    # forward pass, so export writes them as they came. Dropped: heads that a loaded model makes anew or does not have.
    carried: str = ""
    dropped: str = ""
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # our field -> its value for this type
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # their key -> the one value that we compute
    # Our field -> its value where theirs is null, from the other fields.
    absent: Mapping[str, Callable[[Mapping[str, Any]], Any]] = dataclasses.field(default_factory=dict)
    # What takes several keys: our fields from their config, what is wrong appended to the problems; and back.
    read: Callable[[Mapping[str, Any], list[str]], dict[str, Any]] = lambda theirs, problems: {}
    write: Callable[[Any], dict[str, Any]] = lambda config: {}

    @property
    def pooling(self) -> str:
        """How to make an embedding where a model's folder does not say."""
        return "last" if self.config.causal else "mean"

    @property
    def prefixed(self) -> bool:
        """Whether `rules` name tensors with the prefix."""
        return self.rules[0].hf.startswith(self.prefix)


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _linear(hf: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{hf}.weight", f"{ours}/kernel", transpose=True), Rule(f"{hf}.bias", f"{ours}/bias")


def _norm(hf: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{hf}.weight", f"{ours}/scale"), Rule(f"{hf}.bias", f"{ours}/bias")


def _conv1d(hf: str, *ours: str) -> tuple[Rule, Rule]:
    """GPT-2's linear layers are (in, out)."""
    kernels, biases = (tuple(f"{name}/{leaf}" for name in ours) for leaf in ("kernel", "bias"))
    return Rule(f"{hf}.weight", kernels), Rule(f"{hf}.bias", biases)


_BERT_FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
_BERT_RULES = (
    Rule("embeddings.word_embeddings.weight", "embed/word/embedding"),
    Rule("embeddings.position_embeddings.weight", "embed/position/embedding"),
    Rule("embeddings.token_type_embeddings.weight", "embed/token_type/embedding"),
    *_norm("embeddings.LayerNorm", "embed/norm"),
    *_linear("encoder.layer.{i}.attention.self.query", "layers/attention/query"),
    *_linear("encoder.layer.{i}.attention.self.key", "layers/attention/key"),
    *_linear("encoder.layer.{i}.attention.self.value", "layers/attention/value"),
    *_linear("encoder.layer.{i}.attention.output.dense", "layers/attention/out"),
    *_norm("encoder.layer.{i}.attention.output.LayerNorm", "layers/attention_norm"),
    *_linear("encoder.layer.{i}.intermediate.dense", "layers/mlp/up"),
    *_linear("encoder.layer.{i}.output.dense", "layers/mlp/down"),
    *_norm("encoder.layer.{i}.output.LayerNorm", "layers/mlp_norm"),
)

_GPT2_FIELDS = {
    "vocab_size": "vocab_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_embd": "width",
    "n_inner": "mlp_width",
    "n_positions": "max_positions",
    "layer_norm_epsilon": "norm_eps",
    "activation_function": "activation",
    "resid_pdrop": "dropout",
    "embd_pdrop": "embed_dropout",
    "attn_pdrop": "attention_dropout",
}
_ATTENTION = ("layers/attention/query", "layers/attention/key", "layers/attention/value")
_GPT2_RULES = (
    Rule("transformer.wte.weight", "embed/word/embedding"),
    Rule("transformer.wpe.weight", "embed/position/embedding"),
    *_norm("transformer.h.{i}.ln_1", "layers/attention_norm"),
    *_conv1d("transformer.h.{i}.attn.c_attn", *_ATTENTION),
    *_conv1d("transformer.h.{i}.attn.c_proj", "layers/attention/out"),
    *_norm("transformer.h.{i}.ln_2", "layers/mlp_norm"),
    *_conv1d("transformer.h.{i}.mlp.c_fc", "layers/mlp/up"),
    *_conv1d("transformer.h.{i}.mlp.c_proj", "layers/mlp/down"),
    *_norm("transformer.ln_f", "norm"),
)

_LLAMA_FIELDS = {
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
_LLAMA_RULES = (
    Rule("model.embed_tokens.weight", "embed/word/embedding"),
    Rule("model.layers.{i}.input_layernorm.weight", "layers/attention_norm/scale"),
    *_linear("model.layers.{i}.self_attn.q_proj", "layers/attention/query"),
    *_linear("model.layers.{i}.self_attn.k_proj", "layers/attention/key"),
    *_linear("model.layers.{i}.self_attn.v_proj", "layers/attention/value"),
    *_linear("model.layers.{i}.self_attn.o_proj", "layers/attention/out"),
    Rule("model.layers.{i}.self_attn.q_norm.weight", "layers/attention/query_norm/scale"),
    Rule("model.layers.{i}.self_attn.k_norm.weight", "layers/attention/key_norm/scale"),
    Rule("model.layers.{i}.post_attention_layernorm.weight", "layers/mlp_norm/scale"),
    *_linear("model.layers.{i}.mlp.gate_proj", "layers/mlp/gate"),
    *_linear("model.layers.{i}.mlp.up_proj", "layers/mlp/up"),
    *_linear("model.layers.{i}.mlp.down_proj", "layers/mlp/down"),
    Rule("model.norm.weight", "norm/scale"),
    Rule("lm_head.weight", "head/kernel", transpose=True),
)


def _read_rope(theirs: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    rope = theirs.get("rope_parameters") or {}

    def number(key: str, *default: float) -> float:
        value = rope.get(key, *default)
        if not is_number(value) or value <= 0:
            problems.append(f"rope {key}={untrusted.short(value)} (must be a number above 0)")
            return 1.0
        return float(value)

    theta, kind = number("rope_theta", 10000.0), rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        factor = untrusted.short(rope["partial_rotary_factor"])
        problems.append(f"partial_rotary_factor={factor} (supported: 1.0)")
    scaling = None
    if kind == "linear":
        scaling = RopeScaling("linear", number("factor"))
    elif kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            problems.append(f"rope low_freq_factor={low} (must be below high_freq_factor={high})")
        positions = int(number("original_max_position_embeddings"))
        scaling = RopeScaling("llama3", number("factor"), low, high, positions)
    elif kind != "default":
        problems.append(f"rope_type={untrusted.short(kind)} (supported: default, linear, llama3)")
    return {"rope_theta": theta, "rope_scaling": scaling}


def _write_rope(config: LlamaConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    scaling = config.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return {"rope_parameters": rope}


def _read_windows(theirs: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Rope, and which layers look how far: all, none, or some, which are then a kind of their own."""
    ours, window = _read_rope(theirs, problems), theirs.get("sliding_window")
    types = theirs.get("layer_types") or []
    if set(types) - {FULL, SLIDING}:
        problems.append(f"layer_types={untrusted.short(types)} (supported: {FULL}, {SLIDING})")
    if not theirs.get("use_sliding_window") or window is None or SLIDING not in types:
        return ours | {"sliding_window": None}
    if not is_size(window):
        problems.append(f"sliding_window={untrusted.short(window)} (must be a whole number above 0)")
    if FULL not in types:
        return ours | {"sliding_window": window}
    local = LayerKind(ours["rope_theta"], ours["rope_scaling"], window)
    kinds = tuple(int(one == SLIDING) for one in types)
    return ours | {"sliding_window": None, "layer_kinds": kinds, "further_kinds": (local,)}


def _write_windows(config: LlamaConfig) -> dict[str, Any]:
    windows = [kind.sliding_window for kind in config.kinds]
    kinds = config.layer_kinds or (0,) * config.num_layers
    sizes = {"use_sliding_window": any(windows)}
    if any(windows):
        sizes |= {"sliding_window": max(window or 0 for window in windows)}
        sizes |= {"layer_types": [SLIDING if windows[kind] else FULL for kind in kinds]}
    return _write_rope(config) | sizes


_HEADS = r"(lm_head|score)\.weight"
_NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}


def _llama(architecture: str, fields: dict[str, Any], constants: Mapping[str, Any], **more: Any) -> Family:
    return Family(
        LlamaConfig,
        architecture,
        _LLAMA_FIELDS | fields,
        _LLAMA_RULES,
        "model.",
        dropped=_HEADS,
        constants=constants,
        absent={
            "num_kv_heads": lambda ours: ours["num_heads"],
            "head_dim": lambda ours: ours["width"] // ours["num_heads"],
        },
        **{"read": _read_rope, "write": _write_rope} | more,
    )


FAMILIES: dict[str, Family] = {
    "bert": Family(
        BertConfig,
        "BertModel",
        _BERT_FIELDS,
        _BERT_RULES,
        "bert.",
        carried=r"pooler\.dense\.(weight|bias)",
        dropped=r"cls\..*",
        only={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"},
    ),
    "gpt2": Family(
        Gpt2Config,
        "GPT2LMHeadModel",
        _GPT2_FIELDS,
        _GPT2_RULES,
        "transformer.",
        dropped=_HEADS,
        only={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
            "is_causal": True,
        },
        absent={"mlp_width": lambda ours: 4 * ours["width"]},
    ),
    "llama": _llama(
        "LlamaForCausalLM",
        {"attention_bias": ("qkv_bias", "out_bias"), "mlp_bias": "mlp_bias"},
        {"qk_norm": False, "sliding_window": None},
    ),
    "mistral": _llama("MistralForCausalLM", {"sliding_window": "sliding_window"}, _NO_BIAS | {"qk_norm": False}),
    "qwen2": _llama(
        "Qwen2ForCausalLM",
        {},
        _NO_BIAS | {"qkv_bias": True, "qk_norm": False},
        read=_read_windows,
        write=_write_windows,
    ),
    "qwen3": _llama(
        "Qwen3ForCausalLM",
        {"attention_bias": ("qkv_bias", "out_bias")},
        {"mlp_bias": False, "qk_norm": True},
        read=_read_windows,
        write=_write_windows,
    ),
}
