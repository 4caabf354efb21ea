"""What questions that a model writes from passages teach a retriever, and what it is worth to keep those that hold.

    python -m rag_jax.prepare --documents=STORIES --out=PREPARED --config=configs/minilm_smollm2.py --questions=2
    python -m benchmarks.questions --prepared=PREPARED --held-out=EVAL.csv --models=quickstart/models --out=RUNS

The retriever is trained on the same number of steps of each choice of questions, in mined groups, and measured with all
held-out rows, which people wrote. What is finished stays in --record. `--config.KEY=VALUE` goes to all.
"""

import argparse
import pathlib

import pyarrow.parquet

from benchmarks.labels import ALL, LABELS, METRICS, measure, train_and_measure
from benchmarks.objectives import ROOT, Record
from rag_jax.documents import build

NOT_FOUND, NOT_LIKELIER = "whose passage is not among", "whose answer is no likelier"
# Which questions are trained on: those that are kept, and those that were dropped for such reasons.
CHOICES = {
    "what holds": (),
    "no answer checked": (NOT_LIKELIER,),
    "no passage sought": (NOT_FOUND,),
    "all of the form": (NOT_FOUND, NOT_LIKELIER),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "minilm_smollm2.py"))
    parser.add_argument("--prepared", type=pathlib.Path, required=True, help="what rag_jax.prepare has written")
    parser.add_argument("--held-out", type=pathlib.Path, required=True, help="rows to evaluate on, of other passages")
    parser.add_argument("--models", type=pathlib.Path, required=True, help="a folder with minilm")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the runs are kept")
    parser.add_argument("--record", type=pathlib.Path, help="OUT/measured.jsonl if not given")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    args, more = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record = Record(args.record or args.out / "measured.jsonl", {"steps": args.steps, "config": more})
    questions = pyarrow.parquet.read_table(args.prepared / build.QUESTIONS).to_pylist()
    if record.of(name="untrained") is None:
        record.add(measure(args, args.models / "minilm"), name="untrained")
    lines = {"untrained": [record.of(name="untrained")]}
    for name in args.only:
        chosen = [one for one in questions if not one["dropped"] or one["dropped"].startswith(CHOICES[name] or ("\0",))]
        for seed in args.seeds:
            which = {"name": name, "seed": seed, "rows": len(chosen)}
            if record.of(**which) is None:
                record.add(run(args, more, name, chosen, seed), **which)
            lines.setdefault(f"{name}, {len(chosen):,} questions", []).append(record.of(**which))
    print(f"{len(questions):,} questions written; {args.steps} steps of 8; seeds {args.seeds}")
    print(f"{'':<36}" + "".join(f"{metric:>12}" for metric in METRICS))
    for name, measured in lines.items():
        means = (sum(one[key] for one in measured) / len(measured) for key in METRICS.values())
        print(f"{name:<36}" + "".join(f"{mean:>12.3f}" for mean in means))


def run(args: argparse.Namespace, more: list[str], name: str, chosen: list[dict], seed: int) -> dict:
    """Trains the retriever on these questions and measures it; the run's checkpoints are then removed."""
    folder = "".join(c if c.isalnum() else "_" for c in name)
    workdir, rows = args.out / f"{folder}_{args.steps}_{seed}", args.out / f"{folder}.parquet"
    table = pyarrow.Table.from_pylist([{key: one[key] for key in ("question", "passage", "answer")} for one in chosen])
    pyarrow.parquet.write_table(table, rows)
    values = (ALL | LABELS) | {
        "data.train": rows, "data.eval": None, "retriever.path": args.models / "minilm", "total_steps": args.steps,
        "seed": seed, "mining.every_steps": args.steps,
    }  # fmt: skip
    return train_and_measure(args, more, values, workdir)


if __name__ == "__main__":
    main()
