"""Compiled programs, kept on disk for the processes that come later."""

import os
from collections import Counter

import jax
import jax.monitoring

from rag_jax import files

# Of all programs together; those used longest ago go first.
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
        jax.config.update("jax_compilation_cache_dir", str(files.folder() / "compiled"))
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs too
    if not _events:
        _events["listening"] = 1
        jax.monitoring.register_event_listener(lambda event, **_: _events.update([event]))


def compiled_found() -> int:
    """How many programs this process has found compiled by an earlier one."""
    return _events["/jax/compilation_cache/cache_hits"]
