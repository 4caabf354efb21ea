"""End-to-end training of retrieval-augmented generation in JAX.

`load_config`, `train` and `load` are the interface from Python; see docs/python.md. Importing this loads nothing else:
every function imports what it needs, so that a program may still choose its devices.
"""

import os
import pathlib
import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_jax.errors import UserError
    from rag_jax.inference.trained import Trained

__version__ = "0.1.0"
__all__ = ["UserError", "load", "load_config", "train"]


def __getattr__(name: str) -> Any:
    if name == "UserError":
        from rag_jax.errors import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_config(file: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Any:
    """The checked config of a file that defines `get_config()`, with `{"dotted.key": value}` on top.

    UserError, one line with all problems, for a file that cannot be used, an unknown key or an unusable value.
    """
    from rag_jax import config

    return config.load(pathlib.Path(file), overrides)


def train(config: Any, workdir: str | os.PathLike[str]) -> None:
    """Train in a folder, or go on with the run that is there: what `python -m rag_jax.main` does.

    UserError for what the config, its files or the machine make impossible. A signal to stop is raised again after the
    step is finished and saved: KeyboardInterrupt for Ctrl-C, else SystemExit. Call it from the main thread.
    """
    from rag_jax import config as configs
    from rag_jax import main
    from rag_jax.distributed import processes

    configs.check(config)
    configs.require(config, "data.train")
    main.check_workdir(pathlib.Path(workdir))
    import jax

    if not jax.distributed.is_initialized():
        processes.start()
    from rag_jax.training import loop

    ended_by = loop.train(config, pathlib.Path(workdir))
    if ended_by:
        raise KeyboardInterrupt if ended_by == signal.SIGINT else SystemExit(128 + ended_by)


def load(folder: str | os.PathLike[str], step: int | str | None = None, config: Any = None) -> "Trained":
    """The pair of a run's folder, at `step` (a number, "best" or "latest"), or of a folder that `export` wrote.

    An export is read by the config that it holds, or by `config` in its place. UserError for a folder that is neither.
    """
    from rag_jax import config as configs
    from rag_jax import pair
    from rag_jax.distributed import compile_cache
    from rag_jax.errors import UserError
    from rag_jax.inference.trained import Trained
    from rag_jax.objectives import ROLES
    from rag_jax.training import setup

    folder = pathlib.Path(folder)
    exported = {f"{role}.path": str(folder / role) for role in ROLES if (folder / role).is_dir()}
    if not exported and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds neither a run nor an export; give the folder of one")
    if exported and step is not None:
        raise UserError(f"step={step}: an export has no steps; leave it out, or give the folder of the run")
    if exported and config is None and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no config.json; give config=, the config of its run")
    if not exported and config is not None:
        raise UserError(f"config=...: {folder} is a run, which has a config of its own; leave it out")
    compile_cache.keep_compiled()
    loaded = configs.load_workdir(folder) if config is None else config
    if exported:
        opened = pair.open_pair(configs.build(configs.flat(loaded), exported))
        return Trained(opened, pair.pretrained_params(opened), 0)
    opened = pair.open_pair(loaded, folder)
    found, params = setup.saved_params(opened, folder, step)
    return Trained(opened, params, found)
