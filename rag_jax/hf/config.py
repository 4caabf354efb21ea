"""config.json and our model configs: one table a model type, read in both directions."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

from rag_jax import untrusted
from rag_jax.errors import UserError
from rag_jax.models import BertConfig, Gpt2Config, LlamaConfig, ModelConfig, RopeScaling

# Theirs -> ours; the first name of each kind is the one written.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Of whole numbers in a config.json: first pattern of the key that matches, far beyond every real model.
MOST = {"layer": 10_000, "label": 100_000, "": 10**8}


@dataclasses.dataclass(frozen=True)
class Family:
    """How one model type of theirs is told in one of our configs."""

    config: type
    architecture: str  # the class that reads what export writes
    fields: Mapping[str, str | tuple[str, ...]]  # their key -> our field or fields of the same value
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # our field -> its value for this type
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # their key -> the one value that we compute


_LLAMA = {
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
_NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}

FAMILIES: dict[str, Family] = {
    "bert": Family(
        BertConfig,
        "BertModel",
        {
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
        },
        only={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"},
    ),
    "gpt2": Family(
        Gpt2Config,
        "GPT2LMHeadModel",
        {
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
        },
        only={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        },
    ),
    "llama": Family(
        LlamaConfig,
        "LlamaForCausalLM",
        _LLAMA | {"attention_bias": ("qkv_bias", "out_bias"), "mlp_bias": "mlp_bias"},
        constants={"qk_norm": False, "sliding_window": None},
    ),
    "mistral": Family(
        LlamaConfig,
        "MistralForCausalLM",
        _LLAMA | {"sliding_window": "sliding_window"},
        constants=_NO_BIAS | {"qk_norm": False},
    ),
    "qwen2": Family(
        LlamaConfig,
        "Qwen2ForCausalLM",
        _LLAMA,
        constants=_NO_BIAS | {"qkv_bias": True, "qk_norm": False, "sliding_window": None},
        only={"use_sliding_window": False},
    ),
    "qwen3": Family(
        LlamaConfig,
        "Qwen3ForCausalLM",
        _LLAMA | {"attention_bias": ("qkv_bias", "out_bias")},
        constants={"mlp_bias": False, "qk_norm": True, "sliding_window": None},
        only={"use_sliding_window": False},
    ),
}


def read_config(folder: pathlib.Path, where: str) -> tuple[str, ModelConfig]:
    """The model type and our config for the `config.json` of a folder; one UserError with all that is unsupported.

    `where` is how messages name the folder, such as `retriever.path='...'`.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{where}: no config.json in {folder}; give the folder of a Hugging Face model")
    _check_file(untrusted.read_json(folder / "config.json", f"{where}: its config.json"), where)
    try:
        # Without the last word it asks at the terminal whether code of the folder may run.
        theirs = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).to_dict()
    except Exception as error:  # transformers checks types and sizes by many kinds
        known = ", ".join(FAMILIES)
        raise UserError(
            f"{where}: its config.json cannot be read ({untrusted.one_line(error)}); supported model types are {known}"
        ) from None
    model_type = theirs.get("model_type", "")
    if model_type not in FAMILIES:
        raise UserError(
            f"{where}: model_type={untrusted.short(model_type)} is not supported; supported are {', '.join(FAMILIES)}"
        )
    problems: list[str] = []
    config = from_hf(theirs, problems)
    if problems:
        raise UserError(f"{where}: its config.json holds what is not supported: {'; '.join(problems)}")
    return model_type, config


def _check_file(content: Any, where: str) -> None:
    """UserError for what must not come to the library that reads it: it would make lists of such sizes, or run code."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: its config.json cannot be read (no object with a model_type); fetch it again")
    for key, value in content.items():
        most = next(most for pattern, most in MOST.items() if re.search(pattern, key))
        if isinstance(value, int) and abs(value) > most:
            raise UserError(
                f"{where}: its config.json holds {key[:80]}={untrusted.short(value)} (must be at most {most:,})"
            )
    model_type = content.get("model_type")
    if "auto_map" in content and model_type not in list(FAMILIES):
        raise UserError(
            f"{where}: model_type={untrusted.short(model_type)} is code of its own (auto_map in its config.json), "
            f"which is never run; supported are {', '.join(FAMILIES)}"
        )


def from_hf(theirs: Mapping[str, Any], problems: list[str]) -> Any:
    """Our config for their complete dict; where it cannot be told in one, None and the reasons in `problems`."""
    family = FAMILIES[theirs["model_type"]]
    for key, value in family.only.items():
        if theirs.get(key, value) != value:
            problems.append(f"{key}={untrusted.short(theirs[key])} (supported: {value!r})")
    ours: dict[str, Any] = dict(family.constants)
    for key, names in family.fields.items():
        value = theirs.get(key)
        for name in (names,) if isinstance(names, str) else names:
            ours[name] = value
    ours["activation"] = ACTIVATIONS.get(str(ours["activation"]))
    if ours["activation"] is None:
        key = "activation_function" if family.config is Gpt2Config else "hidden_act"
        problems.append(f"{key}={untrusted.short(theirs.get(key))} (supported: {', '.join(ACTIVATIONS)})")
    if family.config is LlamaConfig:
        ours["rope_theta"], ours["rope_scaling"] = _rope_from_hf(theirs.get("rope_parameters") or {}, problems)
        if ours["num_kv_heads"] is None:
            ours["num_kv_heads"] = ours["num_heads"]
        if ours["head_dim"] is None and _is_size(ours["width"]) and _is_size(ours["num_heads"]):
            ours["head_dim"] = ours["width"] // ours["num_heads"]
    if family.config is Gpt2Config and ours["mlp_width"] is None and _is_size(ours["width"]):
        ours["mlp_width"] = 4 * ours["width"]
    _check_values(ours, problems)
    if problems:
        return None
    # JSON's 0 and 0.0 are one number, and must be one config.
    ours |= {name: float(value) for name, value in ours.items() if name.endswith("dropout")}
    return family.config(**ours)


def to_hf(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The config.json that `from_hf` reads as `config`."""
    family = FAMILIES[model_type]
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    theirs = {"model_type": model_type, "architectures": [family.architecture], **family.only}
    for key, ours in family.fields.items():
        value = getattr(config, ours if isinstance(ours, str) else ours[0])
        theirs[key] = names[value] if ours == "activation" else value
    if isinstance(config, LlamaConfig):
        theirs["rope_parameters"] = _rope_to_hf(config)
    return theirs


def _rope_from_hf(rope: Mapping[str, Any], problems: list[str]) -> tuple[float, RopeScaling | None]:
    def number(key: str, *default: float) -> float:
        value = rope.get(key, *default)
        if not _is_number(value) or value <= 0:
            problems.append(f"rope {key}={untrusted.short(value)} (must be a number above 0)")
            return 1.0
        return float(value)

    theta, kind = number("rope_theta", 10000.0), rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        factor = untrusted.short(rope["partial_rotary_factor"])
        problems.append(f"partial_rotary_factor={factor} (supported: 1.0)")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", number("factor"))
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            problems.append(f"rope low_freq_factor={low} (must be below high_freq_factor={high})")
        positions = int(number("original_max_position_embeddings"))
        return theta, RopeScaling("llama3", number("factor"), low, high, positions)
    problems.append(f"rope_type={untrusted.short(kind)} (supported: default, linear, llama3)")
    return theta, None


def _rope_to_hf(config: LlamaConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_type": "default"}
    rope = {"rope_theta": config.rope_theta, "rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return rope


def _check_values(ours: Mapping[str, Any], problems: list[str]) -> None:
    """Every value must be of its kind, and heads must divide what they share."""
    for name, value in ours.items():
        if name in ("activation", "rope_scaling", "rope_theta") or (name == "sliding_window" and value is None):
            continue
        if name in ("qk_norm", "tied_head") or name.endswith("bias"):
            must = None if isinstance(value, bool) else "true or false"
        elif name.endswith("dropout"):
            must = None if _is_number(value) and 0 <= value < 1 else "a number from 0 to below 1"
        elif name == "norm_eps":
            must = None if _is_number(value) and value > 0 else "a number above 0"
        else:
            must = None if _is_size(value) else "a whole number above 0"
        if must:
            problems.append(f"{name}={untrusted.short(value)} (must be {must})")
    heads = [ours[name] for name in ("width", "num_heads", "num_kv_heads", "head_dim") if name in ours]
    if not all(map(_is_size, heads)):
        return
    if "head_dim" not in ours and ours["width"] % ours["num_heads"]:
        problems.append(f"width {ours['width']} is not a multiple of {ours['num_heads']} heads")
    if "num_kv_heads" in ours and ours["num_heads"] % ours["num_kv_heads"]:
        problems.append(f"{ours['num_heads']} heads are not a multiple of {ours['num_kv_heads']} key-value heads")
    if "head_dim" in ours and ours["head_dim"] % 2:
        problems.append(f"head_dim={ours['head_dim']} (must be even: rotary positions turn pairs)")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
