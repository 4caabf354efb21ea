"""Where a model's files are: a local folder, a tiny random model, or a snapshot of the Hugging Face hub."""

import pathlib
import re
import tempfile

import huggingface_hub
from huggingface_hub import errors as hub_errors

from rag_jax.data import cache
from rag_jax.errors import UserError
from rag_jax.hf import tiny, weights

RANDOM = "random:"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
OTHERS = ["onnx/*", "openvino/*", "original/*"]  # the same weights again, for other programs
# Raise it when the random models change.
RANDOM_FORMAT = 1


def resolve(path: str, key: str) -> pathlib.Path:
    """The folder that the value of the config key `key` stands for. A local folder never touches the network.

    A hub name is looked up in the hub's cache first, so that a run that is started again reads the same model.
    """
    if path.startswith(RANDOM):
        return _random(path, key)
    local = pathlib.Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise UserError(f"{key}={path!r}: is a file; give the folder of a Hugging Face model")
    if not HUB_NAME.fullmatch(path):
        raise UserError(f"{key}={path!r}: no such folder; give one, or a hub name such as BAAI/bge-small-en")
    return _cached(path) or _downloaded(path, key)


def _random(path: str, key: str) -> pathlib.Path:
    name = path.removeprefix(RANDOM)
    if name not in tiny.MODELS:
        raise UserError(f"{key}={path!r}: there is no such random model; there are {', '.join(tiny.MODELS)}")
    target = cache.folder() / "random" / f"{name}-{RANDOM_FORMAT}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
        made = pathlib.Path(scratch) / name
        made.mkdir()
        tiny.build(name, made)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # another process was first
                raise
    return target


def _cached(name: str) -> pathlib.Path | None:
    """The snapshot in the hub's cache, if it is whole."""
    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (hub_errors.LocalEntryNotFoundError, hub_errors.HFValidationError):
        return None
    has_weights = (folder / weights.SINGLE).is_file() or (folder / weights.INDEX).is_file()
    has_tokenizer = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"))
    return folder if has_weights and has_tokenizer and (folder / "config.json").is_file() else None


def _downloaded(name: str, key: str) -> pathlib.Path:
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=OTHERS))
    except hub_errors.GatedRepoError:
        reason = "its owner asks for consent: agree on its hub page and set HF_TOKEN"
    except hub_errors.RepositoryNotFoundError:
        reason = "the hub has no such model (or it is private and needs HF_TOKEN), and there is no such folder"
    except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
        reason = f"no such folder, and the hub cannot be reached ({type(error).__name__})"
    raise UserError(f"{key}={name!r}: {reason}") from None
