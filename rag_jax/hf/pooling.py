"""How a retriever's token states become an embedding: sentence-transformers' files, read and written."""

import dataclasses
import os
import pathlib
from typing import Any

from rag_jax import files, untrusted
from rag_jax.errors import UserError

# Theirs -> ours. Older files have one flag a mode, newer ones a name.
MODES = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
FLAGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "lasttoken"}
QUERY_PROMPTS = ("query", "s2p_query")
PASSAGE_PROMPTS = ("passage", "document", "corpus")
SIMILARITIES = {"cosine": "cosine", "dot": "dot", "dot_score": "dot"}


@dataclasses.dataclass(frozen=True)
class Pooling:
    """What a model's folder says about its embeddings."""

    mode: str  # "cls" | "mean" | "last"
    query_prefix: str = ""
    passage_prefix: str = ""
    max_len: int | None = None  # tokens
    similarity: str = "cosine"  # "cosine" | "dot": that of embeddings as they are
    truncate_dim: int | None = None  # leading channels of an embedding that count; None: all
    lower_case: bool = False  # texts are read in lower case, whatever the tokenizer does


def read_pooling(folder: pathlib.Path, default: str, where: str) -> Pooling:
    """What the folder says; `default` mode and no prefixes where it says nothing."""
    problems: list[str] = []
    mode, normalises = default, False
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
        elif kind not in ("Transformer", "Normalize"):
            problems.append(
                f"modules.json: a module {kind[:80]}, which is part of the model (supported: Transformer, Pooling, "
                "Normalize)"
            )
        normalises |= kind == "Normalize"
    settings = _read(folder, "config_sentence_transformers.json", where, dict)
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        problems.append(
            f"config_sentence_transformers.json: prompts={untrusted.short(prompts)} must map names to texts"
        )
        prompts = {}
    similarity = settings.get("similarity_fn_name") or "cosine"
    if str(similarity) not in SIMILARITIES:
        problems.append(
            f"config_sentence_transformers.json: similarity_fn_name={untrusted.short(similarity)} (supported: "
            f"{', '.join(SIMILARITIES)})"
        )
    width = settings.get("truncate_dim")
    if width is not None and not (isinstance(width, int) and width > 0):
        problems.append(
            f"config_sentence_transformers.json: truncate_dim={untrusted.short(width)} must be a number of channels "
            "above 0"
        )
    elif width is not None and normalises and SIMILARITIES.get(str(similarity)) == "dot":
        problems.append(
            "config_sentence_transformers.json: similarity_fn_name=dot with truncate_dim, of unit vectors that are cut "
            "(supported: cosine, or dot without Normalize)"
        )
    reading = _read(folder, "sentence_bert_config.json", where, dict)
    max_len = reading.get("max_seq_length")
    if max_len is not None and (not isinstance(max_len, int) or max_len < 1):
        problems.append(
            f"sentence_bert_config.json: max_seq_length={untrusted.short(max_len)} must be a number of tokens above 0"
        )
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}; give another model")
    return Pooling(
        mode,
        _first(prompts, QUERY_PROMPTS),
        _first(prompts, PASSAGE_PROMPTS),
        max_len,
        "cosine" if normalises else SIMILARITIES[str(similarity)],  # of unit vectors they are the same
        width,
        reading.get("do_lower_case") is True,
    )


def write_pooling(folder: pathlib.Path, pooling: Pooling, width: int) -> None:
    """The files from which `SentenceTransformer(folder)` embeds as training did."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if pooling.similarity == "cosine":
        modules.append(("2_Normalize", "Normalize"))
        (folder / "2_Normalize").mkdir(exist_ok=True)
    # The old names of types, flags and sizes: releases from 2.2 on read them.
    types = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    flags = {flag: MODES[name] == pooling.mode for flag, name in FLAGS.items()}
    others = {"pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}
    files.write_json(folder / "modules.json", types)
    files.write_json(folder / "1_Pooling/config.json", {"word_embedding_dimension": width, **flags, **others})
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
    modes = [config["pooling_mode"]] if "pooling_mode" in config else []
    modes = modes or [FLAGS.get(flag, flag) for flag, on in config.items() if flag.startswith("pooling_mode_") and on]
    if len(modes) != 1 or str(modes[0]) not in MODES:
        problems.append(
            f"pooling by {' and '.join(map(str, modes))[:160] or 'nothing'} (supported: {', '.join(MODES)})"
        )
        return "mean"
    return MODES[modes[0]]


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
