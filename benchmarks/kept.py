"""A step on evidence that is kept or read anew, beside one of the retriever alone with the same passages.

    python -m benchmarks.kept --rows=TRAIN.csv --models=quickstart/models

Every run is one of `rag_jax.main` with a folder of its own, in turns; medians of the steps after the first few.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from benchmarks.labels import ALL, EVIDENCE, LABELS, read
from benchmarks.objectives import ROOT

RUNS = {
    "the retriever alone": LABELS | {"objective.negatives": 4, "objective.candidates": 1, "mining.margin": "None"},
    "on kept evidence": EVIDENCE,
    "reading the evidence": EVIDENCE | {"objective.kept_evidence": "never"},
}
LEFT_OUT = 4  # steps, of compilation and of the first blocks of data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "minilm_smollm2.py"))
    parser.add_argument("--rows", type=pathlib.Path, required=True, help="labelled rows, a CSV file")
    parser.add_argument("--models", type=pathlib.Path, required=True, help="a folder with minilm and smollm2-135m")
    parser.add_argument("--num-rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    args, more = parser.parse_known_args()
    measured: dict[str, list[float]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as scratch:
        rows = pathlib.Path(scratch) / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in read(args.rows)[: args.num_rows]))
        for turn in range(args.rounds):
            for name, values in RUNS.items():
                workdir = pathlib.Path(scratch) / f"{name} {turn}".replace(" ", "_")
                steps = 8 if name == "reading the evidence" else args.steps
                measured[name].append(median(args, more, values, rows, workdir, steps))
    alone = statistics.median(measured["the retriever alone"])
    print(f"{args.num_rows} rows, 8 queries and 40 passages a step; medians of {args.rounds} runs")
    print(f"{'':<24}{'seconds a step':>16}{'to the first':>14}")
    for name, seconds in measured.items():
        print(f"{name:<24}{statistics.median(seconds):>16.2f}{statistics.median(seconds) / alone:>14.2f}")


def median(
    args: argparse.Namespace, more: list[str], values: dict, rows: pathlib.Path, workdir: pathlib.Path, steps: int
) -> float:
    """Seconds a step of a run, by its own record."""
    values = ALL | {
        "data.train": rows, "data.eval": None, "retriever.path": args.models / "minilm",
        "generator.path": args.models / "smollm2-135m", "total_steps": steps, "mining.every_steps": steps,
        "log.every_steps": 1, "checkpoint.every_steps": 0,
    } | values  # fmt: skip
    words = [f"--config.{key}={value}" for key, value in values.items()]
    command = [sys.executable, "-m", "rag_jax.main", f"--config={args.config}", f"--workdir={workdir}", *words, *more]
    environment = os.environ | {"RAG_JAX_CACHE": str(workdir.parent / "cache")}
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=environment)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["time/step_s"] for line in lines[LEFT_OUT:])


if __name__ == "__main__":
    main()
