"""What a run began with, beside its config: its rows and its models' files. A run that goes on must find the same."""

import hashlib
import json
import pathlib
from typing import Any

from rag_jax import data, files
from rag_jax.errors import UserError
from rag_jax.objectives import ROLES

NAME = "inputs.json"
SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model")
# Of a large file not all is read: so many blocks of that size, evenly spread, the first and the last among them.
BLOCKS, BLOCK_BYTES = 64, 1 << 16
Inputs = dict[str, dict[str, Any]]


def of_run(config: Any, examples: data.Examples) -> Inputs:
    """Rows by number and fingerprint; the models that are local folders by a digest of each file."""
    found: Inputs = {"data.train": {"rows": len(examples), "fingerprint": data.fingerprint(examples)}}
    if config.data.passages is not None and len(examples.corpus_key):
        texts = [examples.passages[key] for key in examples.corpus_key.tolist()]
        found["data.passages"] = {"passages": len(texts), "fingerprint": files.content_key(texts)[:16]}
    for role in ROLES:
        folder = pathlib.Path(config[role].path or "").expanduser()
        if config[role].path and folder.is_dir():
            paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
            found[f"{role}.path"] = {path.name: digest(path) for path in paths}
    return found


def check(workdir: pathlib.Path, config: Any, now: Inputs) -> None:
    """UserError with the difference where rows or models are others than the run in the workdir began with.

    A model's folder that is gone is not missed: the run has all of it in its checkpoints and in `models/`.
    """
    path = workdir / NAME
    if not path.is_file():
        raise UserError(f"{path} is missing: nothing says which rows and models the run began with; bring it back")
    try:
        before: Inputs = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{key}={_value(config, key)!r}: {name} was {before[key].get(name, 'not there')} and is "
            f"{now[key].get(name, 'not there')}"
            for key in before.keys() & now.keys()
            for name in sorted(before[key].keys() | now[key].keys())
            if before[key].get(name) != now[key].get(name)
        ]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); bring it back from a copy") from None
    if changed:
        raise UserError(
            f"--workdir={workdir} holds a run of other rows or models: {'; '.join(sorted(changed))}; "
            "bring back what it began with to go on, or give another --workdir"
        )


def compared(workdir: pathlib.Path, config: Any) -> set[str]:
    """Keys of rows and models that `check` compares by content, so that they may have moved."""
    try:
        before = json.loads((workdir / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # which `check` will say
        return set()
    folders = {f"{role}.path" for role in ROLES if pathlib.Path(config[role].path or "").expanduser().is_dir()}
    return before.keys() & ({"data.train"} | folders) if isinstance(before, dict) else set()


def write(workdir: pathlib.Path, found: Inputs) -> None:
    files.write_json(workdir / NAME, found)


def digest(path: pathlib.Path) -> str:
    """Of a file's size and content; of one above 4 MiB only of blocks spread over it."""
    size = path.stat().st_size
    total = hashlib.blake2b(str(size).encode(), digest_size=8)
    with open(path, "rb") as file:
        if size <= BLOCKS * BLOCK_BYTES:
            total.update(file.read())
        else:
            for block in range(BLOCKS):
                file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
                total.update(file.read(BLOCK_BYTES))
    return total.hexdigest()


def _value(config: Any, key: str) -> Any:
    section, name = key.split(".")
    return config[section][name]
