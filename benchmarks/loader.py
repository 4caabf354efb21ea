"""The loader: seconds to tokenised rows, rows a second into the step, and the share of time that a run waits for them.

python -m benchmarks.loader --rows=ROWS.csv --models=quickstart/models
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "minilm_smollm2.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", required=True, help="a CSV with Question, Abstract, Answer")
    parser.add_argument("--models", type=pathlib.Path, required=True, help="a folder with minilm and smollm2-135m")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batches", type=int, default=500)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["RAG_JAX_CACHE"] = f"{scratch}/cache"
        values = {
            "data.train": args.rows,
            "data.eval": None,
            "retriever.path": str(args.models / "minilm"),
            "generator.path": str(args.models / "smollm2-135m"),
            "total_steps": args.steps,
            "eval.every_steps": 0,
            "checkpoint.every_steps": 0,
            "log.every_steps": 1,
        }
        loading(values, args.batches)
        waiting(values, pathlib.Path(scratch) / "run")


def loading(values: dict, num_batches: int) -> None:
    from rag_jax import config, data, pair

    opened = pair.open_pair(config.load(CONFIG, values))
    section = opened.config.data

    def load() -> tuple[data.Examples, float]:
        began = time.perf_counter()
        examples, _ = data.load_examples(
            section.train,
            key="--rows",
            columns=section.columns.to_dict(),
            bad_rows=section.bad_rows,
            retriever=opened.retriever_text,
            prompt=opened.prompt,
        )
        return examples, time.perf_counter() - began

    examples, first = load()
    again = load()[1]
    print(f"{len(examples):,} rows tokenised: {first:.2f} s the first time, {again:.2f} s from the cache")
    batch_size, group_size = opened.config.batch_size, opened.config.group_size
    candidates = opened.config.objective.candidates
    all_groups = batch_size // group_size
    for read, blocks in {
        "rows padded, as on TPUs": None,
        "packed, a group at a time": data.Blocks(group_size),
        "packed, all groups together": data.Blocks(group_size, groups_at_a_time=all_groups),
    }.items():
        shapes = data.buckets(examples, batch_size, candidates, blocks=blocks)
        batches = data.iterate(
            examples,
            data.Batching(shapes, group_size, blocks=blocks),
            batch_size=batch_size,
            seed=0,
            start_step=0,
            total_steps=num_batches,
        )
        began, shares, met = time.perf_counter(), [], set()
        for batch in batches:
            shares.append(data.padding_share(batch, candidates))
            met.add(data.lengths(batch))
        rate = num_batches * batch_size / (time.perf_counter() - began)
        print(
            f"{read + ':':<42}{rate:>8,.0f} rows a second in batches of {batch_size}; "
            f"{sum(shares) / len(shares):.1%} of tokens padding; shapes that are compiled: {len(met)}"
        )


def waiting(values: dict, workdir: pathlib.Path) -> None:
    """A real run's own record, its first step left out."""
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    command = [sys.executable, "-m", "rag_jax.main", f"--config={CONFIG}", f"--workdir={workdir}", *flags]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][1:]
    step_s, wait_s = (sum(line[name] for line in lines) for name in ("time/step_s", "time/data_wait_s"))
    print(f"{wait_s / step_s:.3%} of {step_s / len(lines):.2f} s a step spent waiting for data")


if __name__ == "__main__":
    main()
