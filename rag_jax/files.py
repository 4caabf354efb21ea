"""Files and folders that appear complete or not at all, and arrays kept on disk under a hash of what they depend on."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import tokenizers

from rag_jax import untrusted
from rag_jax.errors import UserError

Arrays = dict[str, np.ndarray]

# Raise it when the meaning of the arrays or the way they are made changes.
FORMAT = 2


def folder() -> pathlib.Path:
    """$RAG_JAX_CACHE, or ~/.cache/rag_jax; of a user without a home a folder of their own among temporary files."""
    if text := os.environ.get("RAG_JAX_CACHE"):
        return untrusted.path(text, f"RAG_JAX_CACHE={text}")
    if os.path.expanduser("~") != "~":
        return untrusted.path("~/.cache/rag_jax", "~/.cache/rag_jax")
    own = pathlib.Path(tempfile.gettempdir()) / f"rag_jax-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    about = own.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():  # what it holds is trusted
        raise UserError(f"{own}: is not yours, and this user has no home; set RAG_JAX_CACHE to a folder")
    return own


def content_key(*parts: Any) -> str:
    """A hash of plain values (texts, numbers, lists, dicts)."""
    digest = hashlib.sha256()
    for part in (FORMAT, tokenizers.__version__, *parts):
        digest.update(json.dumps(part, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


def tokenizer_key(tokenizer: Any) -> str:
    """A hash of what a fast tokenizer does to a text, without padding and truncation, which every call sets."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for changed_by_calls in ("truncation", "padding"):
        state.pop(changed_by_calls, None)
    return content_key(state, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.truncation_side)


def cached(key: str, make: Callable[[], Arrays], what: str = "tokenised rows") -> tuple[Arrays, bool]:
    """The arrays cached under `key`, made by `make` and cached where they are missing; and whether they were there.

    A damaged file is made again; a folder that cannot be written to costs a warning.
    """
    path = folder() / f"{key}.npz"
    try:
        return read(path), True
    except FileNotFoundError:
        pass
    except Exception as error:  # of many kinds: archives, compression and arrays each have their own
        logging.warning("%s in %s are damaged (%s) and made again", what, path, error)
    arrays = make()
    try:
        write(path, arrays)
    except OSError as error:
        logging.warning("%s are not kept: %s", what, error)
    return arrays, False


def read(path: pathlib.Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:  # the archive's checksums find what is damaged
        return {name: file[name] for name in file.files}


def write(path: pathlib.Path, arrays: Arrays) -> None:
    with file_at_once(path) as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


@contextlib.contextmanager
def file_at_once(path: pathlib.Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """A file to fill that appears when complete; a failure leaves nothing. `sync`: not even a power cut does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, since others may write the same file; not by `tempfile`, whose files only their owner may read.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: pathlib.Path, content: str | bytes, *, errors: str = "strict", sync: bool = False) -> None:
    """Text is written as UTF-8; `errors` says what becomes of lone surrogates, as in `str.encode`."""
    with file_at_once(path, sync=sync) as file:
        file.write(content.encode("utf-8", errors) if isinstance(content, str) else content)


def write_json(path: pathlib.Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if not untrusted.is_unicode(text):  # then everything beyond ASCII as escapes, from which it is read back
        text = json.dumps(value, indent=2)
    write_whole(path, text + "\n")


@contextlib.contextmanager
def folder_at_once(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill that becomes `target` when complete, which may be an empty folder; a failure leaves nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        made = pathlib.Path(scratch) / target.name  # the one around it is for its owner alone
        made.mkdir()
        yield made
        made.rename(target)
