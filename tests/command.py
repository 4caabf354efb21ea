"""Run the project's commands as a user does, from the repository's root: in a process of their own, or in this one."""

import contextlib
import importlib
import io
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from quick_compiling import FLAGS

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "configs" / "tiny.py")
SECRET = "hf_" + "Secret0" * 5  # in the environment of the tiny run
# The run of the fixture `tiny_run`.
TINY_STEPS = 6
TINY_VALUES = {
    "total_steps": TINY_STEPS, "eval__every_steps": 3, "retriever__query_prefix": "ask: ",
    "objective__marginal_temperature": 0.05,  # passages that differ in weight
    "checkpoint__every_steps": 0, "checkpoint__every_minutes": 1e-6,  # by the clock, and so fast that after every step
}  # fmt: skip


def environment(cache):
    """That of the tests, but one device, a cache of its own, and no PyTorch, as `pip install rag_jax` leaves it."""
    here = {name: value for name, value in os.environ.items() if name != "NPROC"}
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "without_torch")))
    return here | {"XLA_FLAGS": FLAGS, "RAG_JAX_CACHE": str(cache), "PYTHONPATH": path}


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


def call(cache, module, *flags, stdin="", devices=1, **values):
    """Exit code, stdout and stderr of the command in this process, on so many of the tests' eight devices.

    It saves the seconds of a start, and what was compiled before is there. What the command sets for its process is
    set back.
    """
    from rag_jax import cli
    from rag_jax.distributed import sharding

    main = importlib.import_module(f"rag_jax.{module}").main
    options = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in options}
    make_mesh, some = sharding.make_mesh, jax.devices()[:devices]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if cache is not None:
            patch.setenv("RAG_JAX_CACHE", str(cache))
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", words(module, *flags, **values)[2:])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)
        patch.setattr(sharding, "make_mesh", lambda *axes, **sizes: make_mesh(*axes, **{"devices": some} | sizes))
        try:
            with pytest.raises(SystemExit) as end:
                cli.run(main)
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
    return end.value.code, out.getvalue(), err.getvalue()


def run_here(cache, module, *flags, **options):
    """`run` in this process."""
    code, out, err = call(cache, module, *flags, **options)
    assert code == 0, err
    return out
