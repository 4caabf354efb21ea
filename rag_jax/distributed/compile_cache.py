"""Compiled programs, kept on disk for the processes that come later."""

import contextlib
import os
import pathlib
from collections import Counter

import jax
import jax.monitoring

from rag_jax import files

# Of all programs together.
MOST_BYTES = 4 * 10**9
_events: Counter[str] = Counter()


def keep_compiled() -> None:
    """What is compiled from now on is found again by later processes; in the user's own folder for it, if set.

    Not by several processes on CPUs: only the first of them finds what was kept, and a program from the disk and one
    just compiled exchange in different orders (jaxlib 0.10.2), at which gloo ends the run.
    """
    if jax.distributed.is_initialized() and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = files.folder() / "compiled"
        make_room(folder, MOST_BYTES)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", -1)  # else jax looks at every file for each that it writes
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs too
    if not _events:
        _events["listening"] = 1
        jax.monitoring.register_event_listener(lambda event, **_: _events.update([event]))


def make_room(folder: pathlib.Path, most_bytes: int) -> None:
    """Delete the least recently used files of a folder until the others have at most so many bytes.

    What cannot be looked at or deleted stays: a folder of the compiler's own, what another process has just deleted.
    """
    found = []
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):
            if path.is_file():
                found.append((max(path.stat().st_atime, path.stat().st_mtime), path.stat().st_size, path))
    excess = sum(size for _, size, _ in found) - most_bytes
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        excess -= size


def compiled_found() -> int:
    """How many programs this process has found compiled by an earlier one."""
    return _events["/jax/compilation_cache/cache_hits"]
