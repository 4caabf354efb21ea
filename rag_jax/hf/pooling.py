"""How a retriever's token states become an embedding: sentence-transformers' files, read and written."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from rag_jax import files, models, untrusted
from rag_jax.errors import UserError
from rag_jax.hf import weights
from rag_jax.models import projection

# Theirs -> ours. Older files have one flag a mode, newer ones a name. Of several the vectors stand in this order.
MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# PyTorch's classes of activations -> ours.
ACTIVATIONS = {"Identity": "none", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu"}
WHERE_IN_TORCH = {"Identity": "torch.nn.modules.linear"}
QUERY_PROMPTS = ("query", "s2p_query")
PASSAGE_PROMPTS = ("passage", "document", "corpus")
SIMILARITIES = {"cosine": "cosine", "dot": "dot", "dot_score": "dot"}


@dataclasses.dataclass(frozen=True)
class Pooling:
    """What a model's folder says about its embeddings."""

    mode: str  # of rag.POOLING, or several of them joined by +
    query_prefix: str = ""
    passage_prefix: str = ""
    max_len: int | None = None  # tokens
    similarity: str = "cosine"  # "cosine" | "dot": that of embeddings as they are
    truncate_dim: int | None = None  # leading channels of an embedding that count; None: all
    lower_case: bool = False  # texts are read in lower case, whatever the tokenizer does
    projection: tuple[models.Part, ...] = ()  # what stands behind the pooling, but a last division by the length


def pooled_width(mode: str, width: int) -> int:
    """Channels that a pooling of states of `width` gives."""
    return width * (1 + mode.count("+"))


def read_pooling(folder: pathlib.Path, default: str, where: str) -> Pooling:
    """What the folder says; `default` mode and no prefixes where it says nothing."""
    problems: list[str] = []
    mode, parts = _modules(folder, default, where, problems)
    normalises = bool(parts) and parts[-1] == models.Unit()
    parts = parts[:-1] if normalises else parts
    settings = _read(folder, "config_sentence_transformers.json", where, dict)
    problems += [f"config_sentence_transformers.json: {problem}" for problem in _setting_problems(settings, normalises)]
    reading = _read(folder, "sentence_bert_config.json", where, dict)
    max_len = reading.get("max_seq_length")
    if max_len is not None and (not isinstance(max_len, int) or max_len < 1):
        problems.append(
            f"sentence_bert_config.json: max_seq_length={untrusted.short(max_len)} must be a number of tokens above 0"
        )
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}; give another model")
    prompts = settings.get("prompts") or {}
    return Pooling(
        mode,
        _first(prompts, QUERY_PROMPTS),
        _first(prompts, PASSAGE_PROMPTS),
        max_len,
        "cosine" if normalises else SIMILARITIES[_similarity(settings)],  # of unit vectors they are the same
        settings.get("truncate_dim"),
        reading.get("do_lower_case") is True,
        tuple(parts),
    )


def _modules(folder: pathlib.Path, mode: str, where: str, problems: list[str]) -> tuple[str, list[models.Part]]:
    """The mode of its pooling, `mode` where it has none, and what stands behind it."""
    parts: list[models.Part] = []
    for module in _read(folder, "modules.json", where, list):
        if not isinstance(module, dict):
            raise UserError(f"{where}: modules.json must be a list of objects; fetch it again")
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if not str(module.get("type", "")).startswith("sentence_transformers."):
            problems.append(
                f"modules.json: a module {untrusted.short(module.get('type'))} that is code of its own, which is never "
                "run"
            )
        elif kind == "Pooling":
            mode = _mode(_read(folder, f"{module.get('path', '')}/config.json", where, dict), problems)
        elif kind in ("Dense", "LayerNorm"):
            parts.append(_part(kind, _read(folder, f"{module.get('path', '')}/config.json", where, dict), problems))
        elif kind == "Normalize":
            parts.append(models.Unit())
        elif kind not in ("Transformer", "Dropout"):
            problems.append(
                f"modules.json: a module {kind[:80]}, which is part of the model (supported: Transformer, Pooling, "
                "Dense, LayerNorm, Normalize)"
            )
    return mode, parts


def _similarity(settings: Mapping[str, Any]) -> str:
    return str(settings.get("similarity_fn_name") or "cosine")


def _setting_problems(settings: Mapping[str, Any], normalises: bool) -> Iterator[str]:
    """What of prompts, similarity and width cannot be computed."""
    prompts, similarity, width = settings.get("prompts") or {}, _similarity(settings), settings.get("truncate_dim")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        yield f"prompts={untrusted.short(prompts)} must map names to texts"
    if similarity not in SIMILARITIES:
        yield f"similarity_fn_name={untrusted.short(similarity)} (supported: {', '.join(SIMILARITIES)})"
    if width is not None and not (isinstance(width, int) and width > 0):
        yield f"truncate_dim={untrusted.short(width)} must be a number of channels above 0"
    elif width is not None and normalises and SIMILARITIES.get(similarity) == "dot":
        yield (
            "similarity_fn_name=dot with truncate_dim, of unit vectors that are cut (supported: cosine, or dot without "
            "Normalize)"
        )


def _part(kind: str, config: Mapping[str, Any], problems: list[str]) -> models.Part:
    """A module behind the pooling, by its config."""
    keys = ("dimension",) if kind == "LayerNorm" else ("in_features", "out_features")
    sizes: list[Any] = [config.get(key) for key in keys]
    for key, size in zip(keys, sizes, strict=True):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            problems.append(
                f"a module {kind} with {key}={untrusted.short(size)} (must be a number of channels above 0)"
            )
            return models.Unit()
    if kind == "LayerNorm":
        return models.Norm(sizes[0])
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
    if name not in ACTIVATIONS:
        problems.append(
            f"a module Dense with activation_function={untrusted.short(name)} (supported: {', '.join(ACTIVATIONS)})"
        )
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            problems.append(f"a module Dense with {key}={untrusted.short(config[key])} (supported: sentence_embedding)")
    return models.Dense(sizes[0], sizes[1], config.get("bias") is not False, ACTIVATIONS.get(name, "none"))


# Their name of a tensor of such a module -> our leaf.
_TENSORS = {
    models.Dense: {"linear.weight": "kernel", "linear.bias": "bias"},
    models.Norm: {"norm.weight": "scale", "norm.bias": "bias"},
}


def load_parts(folder: pathlib.Path, parts: Sequence[models.Part]) -> dict[str, np.ndarray]:
    """The parameters of all modules behind the pooling, float32, by their paths in our trees.

    UserError for a tensor that is missing, of another shape, or not finite.
    """
    kinds = ("Dense", "LayerNorm", "Normalize")
    modules = [
        module
        for module in _read(folder, "modules.json", str(folder), list)
        if str(module.get("type", "")).rsplit(".", 1)[-1] in kinds
    ]
    shapes, found = projection.leaves(parts), {}
    for i, (part, module) in enumerate(zip(parts, modules, strict=False)):
        names = _TENSORS.get(type(part), {})
        path, tensors = folder / str(module.get("path", "")), {}
        if names:
            tensors = _tensors(path)
        for theirs, ours in names.items():
            leaf = f"projection/{projection.name_of(i, part)}/{ours}"
            if leaf not in shapes:
                continue
            value = tensors.get(theirs)
            value = value if value is None or ours != "kernel" else value.T
            if value is None or value.shape != shapes[leaf]:
                had = "is missing" if value is None else f"is {value.shape}, not {shapes[leaf]}"
                raise UserError(f"{path}: {theirs} {had}; fetch it again")
            if not np.isfinite(value).all():
                raise UserError(f"{path}: {theirs} holds NaN or infinity; fetch it again")
            found[leaf] = np.ascontiguousarray(value, np.float32)
    return found


def _tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a module's folder, float32."""
    found = {}
    for path in weights.files(folder):
        untrusted.refuse_pointer(path, str(path))
        try:
            with weights.opened(path) as file:
                found |= {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a complete safetensors file ({str(error)[:120]}); fetch it again") from None
    return found


def _write_part(folder: pathlib.Path, place: int, part: models.Part, params: Any, dtype: str) -> None:
    """The config and the tensors of a module behind the pooling."""
    folder.mkdir(exist_ok=True)
    if isinstance(part, models.Unit):
        return
    if isinstance(part, models.Dense):
        name = next(name for name, ours in ACTIVATIONS.items() if ours == part.activation)
        activation = f"{WHERE_IN_TORCH.get(name, 'torch.nn.modules.activation')}.{name}"
        sizes = {"in_features": part.inputs, "out_features": part.width, "bias": part.bias}
        files.write_json(folder / "config.json", sizes | {"activation_function": activation})
    else:
        files.write_json(folder / "config.json", {"dimension": part.width})
    own = params["projection"][projection.name_of(place, part)]
    tensors = {
        theirs: np.ascontiguousarray(np.asarray(own[ours]).T, np.dtype(dtype))
        for theirs, ours in _TENSORS[type(part)].items()
        if ours in own
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_pooling(
    folder: pathlib.Path, pooling: Pooling, width: int, params: Any = None, dtype: str = "float32"
) -> None:
    """The files from which `SentenceTransformer(folder)` embeds as training did; the model is `width` wide."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    for place, part in enumerate(pooling.projection):
        kind = {models.Dense: "Dense", models.Norm: "LayerNorm", models.Unit: "Normalize"}[type(part)]
        modules.append((f"{len(modules)}_{kind}", kind))
        _write_part(folder / modules[-1][0], place, part, params, dtype)
    if pooling.similarity == "cosine":
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
        (folder / modules[-1][0]).mkdir(exist_ok=True)
    # The old names of types, flags and sizes: releases from 2.2 on read them.
    types = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    flags = {flag: MODES[name] in pooling.mode.split("+") for flag, name in FLAGS.items()}
    files.write_json(folder / "modules.json", types)
    files.write_json(folder / "1_Pooling/config.json", {"word_embedding_dimension": width, **flags})
    settings: dict[str, Any] = {
        "prompts": {"query": pooling.query_prefix, "document": pooling.passage_prefix},
        "similarity_fn_name": pooling.similarity,
    }
    if pooling.truncate_dim is not None:
        settings["truncate_dim"] = pooling.truncate_dim
    files.write_json(folder / "config_sentence_transformers.json", settings)
    reading = {"max_seq_length": pooling.max_len, "do_lower_case": pooling.lower_case}
    files.write_json(folder / "sentence_bert_config.json", reading)


def _mode(config: dict[str, Any], problems: list[str]) -> str:
    if config.get("include_prompt") is False:
        problems.append("pooling leaves the prompt out (include_prompt), which is not supported")
    named = config.get("pooling_mode")
    modes = named if isinstance(named, list) else [] if named is None else [named]
    modes = modes or [FLAGS.get(flag, flag) for flag, on in config.items() if flag.startswith("pooling_mode_") and on]
    if not modes or not all(str(mode) in MODES for mode in modes):
        problems.append(
            f"pooling by {' and '.join(map(str, modes))[:160] or 'nothing'} (supported: {', '.join(MODES)})"
        )
        return "mean"
    order = modes if isinstance(named, list) else [mode for mode in MODES if mode in modes]
    return "+".join(MODES[mode] for mode in order)


def _first(prompts: dict[str, str], names: tuple[str, ...]) -> str:
    return next((prompts[name] for name in names if prompts.get(name)), "")


def _read(folder: pathlib.Path, name: str, where: str, kind: type) -> Any:
    """The list or dict in a JSON file, an empty one where there is no such file."""
    path = folder / name
    if ".." in pathlib.PurePath(name).parts or pathlib.PurePath(name).is_absolute():
        raise UserError(f"{where}: modules.json points outside of the folder, to {name}")
    if not os.path.isfile(path):  # also where no file can have such a name
        return kind()
    content = untrusted.read_json(path, f"{where}: {name}")
    if not isinstance(content, kind | None):
        raise UserError(f"{where}: {name} does not hold a {kind.__name__}; fetch it again")
    return content or kind()
