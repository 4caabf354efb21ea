"""Does training together help? One pair of models, every objective, from the same start with the same rows and steps.

    python -m benchmarks.objectives --rows=TRAIN.csv --held-out=EVAL.csv --models=quickstart/models --out=RUNS

Every objective, with random and with mined groups, and every seed is a run of `rag_jax.main` in a folder of its own
below --out, then one of `rag_jax.evaluate`; what is finished stays, so the command can be stopped and typed again.
`--config.KEY=VALUE` goes to all.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys

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
# With one candidate nothing but the contrastive loss looks at groups, and it looks at the whole batch.
MINED = ("contrastive only", "token", "sequence")
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
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), help="some of them")
    args, more = parser.parse_known_args()
    points = [(name, mined) for name in args.only for mined in (False, *([True] if name in MINED else []))]
    results: dict[tuple[str, bool], list[dict]] = {point: [] for point in points}
    for seed in range(args.seeds):
        for point in points:
            results[point].append(run(args, more, *point, seed))
    untrained = evaluate(args, [f"--config={args.config}", *words(args), *more], args.out / "untrained.json")
    print(table(args, untrained, results))


def words(args: argparse.Namespace, values: dict | None = None) -> list[str]:
    """What all runs have in common, and `values`, as words of a command."""
    given = {"data.train": args.rows, "data.eval": args.held_out}
    if args.models:
        given |= {"retriever.path": args.models / "minilm", "generator.path": args.models / "smollm2-135m"}
    return [f"--config.{key}={value}" for key, value in (given | (values or {})).items() if value is not None]


def run(args: argparse.Namespace, more: list[str], name: str, mined: bool, seed: int) -> dict:
    """What is measured after the last step of a run, which is made unless it is there."""
    workdir = args.out / f"{name.replace(', ', ' ').replace(' ', '_')}{'_mined' if mined else ''}_{seed}"
    values = {
        "total_steps": args.steps,
        "seed": seed,
        "eval.every_steps": 0,
        "checkpoint.every_steps": 25,
        "checkpoint.keep": 1,
        "mining.every_steps": -(-args.steps // 3) if mined else 0,
    } | OBJECTIVES[name]
    record = workdir / "measured.json"
    if not record.is_file():
        print(workdir.name, file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "rag_jax.main", f"--config={args.config}", f"--workdir={workdir}"]
        subprocess.run([*command, *words(args, values), *more], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    measured = evaluate(args, [f"--workdir={workdir}"], record)
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)  # gigabytes a run
    return measured


def evaluate(args: argparse.Namespace, which: list[str], record: pathlib.Path) -> dict:
    """What `rag_jax.evaluate` prints, kept in `record`."""
    if not record.is_file():
        command = [sys.executable, "-m", "rag_jax.evaluate", "--json", *which]
        printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(printed.splitlines()[-1] + "\n", encoding="utf-8")
    return json.loads(record.read_text(encoding="utf-8"))


def table(args: argparse.Namespace, untrained: dict, results: dict[tuple[str, bool], list[dict]]) -> str:
    counts = untrained["counts"]
    lines = [
        f"{args.steps} steps, {args.seeds} seeds (mean, and ± half of the spread), "
        f"{counts['queries']:,} held-out queries, {counts['passages']:,} passages",
        f"{'':<32}" + "".join(f"{column:>16}" for column in COLUMNS),
    ]
    lines.append(row("untrained", [untrained]))
    lines += [row(name + (", mined groups" if mined else ""), found) for (name, mined), found in results.items()]
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
