"""config.json and our model configs, by the tables of `families`."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

from rag_jax import untrusted
from rag_jax.errors import UserError
from rag_jax.hf.families import FAMILIES, Family, is_number, is_size
from rag_jax.models import ModelConfig

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
FLOATS = (float, float | None)
# Of whole numbers in a config.json: first pattern of the key that matches, far beyond every real model.
MOST = {"layer": 10_000, "label": 100_000, "": 10**8}


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
    _check_type(model_type, where)
    problems: list[str] = []
    config = from_hf(theirs, problems)
    if problems:
        raise UserError(f"{where}: its config.json holds what is not supported: {'; '.join(problems)}")
    return model_type, config


def _check_file(content: Any, where: str) -> None:
    """UserError for what must not reach transformers: sizes it would make lists of, and code it would ask to run."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: its config.json cannot be read (not an object with a model_type); fetch it again")
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
    if isinstance(model_type, str):
        _check_type(model_type, where)


def _check_type(model_type: Any, where: str) -> None:
    if model_type not in list(FAMILIES):
        raise UserError(
            f"{where}: model_type={untrusted.short(model_type)} is not supported; supported are {', '.join(FAMILIES)}"
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
        if names == "activation":
            value = ACTIVATIONS.get(str(value))
            if value is None:
                problems.append(f"{key}={untrusted.short(theirs.get(key))} (supported: {', '.join(ACTIVATIONS)})")
        for name in (names,) if isinstance(names, str) else names:
            ours[name] = value
    if is_size(ours["width"]) and is_size(ours["num_heads"]):
        ours |= {name: value(ours) for name, value in family.absent.items() if ours[name] is None}
    ours |= family.read(theirs, problems)
    fields = {field.name: field for field in dataclasses.fields(family.config)}
    if "causal" in fields:
        key, causal = family.causal_key
        value = theirs.get(key)
        ours["causal"] = (value == causal) if isinstance(value, bool) else True if value is None else value
    _check_values(family, ours, problems)
    if problems:
        return None
    # JSON's 0 and 0.0 are one number, and must be one config.
    floats = [name for name, value in ours.items() if fields[name].type in FLOATS and is_number(value)]
    return family.config(**ours | {name: float(ours[name]) for name in floats})


def to_hf(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The config.json that `from_hf` reads as `config`."""
    family = FAMILIES[model_type]
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    theirs = {"model_type": model_type, "architectures": [family.architecture], **family.only}
    for key, ours in family.fields.items():
        value = getattr(config, ours if isinstance(ours, str) else ours[0])
        theirs[key] = names[value] if ours == "activation" else value
    if family.config.causal and not config.causal:
        key, causal = family.causal_key
        theirs[key] = not causal
    return theirs | family.write(config)


def _check_values(family: Family, ours: Mapping[str, Any], problems: list[str]) -> None:
    """Every value that is read must be of its field's kind, and heads must divide what they share."""
    for field in dataclasses.fields(family.config):
        is_constant = field.name in family.constants and ours[field.name] == family.constants[field.name]
        if field.name in ours and not is_constant and (must := _must(field, ours[field.name])):
            problems.append(f"{field.name}={untrusted.short(ours[field.name])} (must be {must})")
    heads = [ours[name] for name in ("width", "num_heads", "num_kv_heads", "head_dim") if name in ours]
    if not all(map(is_size, heads)):
        return
    if "head_dim" not in ours and ours["width"] % ours["num_heads"]:
        problems.append(f"width {ours['width']} is not a multiple of {ours['num_heads']} heads")
    if "num_kv_heads" in ours and ours["num_heads"] % ours["num_kv_heads"]:
        problems.append(f"{ours['num_heads']} heads are not a multiple of {ours['num_kv_heads']} key-value heads")
    if "head_dim" in ours and ours["head_dim"] % 2:
        problems.append(f"head_dim={ours['head_dim']} (must be even: rotary positions turn pairs)")


def _must(field: dataclasses.Field, value: Any) -> str | None:
    """What a value of this field must be; None where it is."""
    if field.type is bool:
        return None if isinstance(value, bool) else "true or false"
    if field.type is float and field.name.endswith("dropout"):
        return None if is_number(value) and 0 <= value < 1 else "a number from 0 to below 1"
    if field.type in FLOATS and not (value is None and field.type is not float):
        return None if is_number(value) and value > 0 else "a number above 0"
    if field.type in (int, int | None):
        return None if is_size(value) or (value is None and field.type is not int) else "a whole number above 0"
    return None
