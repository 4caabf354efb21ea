"""Does training together help? One pair of models, every objective, from the same start with the same rows and steps.

    python -m benchmarks.objectives --rows=TRAIN.csv --held-out=EVAL.csv --models=quickstart/models --out=RUNS

Every objective, with random and with mined groups, and every seed is a run of `rag_jax.main` in a folder of its own
below --out, then evaluated: retrieval with all held-out rows, answers with `eval.rows` of them. All train on the rows
that a generator does not leave out, so those of one seed see the same batches. What is finished stays in --record and
is not run again: the command can be stopped and typed again. `--config.KEY=VALUE` goes to all.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
from typing import Any

import numpy as np

from rag_jax import config, data, quickstart
from rag_jax import pair as runs
from rag_jax.data import rows as row_files

ROOT = pathlib.Path(__file__).parent.parent
# What each row of the table trains. The first three never let the generator teach the retriever: they are what the
# others must beat.
OBJECTIVES = {
    "contrastive only": {"objective.name": "none"},
    "generator only": {"objective.name": "token", "objective.candidates": 1, "objective.contrastive_weight": 0.0},
    "both, apart": {"objective.name": "token", "objective.candidates": 1},
    "dalm": {"objective.name": "dalm"},
    "token": {"objective.name": "token"},
    "sequence": {"objective.name": "sequence"},
}
# The same with adapters on both models, which learn at higher rates, and with bases in fewer bits.
ADAPTERS = {f"{role}.lora.rank": 16 for role in ("retriever", "generator")} | {
    "optimizer.learning_rate": 5e-4,
    "optimizer.rate_rules": (("generator/", 2.0), (".*", 1.0)),
}
OBJECTIVES |= {
    "token, adapters": OBJECTIVES["token"] | ADAPTERS,
    **{
        f"token, adapters on {kind}": OBJECTIVES["token"]
        | ADAPTERS
        | {f"{role}.base_dtype": kind for role in ("retriever", "generator")}
        for kind in ("int8", "int4", "uint4")
    },
    "token, adapters, generator on uint4": OBJECTIVES["token"] | ADAPTERS | {"generator.base_dtype": "uint4"},
}
# Those to which it matters who is in a batch.
MINED = ("contrastive only", "both, apart", "token", "sequence")
UNTRAINED = {"name": "untrained", "mined": False, "seed": None}
COLUMNS = {
    "recall@1": "eval/recall@1",
    "MRR@10": "eval/mrr@10",
    "nDCG@10": "eval/ndcg@10",
    "NLL gold": "eval/answer_nll_gold",
    "NLL top-1": "eval/answer_nll_top1",
    "NLL": "eval/answer_nll",
    "EM": "eval/em",
    "F1": "eval/f1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "minilm_smollm2.py"))
    parser.add_argument("--rows", help="rows to train on; those of the config if not given")
    parser.add_argument("--held-out", help="rows to evaluate on, of other passages")
    parser.add_argument("--models", type=pathlib.Path, help="a folder with minilm and smollm2-135m")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the runs are kept")
    parser.add_argument(
        "--record", type=pathlib.Path, help="a line for each measured pair; OUT/measured.jsonl if not given"
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), help="some of them")
    parser.add_argument("--mined", action="store_true", help="with mined groups alone")
    args, more = parser.parse_known_args()
    record = Record(args.record or args.out / "measured.jsonl", {"steps": args.steps, "config": more})
    args.rows = read_by_all(args, more)
    points = [(name, mined) for name in args.only for mined in groupings(name) if mined or not args.mined]
    for seed in args.seeds:
        for name, mined in points:
            which = {"name": name, "mined": mined, "seed": seed}
            if record.of(**which) is None:
                record.add(run(args, more, name, mined, seed), **which)
    if record.of(**UNTRAINED) is None:
        record.add(measure(args, more, None), **UNTRAINED)
    print(table(args, points, record))


def groupings(name: str) -> tuple[bool, ...]:
    """Whether groups are mined, of each line of an objective."""
    if "adapters" in name:
        return (True,)
    return (False, True) if name in MINED else (False,)


class Record:
    """What was measured, a line of JSON each: of which pair, under which settings, and the figures."""

    def __init__(self, path: pathlib.Path, settings: dict):
        self.path, self.settings = path, settings
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.lines = [json.loads(line) for line in lines]
        for line in self.lines:
            if line["settings"] != settings:
                raise SystemExit(
                    f"--record={path}: was measured under {line['settings']}, not {settings}; name another"
                )

    def of(self, **which: Any) -> dict | None:
        return next((line["measured"] for line in self.lines if which.items() <= line.items()), None)

    def add(self, measured: dict, **which: Any) -> None:
        line = which | {"settings": self.settings, "measured": measured}
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def words(args: argparse.Namespace, values: dict | None = None) -> list[str]:
    """What all runs have in common, and `values`, as words of a command."""
    given = {"data.train": args.rows, "data.eval": args.held_out}
    if args.models:
        given |= {"retriever.path": args.models / "minilm", "generator.path": args.models / "smollm2-135m"}
    return [f"--config.{key}={value}" for key, value in (given | (values or {})).items() if value is not None]


def read_by_all(args: argparse.Namespace, more: list[str]) -> pathlib.Path:
    """A file below --out with the rows that are left where answers are read: none empty, and none too long."""
    flags = dict(word.removeprefix("--config.").split("=", 1) for word in [*words(args), *more])
    opened = runs.open_pair(config.load(args.config, flags))
    assert opened.prompt is not None
    columns = opened.config.data.columns.to_dict()
    rows = data.read_rows(opened.config.data.train, "--rows", columns)
    rows = rows.take(row_files.empty_fields(rows, ("passage", "answer"))[0])
    answers = data.answer_segments(opened.prompt, rows.answers)
    rows = rows.take(np.flatnonzero(answers.lengths <= opened.config.data.answer_len))
    path = args.out / "rows.csv"
    args.out.mkdir(parents=True, exist_ok=True)
    names = [columns[part] for part in ("query", "passage", "answer")]
    quickstart.write_csv(path, names, zip(rows.queries, (own for own, *_ in rows.passages), rows.answers, strict=True))
    return path


def run(args: argparse.Namespace, more: list[str], name: str, mined: bool, seed: int) -> dict:
    """Trains a pair and measures it; its checkpoints, gigabytes, are then removed."""
    workdir = args.out / f"{name.replace(', ', ' ').replace(' ', '_')}{'_mined' if mined else ''}_{seed}"
    values = {
        "total_steps": args.steps,
        "seed": seed,
        "eval.every_steps": 0,
        "checkpoint.every_steps": 20,
        "checkpoint.keep": 1,
        "mining.every_steps": -(-args.steps // 3) if mined else 0,
    } | OBJECTIVES[name]
    print(workdir.name, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "rag_jax.main", f"--config={args.config}", f"--workdir={workdir}"]
    # What tells the rows of the table apart comes last and so overrides what goes to all.
    given = [*words(args), *more, *(f"--config.{key}={value}" for key, value in values.items())]
    process = subprocess.Popen([*command, *given], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{workdir.name}: training ended with {os.waitstatus_to_exitcode(status)}")
    exported = workdir / "exported"
    shutil.rmtree(exported, ignore_errors=True)  # of an evaluation that was stopped; an export overwrites nothing
    command = [sys.executable, "-m", "rag_jax.export", f"--workdir={workdir}", f"--out={exported}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    measured = measure(args, more, exported) | minings(workdir) | {"peak bytes": used.ru_maxrss * 1024}
    shutil.rmtree(exported)
    shutil.rmtree(workdir / "checkpoints")
    return measured


def measure(args: argparse.Namespace, more: list[str], exported: pathlib.Path | None) -> dict:
    """Retrieval with all held-out rows, answers with `eval.rows` of them; of an exported pair or the untrained one."""
    paths = {f"{role}.path": exported / role for role in ("retriever", "generator")} if exported else {}
    common = [f"--config={args.config}", *words(args, paths), *more]
    alone = {"eval.rows": 0, "generator.path": "None", "objective.name": "none"}
    answers = evaluate(common)
    retrieval = evaluate([*common, *(f"--config.{key}={value}" for key, value in alone.items())])
    counts = answers["counts"] | {"queries, retrieval": retrieval["counts"]["queries"]}
    return answers | retrieval | {"counts": counts}


def evaluate(command_words: list[str]) -> dict:
    """The figures that `rag_jax.evaluate` prints, and what they are of."""
    command = [sys.executable, "-m", "rag_jax.evaluate", "--json", *command_words]
    printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(printed.splitlines()[-1])
    return {key: value for key, value in found.items() if key.startswith("eval/")} | {"counts": found["counts"]}


def minings(workdir: pathlib.Path) -> dict:
    """How hard the mined groups were beside random ones, at the first mining and at the last."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    mined = [line for line in lines if "mining/not_first" in line]
    names = {"groups": "mining/not_first", "random groups": "mining/random_not_first"}
    ends = {"first": mined[0], "last": mined[-1]} if mined else {}
    return {f"{groups}, {end}": line[key] for end, line in ends.items() for groups, key in names.items()}


def table(args: argparse.Namespace, points: list[tuple[str, bool]], record: Record) -> str:
    untrained = record.of(**UNTRAINED)
    assert untrained is not None
    counts = untrained["counts"]
    lines = [
        f"{args.steps} steps, {len(args.seeds)} seed(s) (mean, and ± half of the spread); retrieval: "
        f"{counts['queries, retrieval']:,} held-out queries, {counts['passages']:,} passages; "
        f"answers: {counts['queries']:,} queries, EM and F1 of {counts['answers']:,}",
        f"{'':<32}" + "".join(f"{column:>16}" for column in COLUMNS),
        row("untrained", [untrained]),
    ]
    for name, mined in points:
        found = [record.of(name=name, mined=mined, seed=seed) for seed in args.seeds]
        lines.append(row(name + (", mined groups" if mined else ""), [one for one in found if one is not None]))
    hardest = [line["measured"] for line in record.lines if "groups, first" in line["measured"]]
    if hardest:
        lines.append("share of rows whose own passage is not the nearest of its group, all mined runs:")
        for end in ("first", "last"):
            mined, by_chance = (
                statistics.mean(one[f"{groups}, {end}"] for one in hardest) for groups in ("groups", "random groups")
            )
            lines.append(f"  at the {end} mining: {mined:.3f} of mined groups, {by_chance:.3f} of random ones")
    return "\n".join(lines)


def row(name: str, found: list[dict]) -> str:
    cells = []
    for metric in COLUMNS.values():
        values = [record[metric] for record in found if metric in record]
        spread = (max(values) - min(values)) / 2 if values else 0.0
        shown = f"{statistics.mean(values):.3f}" + (f" ±{spread:.3f}" if len(values) > 1 else "") if values else "-"
        cells.append(f"{shown:>16}")
    return f"{name:<32}" + "".join(cells)


if __name__ == "__main__":
    main()
