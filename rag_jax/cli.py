"""What all commands share: flags, overrides of config keys, one-line errors, quiet third parties."""

import argparse
import errno
import io
import itertools
import logging
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_args

from rag_jax import config, untrusted
from rag_jax.errors import UserError
from rag_jax.objectives import ROLES

# For libraries that read them when they are imported.
ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA's notes; warnings from 2 on are hidden, errors never
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # "PyTorch was not found"
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",  # of a GPU's memory; jax takes three quarters
}


def prepare_environment() -> None:
    """Settings of other libraries, those of the user kept; before jax, transformers and datasets are imported."""
    threads = threads_for(os.environ.get("XLA_FLAGS", ""))
    for name, value in (ENVIRONMENT | ({"NPROC": threads} if threads else {})).items():
        os.environ.setdefault(name, value)


def threads_for(xla_flags: str) -> str | None:
    """How many threads XLA must have for the CPU devices that its flags make; None where they make no more than one.

    Each device waits in threads of a common pool for the exchanges of the others: one that launches a program and one
    that runs one. XLA makes a thread a device, so with some 32 programs under way all wait for one that finds none.
    """
    counts = re.findall(r"--xla_force_host_platform_device_count=(\d+)", xla_flags)
    return str(4 * int(counts[-1])) if counts and int(counts[-1]) > 1 else None


PREFIX = "--config."


def path(text: str) -> pathlib.Path:
    """A flag's path. A shell leaves the ~ of --workdir=~/run as it is; UserError where nobody's home is meant."""
    return untrusted.path(text, text) if text.startswith("~") else pathlib.Path(text)


# Errors of a path that the user gave: not bugs of ours.
FOR_THE_USER = (
    errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC,
    errno.EDQUOT,
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parser(command: str, doc: str | None) -> Parser:
    """A parser for `python -m rag_jax.COMMAND`; its help ends with all config keys."""
    keys = "\n".join(f"  {name:<34}{key.meaning} ({_kind(key.kind)})" for name, key in config.KEYS.items())
    return Parser(
        prog=f"python -m rag_jax.{command}",
        description=doc,
        epilog=f"config keys, each given as --config.KEY=VALUE:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse(flags: Parser, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags, and `{config key: text}` from every `--config.KEY=VALUE` or `--config.KEY VALUE`."""
    rest, overrides = [], {}
    words = iter(sys.argv[1:] if argv is None else argv)
    for word in words:
        if not word.startswith(PREFIX):
            rest.append(word)
            continue
        name, equals, value = word.removeprefix(PREFIX).partition("=")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise UserError(f"{word}: needs a value, {word}=VALUE")
        overrides[name] = value
    return flags.parse_args(rest), overrides


def add_choice_of_models(flags: argparse.ArgumentParser) -> None:
    """The flags that `chosen_config` reads."""
    flags.add_argument("--workdir", type=path, metavar="DIR", help="a run, with the config saved in it")
    flags.add_argument("--step", metavar="N|best|latest", help="which of its checkpoints; the latest if not given")
    flags.add_argument("--config", metavar="FILE.py", help="the models that a config names, untrained")
    flags.add_argument("--models", type=path, metavar="DIR", help="in their place, those of an export")


def chosen_config(args: argparse.Namespace, overrides: dict[str, str]) -> Any:
    """The config of a run's workdir, or of a file, whose models an export may take the place of."""
    if args.workdir is not None and args.config is None:
        if args.models is not None:
            raise UserError(
                f"--models={args.models}: goes with --config, which says how they read; leave --workdir out"
            )
        return config.load_workdir(args.workdir, overrides)
    if args.config is None or args.workdir is not None:
        raise UserError("give either --workdir=DIR (a run) or --config=FILE.py (the untrained models)")
    if args.step is not None:
        raise UserError(f"--step={args.step}: goes with --workdir; the models of --config are untrained")
    if args.models is not None:
        overrides = _exported_paths(args.models) | overrides
    return config.load(args.config, overrides)


def corpus(passages: str | None, loaded: Any) -> tuple[tuple[str, ...], dict[str, str]]:
    """The distinct passages of --passages, or else of all files that the config names; and where they come from."""
    from rag_jax import data

    sources = {"--passages": passages}
    if passages is None:
        sources = {f"data.{name}": loaded.data[name] for name in ("train", "eval", "passages")}
    column = loaded.data.columns.passage
    texts, come_from = [], {}
    for key, source in sources.items():
        if source is not None:  # rows that name no passage may have no column of them either
            may_miss = key != "data.passages" and sources.get("data.passages") is not None
            columns = data.columns_of(loaded.data, "data.passages" if key == "--passages" else key)
            texts.append(data.read_passages(source, columns, key, may_miss=may_miss))
            come_from |= data.read_sources(source, columns, key)
    found = tuple(dict.fromkeys(itertools.chain(*texts)))
    if not found:
        given = f"--passages={passages!r} has none in column {column!r}" if texts else "--passages=FILE is not given"
        raise UserError(f"there are no passages: {given}")
    return found, come_from


def check_out(out: pathlib.Path) -> None:
    """UserError unless `out` is a new or an empty folder."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out}: is a file; give a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out={out}: is not empty; give a new folder")


def check_rerank(number: int, loaded: Any) -> None:
    """UserError for a --rerank that cannot be done."""
    if number < 0:
        raise UserError(f"--rerank={number}: must be at least 0")
    for role in ROLES if number else ():
        if loaded[role].path is None:
            raise UserError(f"--rerank={number}: takes a retriever and a generator, and {role}.path=None")


def _exported_paths(folder: pathlib.Path) -> dict[str, str]:
    """The config keys that name the models which `rag_jax.export` wrote to a folder."""
    found = {f"{role}.path": str(folder / role) for role in ROLES if (folder / role).is_dir()}
    if not found:
        raise UserError(f"--models={folder}: holds neither retriever nor generator; give a folder of rag_jax.export")
    return found


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command: exit with what it returns, 2 and one line for what the user can fix, 130 when interrupted.

    `main` imports what loads jax, so that the environment is prepared by then.
    """
    prepare_environment()
    quiet()
    try:
        code = main() or 0
    except UserError as error:
        print(f"rag_jax: error: {untrusted.shown(str(error))}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.errno not in FOR_THE_USER or (error.filename is None and not full):
            raise
        where = f"{error.filename}: " if error.filename else ""
        reason = f"{where}{error.strerror}; give another path or fix it"
        print(f"rag_jax: error: {untrusted.shown(reason)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("rag_jax: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code)


def quiet() -> None:
    """Hide warnings that libraries mean for their own developers; errors stay, and so does what `python -W` asks for.

    What a stream cannot show, such as a file name that is not UTF-8, is printed as escapes.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    # What goes wrong in Orbax is raised as well, and then reported in one line.
    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    # After a failed save, an event loop reports once more for each array.
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in str(record.msg))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.unraisablehook = _unraisable
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _unraisable(about: Any) -> None:
    """After a failed save, tensorstore reports to a closed event loop, once for each array."""
    if "Event loop is closed" not in str(about.exc_value):
        sys.__unraisablehook__(about)


def _kind(kind: Any) -> str:
    names = [getattr(option, "__name__", str(option)) for option in get_args(kind) or (kind,)]
    return "rules" if kind is config.Rules else " or ".join(names).replace("NoneType", "None")
