"""Run the project's commands as a user does: in a process of their own, on one device, from the repository's root."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "configs" / "tiny.py")


def environment(cache):
    """That of the tests, but one device, and a cache of its own."""
    flags = "--xla_backend_optimization_level=0"
    here = {name: value for name, value in os.environ.items() if name != "NPROC"}
    return here | {"XLA_FLAGS": flags, "RAG_JAX_CACHE": str(cache), "PYTHONPATH": str(ROOT)}


def words(module, *flags, **values):
    """`python -m rag_jax.MODULE FLAGS --config.KEY=VALUE`; `__` in a name stands for the dot."""
    overrides = [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items()]
    return [sys.executable, "-m", f"rag_jax.{module}", *map(str, flags), *overrides]


def run(cache, module, *flags, **values):
    """What it printed; it must end well and say nothing on stderr but its progress."""
    process = subprocess.run(
        words(module, *flags, **values), cwd=ROOT, env=environment(cache), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
