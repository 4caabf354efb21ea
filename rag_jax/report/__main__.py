"""The report of a run, or of several side by side: one HTML page that opens from disk.

python -m rag_jax.report --workdir=DIR [--compare=DIR ...] [--out=FILE.html]
python -m rag_jax.report --workdir=DIR [--compare=DIR ...] --table=markdown|latex
"""

import pathlib

from rag_jax import cli
from rag_jax.errors import UserError
from rag_jax.report import collect, tables, write


def main() -> None:
    flags = cli.parser("report", __doc__)
    flags.add_argument("--workdir", type=cli.path, required=True, metavar="DIR", help="the run")
    flags.add_argument("--compare", type=cli.path, nargs="+", default=[], metavar="DIR", help="further runs beside it")
    flags.add_argument("--out", type=cli.path, metavar="FILE.html", help="the page; DIR/report.html if not given")
    flags.add_argument("--table", choices=("markdown", "latex"), help="print the table of metrics, and write no page")
    args, overrides = cli.parse(flags)
    if overrides:
        raise UserError(f"--config.{next(iter(overrides))}: a report is of a run as it was; leave it out")
    runs = [collect.read(workdir) for workdir in (args.workdir, *args.compare)]
    if args.table is not None:
        print(tables.markdown(runs) if args.table == "markdown" else tables.latex(runs))
        return
    path: pathlib.Path = args.out or args.workdir / write.NAME
    if args.out is not None and path.exists() and not write.is_report(path):
        raise UserError(f"--out={path}: is there already and is no report; give another name")
    write.write(path, runs)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    cli.run(main)
