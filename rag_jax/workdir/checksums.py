"""Checksums of all files of a folder, kept in it: whether it is still what was written.

`CHECKSUMS` holds a line a file, `digest  path`, as `b2sum --check` reads them.
"""

import concurrent.futures
import hashlib
import pathlib
import re

from rag_jax import files

NAME = "CHECKSUMS"
DIGEST_BYTES = 32
LINE = re.compile(rf"([0-9a-f]{{{2 * DIGEST_BYTES}}})  (.+)")
# Hashing lets go of the interpreter, so that threads share the work.
THREADS = 8


def write(folder: pathlib.Path) -> None:
    """Sum up the folder as it is; the sums appear complete or not at all."""
    names = sorted(_files(folder))
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        digests = list(threads.map(lambda name: _digest(folder / name), names))
    lines = (f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    files.write_whole(folder / NAME, "".join(lines), errors="surrogateescape", sync=True)


def problem(folder: pathlib.Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with the folder: a file missing, changed, too many, or the sums themselves; None when nothing is.

    Of `shares` callers each reads every so many-th file from `share` on; which files there are all of them see.
    """
    try:
        text = (folder / NAME).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        return f"{NAME} {'is missing' if isinstance(error, FileNotFoundError) else f'cannot be read: {error.strerror}'}"
    lines = [LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
    expected = {line[2]: line[1] for line in lines if line}
    if len(expected) < len(lines) or not text.endswith("\n"):
        return f"{NAME} is damaged"
    found = _files(folder) - {NAME}
    if missing := sorted(expected.keys() - found):
        return f"{missing[0]} is missing"
    if others := sorted(found - expected.keys()):
        return f"{others[0]} does not belong there"

    def differs(name: str) -> str | None:
        try:
            return None if _digest(folder / name) == expected[name] else f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"

    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        return next(filter(None, threads.map(differs, sorted(found)[share::shares])), None)


def _files(folder: pathlib.Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()
