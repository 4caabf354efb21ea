"""Hugging Face folders in and out: config, tokenizer, pooling, weights."""

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
import transformers

from rag_jax import files, models, untrusted
from rag_jax.errors import UserError
from rag_jax.hf import config as configs
from rag_jax.hf import folder as folders
from rag_jax.hf import known, peft, weights
from rag_jax.hf.families import FAMILIES, Family
from rag_jax.hf.pooling import Pooling, load_parts, pooled_width, read_pooling, write_pooling
from rag_jax.hf.weights import load_params
from rag_jax.models import adapters

__all__ = [
    "Pooling",
    "Source",
    "base_beside",
    "base_of",
    "copy_small_files",
    "fused_problem",
    "load_adapter",
    "load_params",
    "load_projection",
    "open_config",
    "open_model",
    "pooled_width",
    "save_adapter",
    "save_model",
    "with_adapter",
]


@dataclasses.dataclass(frozen=True)
class Source:
    """A model's folder, everything but its weights read."""

    path: str  # as the config has it
    folder: pathlib.Path  # of its config and weights
    around: pathlib.Path  # of sentence-transformers' files: the same, or the one above
    model_type: str  # Hugging Face's
    model_config: models.ModelConfig
    tokenizer: Any
    pooling: Pooling
    dtype: str  # of the weights in the folder
    adapter: pathlib.Path | None = None  # the folder of an adapter that came with it

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]


def open_model(path: str, key: str, role: str) -> Source:
    """The model that the config key `key` names, as "retriever" or "generator". UserError for what cannot be used."""
    around, where = folders.resolve(path, key), f"{key}={path!r}"
    if is_adapter_alone(around):
        return with_adapter(open_model(base_of(path, key), key, role), path, key)
    folder = folders.model_folder(around)
    for each in (around, folder):
        folders.small_files(each, where)
    model_type, model_config = configs.read_config(folder, where)
    if role == "generator" and not model_config.causal:
        if FAMILIES[model_type].config.causal:
            raise UserError(
                f"{where}: its config.json says is_causal=false: it was made an encoder, which cannot generate; give "
                "another model"
            )
        able = [name for name, family in FAMILIES.items() if family.config.causal]
        raise UserError(f"{where}: a {model_type} model cannot generate; give one of type {', '.join(able)}")
    if role == "retriever":
        model_config = model_config.without_head()  # not read, not kept, not written
    tokenizer = _tokenizer(folder, where, model_config.vocab_size)
    pooling = read_pooling(around, FAMILIES[model_type].pooling, where)
    if role == "retriever":
        model_config = models.with_projection(model_config, pooling.projection)
    if role == "retriever" and pooling.lower_case:
        _lower_case(tokenizer)
    dtype = _rest_dtype(folder) or weights.file_dtype(folder, model_type, model_config)
    source = Source(path, folder, around, model_type, model_config, tokenizer, pooling, dtype)
    return with_adapter(source, path, key) if peft.is_adapter(around) else source


def with_adapter(source: Source, path: str, key: str) -> Source:
    """A model with the adapter (PEFT) in the folder that the config key `key` names, of which no weights are read.

    What the folder says besides, of its tokenizer and pooling, holds in place of what its base says.
    """
    folder, where = folders.resolve(path, key), f"{key}={path!r}"
    if not peft.is_adapter(folder):
        raise UserError(f"{where}: holds no {peft.CONFIG}; give the folder of an adapter (PEFT)")
    lora = peft.read_config(folder, where, source.model_type, source.model_config)
    config, files_there = models.with_lora(source.model_config, lora), folders.small_files(folder, where)
    pooling, tokenizer, around = source.pooling, source.tokenizer, source.around
    if "modules.json" in files_there:
        pooling, around = read_pooling(folder, source.family.pooling, where), folder
        config = models.with_projection(config, pooling.projection)
    if "tokenizer.json" in files_there:
        tokenizer = _tokenizer(folder, where, config.vocab_size)
    return dataclasses.replace(
        source, path=path, model_config=config, tokenizer=tokenizer, pooling=pooling, around=around, adapter=folder
    )


def load_projection(source: Source) -> dict[str, np.ndarray]:
    """What a retriever's folder holds of what stands behind its pooling, by the paths of our leaves."""
    parts = source.model_config.computing.projection
    return load_parts(source.around, parts) if parts else {}


def load_adapter(source: Source) -> dict[str, np.ndarray]:
    """What the folder of a source's adapter holds, by the paths of our leaves."""
    assert source.adapter is not None
    where = f"the adapter {source.adapter}"
    return peft.load(source.adapter, where, source.model_type, source.model_config)


def open_config(path: str, key: str, role: str) -> Source:
    """`open_model` without tokenizer and weights, to plan with; well-known hub names need no download."""
    if path in known.KNOWN and not pathlib.Path(path).is_dir():
        model_type, sizes = known.KNOWN[path]
        folder = pathlib.Path(path)
        model_config = configs.from_hf(transformers.AutoConfig.for_model(model_type, **sizes).to_dict(), [])
    else:
        around = folders.resolve(path, key)
        if is_adapter_alone(around):
            return with_adapter(open_config(base_of(path, key), key, role), path, key)
        folder = folders.model_folder(around)
        model_type, model_config = configs.read_config(folder, f"{key}={path!r}")
    if role == "retriever":
        model_config = model_config.without_head()
    pooling = Pooling(FAMILIES[model_type].pooling)
    return Source(path, folder, folder, model_type, model_config, None, pooling, "float32")


def save_model(
    source: Source, params: Any, folder: pathlib.Path, dtype: str = "float32", pooling: Pooling | None = None
) -> None:
    """A folder that `transformers` loads, and with `pooling` sentence-transformers too; `folder` must be empty.

    `dtype` is that of the weights: "float32", "float16", "bfloat16", or "source" for what they came in.
    """
    dtype = source.dtype if dtype == "source" else dtype
    _copy(source, folder)
    (folder / peft.CONFIG).unlink(missing_ok=True)  # of an adapter that is part of the weights now
    _without_code(folder)
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    theirs["architectures"] = [_architecture(source, is_retriever=pooling is not None)]
    theirs.pop("torch_dtype", None)
    theirs["dtype"] = dtype
    theirs.pop("quantization_config", None)  # the weights are plain
    if isinstance(theirs.get("pad_token_id"), int) and theirs["pad_token_id"] >= source.model_config.vocab_size:
        theirs["pad_token_id"] = None  # no embedding stands there, and PyTorch refuses to make such a layer
    files.write_json(folder / "config.json", theirs)
    if pooling is not None:
        write_pooling(folder, pooling, source.model_config.width, params, dtype)
        _with_pad_token(folder, source.tokenizer)
    rest = weights.load_rest(source.folder, source.model_type)
    params = adapters.merged(params, source.model_config.computing.lora)
    weights.save_params(params, folder, source.model_type, source.model_config, np.dtype(dtype), rest)


def save_adapter(
    source: Source, params: Any, folder: pathlib.Path, base: str, trained: Collection[str], pooling: Pooling | None
) -> None:
    """A folder that PEFT loads around its `base`, and with `pooling` sentence-transformers too; it must be empty.

    `trained`: paths of the base's own leaves that were trained beside its adapters, and are in the folder too.
    """
    _copy(source, folder)
    for name in ("config.json", "generation_config.json", peft.CONFIG):  # those of the base are in its own folder
        (folder / name).unlink(missing_ok=True)
    _without_code(folder)
    if pooling is not None:
        write_pooling(folder, pooling, source.model_config.width, params, "float32")
        _with_pad_token(folder, source.tokenizer)
    is_retriever = pooling is not None
    peft.save(
        params, folder, source.model_type, source.model_config, base, is_retriever=is_retriever, trained=tuple(trained)
    )


def fused_problem(source: Source, lora: models.Lora) -> str | None:
    """Which layers, one in Hugging Face's model, such adapters are not on together."""
    return peft.fused_problem(source.model_type, source.model_config, lora)


def base_of(path: str, key: str) -> str:
    """What a model's path stands for in a file that is handed on: a hub name, or a folder, of an adapter its base's."""
    if not path.startswith(folders.RANDOM) and not pathlib.Path(path).expanduser().is_dir():
        return path
    folder, where = folders.resolve(path, key), f"{key}={path!r}"
    if not is_adapter_alone(folder):
        return str(folder.resolve())
    base = peft.base_of(folder, where)
    if pathlib.Path(base).is_dir() and is_adapter_alone(pathlib.Path(base)):
        raise UserError(f"{where}: its base, {untrusted.short(base)}, is an adapter too; merge that into its own base")
    return base


def base_beside(folder: pathlib.Path, where: str) -> str:
    """The base that the adapter's config in a folder names."""
    return peft.base_of(folder, where)


def is_adapter_alone(folder: pathlib.Path) -> bool:
    """Whether a folder holds an adapter (PEFT) without the model that it is for."""
    return peft.is_adapter(folder) and not (folder / "config.json").is_file()


def copy_small_files(source: Source, folder: pathlib.Path) -> None:
    """All of a model but its weights: with a checkpoint's parameters it can be evaluated and exported again."""
    folder.mkdir(parents=True, exist_ok=True)
    _copy(source, folder)
    rest = weights.load_rest(source.folder, source.model_type)
    safetensors.numpy.save_file(rest, folder / weights.REST, {"dtype": source.dtype})


def _tokenizer(folder: pathlib.Path, where: str, vocab_size: int) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        around = tokenizer("a").input_ids
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # any kind, from any of its many readers; a panic in Rust is no Exception
        reason = untrusted.one_line(error, 160)
        raise UserError(f"{where}: its tokenizer cannot be read ({reason}); is tokenizer.json complete?") from None
    if not tokenizer.is_fast:
        raise UserError(f"{where}: its tokenizer has no fast version; give a folder that holds tokenizer.json")
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):  # what transformers makes of no files
        raise UserError(f"{where}: no tokenizer in {folder}; save the model's own there, with its tokenizer.json")
    tokenizer = _without_more(tokenizer, vocab_size, around)
    # The special tokens around texts are not always part of its vocabulary.
    largest = max([*tokenizer.get_vocab().values(), *around], default=0)
    if largest >= vocab_size:
        raise UserError(f"{where}: its tokenizer has ids up to {largest}, but the model only {vocab_size} embeddings")
    return tokenizer


def _without_more(tokenizer: Any, vocab_size: int, around: Sequence[int]) -> Any:
    """Without the added tokens that the model has no embedding for, such as a pad token that came later.

    They are then read as the texts that they are. Those that stand around texts stay, to be refused.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # The unknown one stands for whatever a text holds.
    needed = {*around, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    unknown = state["model"].get("unk_token")
    lost = {
        token["content"]
        for token in state["added_tokens"]
        if token["id"] >= vocab_size and token["id"] not in needed and token["content"] != unknown
    }
    if not lost or not isinstance(state["model"].get("vocab"), dict) or lost & state["model"]["vocab"].keys():
        return tokenizer
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in lost]
    kept = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if str(token) not in lost}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(state)),
        name_or_path=tokenizer.name_or_path,
        truncation_side=tokenizer.truncation_side,
        **kept,
    )


def _lower_case(tokenizer: Any) -> None:
    """Makes a tokenizer read its texts in lower case, as sentence-transformers does."""
    backend = tokenizer.backend_tokenizer
    before = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Lowercase(), *before])


def _rest_dtype(folder: pathlib.Path) -> str | None:
    """What a workdir's copy says about the weights it was made from."""
    if not (folder / weights.REST).is_file():
        return None
    try:
        with safetensors.safe_open(folder / weights.REST, "np") as file:
            dtype = (file.metadata() or {}).get("dtype")
    except (safetensors.SafetensorError, OSError):
        dtype = None
    if dtype not in weights.DTYPE_NAMES:
        raise UserError(f"{folder / weights.REST} is damaged; copy the models of the workdir there again")
    return dtype


def _copy(source: Source, target: pathlib.Path) -> None:
    adapter = [] if source.adapter is None else [source.adapter]
    for folder in (source.around, source.folder, *adapter):
        for name, path in folders.small_files(folder, str(folder)).items():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)


def _architecture(source: Source, *, is_retriever: bool) -> str:
    """The class to load with: a retriever has no head."""
    architecture = source.family.architecture
    return re.sub(r"(ForCausalLM|LMHeadModel)$", "Model", architecture) if is_retriever else architecture


def _without_code(folder: pathlib.Path) -> None:
    """An export needs no remote code, and asks for none."""
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if settings.pop("auto_map", None) is not None:
            files.write_json(file, settings)


def _with_pad_token(folder: pathlib.Path, tokenizer: Any) -> None:
    """sentence-transformers pads its batches, which a tokenizer made for generation may have no token for.

    Any token will do: what is padded is masked.
    """
    if tokenizer.pad_token is None:
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        files.write_json(file, settings | {"pad_token": tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)})
