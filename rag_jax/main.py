"""Train: a config in, a workdir of checkpoints and metrics out. The same command again goes on where it stopped."""

import pathlib
import re

from rag_jax import cli, config, files, untrusted
from rag_jax.distributed import processes
from rag_jax.errors import UserError
from rag_jax.report import collect, write

# What a run writes into its workdir, beside config.json.
RECORDS = (
    "checkpoints", "metrics.jsonl", "tensorboard", "eval", "models", "failed", "inputs.json", "rows.json",
    "changed.json", "autotuned", "report.html",
)  # fmt: skip


def main() -> int:
    flags = cli.parser("main", __doc__)
    flags.add_argument("--config", required=True, metavar="FILE.py", help="file that defines get_config()")
    flags.add_argument("--workdir", type=cli.path, metavar="DIR", help="where the run is kept")
    flags.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="show what would be read and needed, and train nothing"
    )
    args, overrides = cli.parse(flags)
    if args.workdir is None and not args.dry_run:
        raise UserError("the following arguments are required: --workdir; see python -m rag_jax.main --help")
    workdir: pathlib.Path = args.workdir or pathlib.Path("DIR")  # of a dry run, which writes nothing
    run_config = config.load(args.config, overrides)
    changed = config.changes(args.config, run_config)
    config.require(run_config, "data.train")
    check_workdir(workdir)
    processes.start()
    processes.check_platform()
    if args.dry_run:
        from rag_jax.training import dry_run

        print(dry_run.dry_run(run_config, workdir), flush=True)
        return 0

    import jax  # here: it takes seconds to load, and everything above answers at once

    from rag_jax.training import loop

    ended_by = loop.train(run_config, workdir)
    if not ended_by and jax.process_index() == 0:  # who stops a run is not to wait
        files.write_json(workdir / "changed.json", {"file": pathlib.Path(args.config).name, "changed": changed})
        print(f"report     {report(workdir)}", flush=True)
    return 128 + ended_by if ended_by else 0  # as a shell tells of a signal


def report(workdir: pathlib.Path) -> str:
    """Where the run's report is, or why there is none: what was trained is not lost for it."""
    try:
        write.write(workdir / write.NAME, [collect.read(workdir)])
    except Exception as error:  # of files that others may have written
        return f"could not be written ({untrusted.one_line(error)})"
    return str(workdir / write.NAME)


def check_workdir(workdir: pathlib.Path) -> None:
    """UserError for a place where a run would mix with something else."""
    if re.match(r"\w+:/", str(workdir)):
        raise UserError(f"--workdir={workdir}: is no folder; mount the bucket and give the folder where it is mounted")
    if wild := re.search(r"[*?\[]", str(workdir.absolute())):
        raise UserError(
            f"--workdir={workdir}: checkpoints cannot be kept under a path with {wild[0]}, which Orbax takes for a "
            "wildcard; give another folder"
        )
    if not untrusted.is_unicode(str(workdir.absolute())):
        raise UserError(
            f"--workdir={workdir}: checkpoints cannot be kept under a path that is not UTF-8; give another folder, or "
            "set PYTHONUTF8=1 if it is"
        )
    there = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    if not there.is_dir():
        named = "" if there == workdir.absolute() else f"{there} "
        raise UserError(f"--workdir={workdir}: {named}is a file; give a folder")
    others = [name for name in RECORDS if (workdir / name).exists()]
    if (workdir / "config.json").is_file() and not config.is_of_run(workdir / "config.json"):
        raise UserError(f"--workdir={workdir}: holds a config.json of something else, not of a run; give a new folder")
    if others and not (workdir / "config.json").is_file():
        raise UserError(
            f"--workdir={workdir}: holds {', '.join(others)} but no config.json of a run; give a new folder"
        )


if __name__ == "__main__":
    cli.run(main)
