"""Where a model's files are: a local folder, a tiny random model, or a snapshot of the Hugging Face hub."""

import pathlib
import re
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors

from rag_jax import files, untrusted
from rag_jax.errors import UserError
from rag_jax.hf import tiny, weights

RANDOM = "random:"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILES = [
    "README.md",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.safetensors",
    "*_Dense/*.bin",
    "*_LayerNorm/*.bin",
]
TORCH_FILES = ["pytorch_model*.bin"]  # fetched where there is no safetensors
# Relative names.
SMALL_FILES = (
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|modules"
    r"|config_sentence_transformers|sentence_bert_config|adapter_config)\.json"
    r"|vocab\.txt|merges\.txt|chat_template\.jinja|[\w.-]+\.model|[\w.-]*(Pooling|Dense|LayerNorm)/config\.json"
)
OTHERS = ["onnx/*", "openvino/*", "original/*"]  # the same weights again, for other programs
MOST_CARD = 2**20  # bytes
# Raise it when the random models change.
RANDOM_FORMAT = 1


def resolve(path: str, key: str) -> pathlib.Path:
    """The folder that the value of the config key `key` stands for. A local folder never touches the network.

    A hub name is looked up in the hub's cache first, so that a run that is started again reads the same model.
    """
    if path.startswith(RANDOM):
        return _random(path, key)
    local = untrusted.path(path, f"{key}={path!r}")
    if local.is_dir():
        return local
    if local.exists():
        raise UserError(f"{key}={path!r}: is a file; give the folder of a Hugging Face model")
    if not HUB_NAME.fullmatch(path):
        raise UserError(f"{key}={path!r}: no such folder; give one, or a hub name such as BAAI/bge-small-en")
    return _cached(path) or _downloaded(path, key)


def is_hub_name(path: str) -> bool:
    """Whether a model's path names one of the hub, and no folder here."""
    return HUB_NAME.fullmatch(path) is not None and not pathlib.Path(path).expanduser().exists()


def small_files(folder: pathlib.Path, where: str) -> dict[str, pathlib.Path]:
    """The files of a model's folder but weights and documents, by their relative names.

    These are copied into workdirs and exports. So UserError for a link to a file elsewhere, unless it is one of the
    hub's cache or the other file has the same name: a `vocab.txt` that is really an account's key must not travel.
    """
    home = folder.resolve()
    if home.parent.name == "snapshots":  # of the hub's cache, whose files are links to what they hold
        home = home.parent.parent
    found = {}
    for path in sorted({*folder.glob("*"), *folder.glob("*/config.json")}):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and re.fullmatch(SMALL_FILES, name):
            target = path.resolve()
            if not target.is_relative_to(home) and target.name != path.name:
                raise UserError(f"{where}: {name} is a link out of the folder, to {target}; put a copy in its place")
            untrusted.refuse_pointer(path, f"{where}: {name}")
            found[name] = path
    return found


def model_folder(folder: pathlib.Path) -> pathlib.Path:
    """Where config, tokenizer and weights are: in old folders of sentence-transformers one below, `0_Transformer`."""
    if (folder / "config.json").is_file() or not (folder / "modules.json").is_file():
        return folder
    modules = untrusted.read_json(folder / "modules.json", str(folder / "modules.json"))
    for module in modules if isinstance(modules, list) else ():
        path = module.get("path") if isinstance(module, dict) else None
        if isinstance(path, str) and re.fullmatch(r"[\w-]{1,80}", path) and (folder / path / "config.json").is_file():
            if str(module.get("type")).endswith(".Transformer"):
                return folder / path
    return folder


def card_facts(path: str) -> dict[str, Any]:
    """What a model's card says in its head: license, language and more; {} where there is none that can be read."""
    local = pathlib.Path(path).expanduser()
    folder = local if local.is_dir() else _cached(path) if HUB_NAME.fullmatch(path) else None
    card = None if folder is None else folder / "README.md"
    try:
        if card is None or not card.is_file() or card.stat().st_size > MOST_CARD:
            return {}
        return huggingface_hub.metadata_load(card) or {}
    except Exception:  # a card is for people: whatever its YAML holds, the model can be used
        return {}


def _random(path: str, key: str) -> pathlib.Path:
    name = path.removeprefix(RANDOM)
    if name not in tiny.MODELS:
        raise UserError(f"{key}={path!r}: there is no such random model; there are {', '.join(tiny.MODELS)}")
    target = files.folder() / "random" / f"{name}-{RANDOM_FORMAT}"
    if target.is_dir():
        return target
    try:
        with files.folder_at_once(target) as made:
            tiny.build(name, made)
    except OSError:
        if not target.is_dir():  # else another process was first
            raise
    return target


def _cached(name: str) -> pathlib.Path | None:
    """The snapshot in the hub's cache, if it is complete."""
    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (hub_errors.LocalEntryNotFoundError, hub_errors.HFValidationError):
        return None
    return None if _lacks(folder) else folder


def _lacks(folder: pathlib.Path) -> str | None:
    """What a model's folder lacks, if it is not complete."""
    if not (folder / "config.json").is_file():
        return f"{folder} holds no config.json"
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return f"{folder} holds no tokenizer"
    try:
        weights.files(folder)
    except UserError as error:
        return str(error)
    return None


def _downloaded(name: str, key: str) -> pathlib.Path:
    try:
        for wanted in (HUB_FILES, HUB_FILES + TORCH_FILES):
            found = huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=OTHERS)
            if not _lacks(folder := pathlib.Path(found)):
                return folder
        if lacking := _lacks(folder):
            raise UserError(
                f"{key}={name!r}: is not complete in the hub's cache: {lacking}; if its download broke off, connect "
                "and run again, else give another model"
            )
        return folder
    except UserError:
        raise
    except hub_errors.GatedRepoError:
        reason = "its owner asks for consent: agree on its hub page and set HF_TOKEN"
    except hub_errors.RepositoryNotFoundError:
        reason = "the hub has no such model (or it is private and needs HF_TOKEN), and there is no such folder"
    except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
        reason = f"no such folder, and the hub cannot be reached ({type(error).__name__})"
    raise UserError(f"{key}={name!r}: {reason}") from None
