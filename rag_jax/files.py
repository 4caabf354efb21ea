"""Arrays kept on disk under a hash of everything that they depend on: tokenised rows, embeddings."""

import hashlib
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers

from rag_jax import untrusted

Arrays = dict[str, np.ndarray]

# Raise it when the meaning of the arrays or the way they are made changes.
FORMAT = 1


def folder() -> pathlib.Path:
    """$RAG_JAX_CACHE, or ~/.cache/rag_jax."""
    text = os.environ.get("RAG_JAX_CACHE") or "~/.cache/rag_jax"
    return untrusted.path(text, f"RAG_JAX_CACHE={text}")


def content_key(*parts: Any) -> str:
    """A hash of plain values (texts, numbers, lists, dicts)."""
    digest = hashlib.sha256()
    for part in (FORMAT, tokenizers.__version__, *parts):
        digest.update(json.dumps(part, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


def tokenizer_key(tokenizer: Any) -> str:
    """What a fast tokenizer does to a text, as a hash; padding and cutting, which each call sets anew, left out."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for changed_by_calls in ("truncation", "padding"):
        state.pop(changed_by_calls, None)
    return content_key(state, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.truncation_side)


def cached(key: str, make: Callable[[], Arrays], what: str = "tokenised rows") -> tuple[Arrays, bool]:
    """The arrays kept under `key`, or those that `make` gives, kept from then on; and whether they were there.

    A file that cannot be read whole is made again; a folder that cannot be written costs a warning.
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
    """Under a name of its own first: nobody ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
