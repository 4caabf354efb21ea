"""What evidence is worth where labels are missing, coarse, few or wrong: the same rows with their labels taken away.

    python -m benchmarks.labels --rows=TRAIN.csv --held-out=EVAL.csv --models=quickstart/models --out=RUNS

Every line of the table is a run of `rag_jax.main` for each seed and number of steps, in a folder of its own below
--out, whose retriever is then measured with all held-out rows. Readers are frozen, so what they say of a query and a
passage is computed once for all runs; it is kept in $RAG_JAX_CACHE, and in --evidence for other machines: hours of it
are a few hundred kilobytes. What is finished stays in --record and is not run again: the command can be stopped and
typed again. `--config.KEY=VALUE` goes to all.
"""

import argparse
import csv
import dataclasses
import functools
import json
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable

from benchmarks.objectives import ROOT, Record, evaluate
from rag_jax import config, files, pair
from rag_jax.inference.trained import Trained

Row = dict[str, str]
FROZEN = (("generator/", 0.0), (".*", 1.0))
ALL = {
    "batch_size": 8, "group_size": 8, "data.query_len": 32, "data.passage_len": 256, "data.prompt_passage_len": 256,
    "data.prompt_query_len": 32, "data.answer_len": 24, "optimizer.learning_rate": 5e-5, "checkpoint.every_steps": 20,
    "checkpoint.keep": 1, "eval.every_steps": 0,
}  # fmt: skip
LABELS = {"objective.name": "none", "generator.path": "None"}
EVIDENCE = {
    "objective.name": "pdist", "objective.evidence": "both", "objective.evidence_temperature": 0.1,
    "objective.candidates": 8, "objective.negatives": 4,
    "objective.candidates_from": "row", "objective.marginal_weight": 0, "optimizer.rate_rules": FROZEN,
    "mining.margin": "None",
}  # fmt: skip
# Where no row has a label the contrastive loss has no term. A softmax of the temperature that the loss for labels has.
ALONE = EVIDENCE | {"objective.contrastive_weight": 0, "objective.marginal_temperature": 0.05}
# The contrastive loss is a mean over the rows that have a label: it gets as much weight as they have among all.
FEW = EVIDENCE | {"objective.label_share": 0.5, "objective.marginal_temperature": 0.05}
DOCUMENT = ALONE | {"objective.document_weight": 1}
# The generator learns as well, from its candidates' marginal: nothing is kept of what it says, and four are read.
JOINT = ALONE | {
    "objective.candidates": 4, "objective.negatives": 2, "objective.marginal_weight": 1,
    "optimizer.rate_rules": ((".*", 1.0),), "data.prompt_passage_len": 160,
}  # fmt: skip
# The generator alone learns, from the two passages that a retriever likes best which has learnt before it.
THEN = {
    "objective.name": "token", "objective.candidates": 2, "objective.negatives": 1, "objective.candidates_from": "row",
    "objective.contrastive_weight": 0, "objective.marginal_weight": 1,
    "optimizer.rate_rules": (("retriever/", 0.0), (".*", 1.0)), "data.prompt_passage_len": 160, "mining.margin": "None",
}  # fmt: skip
# As `benchmarks.objectives` measures answers, so that its tables and this one can be compared.
ANSWERS = {
    "data.prompt_passage_len": 160, "objective.name": "token", "objective.candidates": 4, "eval.rows": 240,
    "eval.answers": 100,
}  # fmt: skip
# On the retriever; they learn at a higher rate.
ADAPTERS = {"retriever.lora.rank": 16, "optimizer.learning_rate": 5e-4}


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table: what becomes of the rows' labels, and what trains from them."""

    rows: str  # what becomes of them, a method of Labels
    values: dict
    share: float = 1.0  # of the rows, that are changed
    mined: bool = True
    after: str = ""  # the line whose retriever it begins with

    @property
    def answers(self) -> bool:
        """Whether the generator changes, so that its answers are measured too."""
        return self.values.get("objective.marginal_weight", 0) > 0


LINES = {
    "labels, random groups": Line("labelled", LABELS, mined=False),
    "labels, mined groups": Line("labelled", LABELS),
    "labels, mined groups, adapters": Line("labelled", LABELS | ADAPTERS),
    "document: a random section as label": Line("random_section", LABELS),
    "document: the nearest section as label": Line("nearest_section", LABELS),
    "document: all sections as labels": Line("all_sections", LABELS | {"objective.negatives": 7}),
    "document: pdist": Line("document_alone", DOCUMENT),
    "document: pdist, twice the rate": Line("document_alone", DOCUMENT | {"optimizer.learning_rate": 1e-4}),
    "document: pdist, adapters": Line("document_alone", DOCUMENT | ADAPTERS),
    "document: pdist, its own sections alone": Line("document_alone", ALONE),
    "document: emdr2": Line("document_alone", DOCUMENT | {"objective.name": "emdr2"}),
    "document: pdist, answer": Line("document_alone", DOCUMENT | {"objective.evidence": "answer"}),
    "nothing: pdist": Line("nothing", ALONE),
    "nothing: pdist, adapters": Line("nothing", ALONE | ADAPTERS),
    "nothing: pdist, adapters, found anew after 30 steps": Line(
        "nothing", ALONE | ADAPTERS | {"mining.every_steps": 30}
    ),
    "nothing: pdist, adapters, 16 candidates": Line(
        "nothing", ALONE | ADAPTERS | {"objective.candidates": 16, "objective.negatives": 9}
    ),
    "nothing: pdist, adapters, six slots a row": Line("nothing", ALONE | ADAPTERS | {"objective.negatives": 5}),
    "nothing: pdist, answer": Line("nothing", ALONE | {"objective.evidence": "answer"}),
    "nothing: pdist, 1 drawn at random": Line("nothing", ALONE | {"mining.explore": 1}),
    "nothing: pdist, generator too": Line("nothing", JOINT),
    "nothing: pdist, then the generator": Line("nothing", THEN, after="nothing: pdist"),
    "questions alone: pdist": Line("question_alone", ALONE | {"objective.evidence": "question"}),
    **{
        f"{share:.0%} of the labels, {name}": Line("nothing", values, 1 - share)
        for share in (0.05, 0.2)
        for name, values in (
            ("labels alone", LABELS),
            ("pdist", FEW | {"objective.contrastive_weight": share}),
            ("pdist, adapters", FEW | ADAPTERS | {"objective.contrastive_weight": share}),
            ("pdist, contrastive weight 1", FEW),
        )
    },
    **{
        f"{share:.0%} of the labels wrong, {name}": Line("another_section", values, share)
        for share in (0.0, 0.1, 0.3, 0.5)
        for name, values in (
            ("labels alone", LABELS),
            ("pdist, label noise", EVIDENCE | {"objective.label_noise": 0.2}),
        )
        if share or values is not LABELS  # that is "labels, mined groups"
    },
}
METRICS = {"recall@1": "eval/recall@1", "recall@10": "eval/recall@10", "MRR@10": "eval/mrr@10"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "minilm_smollm2.py"))
    parser.add_argument("--rows", type=pathlib.Path, required=True, help="labelled rows to train on, a CSV file")
    parser.add_argument("--held-out", type=pathlib.Path, required=True, help="rows to evaluate on, of other passages")
    parser.add_argument("--document", default="Story", help="their column of documents")
    parser.add_argument("--models", type=pathlib.Path, required=True, help="a folder with minilm and smollm2-135m")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the runs are kept")
    parser.add_argument("--record", type=pathlib.Path, help="OUT/measured.jsonl if not given")
    parser.add_argument("--evidence", type=pathlib.Path, help="a folder where evidence is kept besides")
    parser.add_argument("--num-rows", type=int, default=1440, help="of --rows, drawn once for all runs")
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 180])
    parser.add_argument("--mine-every", type=int, default=60, help="steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", default=list(LINES), help="lines of these names, or whose names begin so")
    args, more = parser.parse_known_args()
    names = [
        name for name in LINES if any(name == only or only not in LINES and name.startswith(only) for only in args.only)
    ]
    settings = {"rows": args.num_rows, "mine every": args.mine_every, "config": more}
    record = Record(args.record or args.out / "measured.jsonl", settings)
    args.out.mkdir(parents=True, exist_ok=True)
    labels, cached = Labels(args), files.folder() / "evidence"
    if args.evidence is not None:
        copy_missing(args.evidence, cached)
    if record.of(name="untrained") is None:
        record.add(measure(args, args.models / "minilm"), name="untrained")
    for seed in args.seeds:
        for steps in args.steps:
            for name in names:
                which = {"name": name, "steps": steps, "seed": seed}
                if record.of(**which) is None:
                    record.add(run(args, more, labels, name, steps, seed), **which)
                    if args.evidence is not None:
                        copy_missing(cached, args.evidence)
    print(table(args, names, record))


def copy_missing(source: pathlib.Path, target: pathlib.Path) -> None:
    """The evidence that one folder holds and the other does not."""
    for path in source.glob("*/*.npz"):
        other = target / path.relative_to(source)
        if not other.exists():
            other.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, other)


def read(path: pathlib.Path) -> list[Row]:
    csv.field_size_limit(2**31 - 1)
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Labels:
    """The rows that are trained on, and what may become of their labels: a method each, by its name in `Line.rows`."""

    def __init__(self, args: argparse.Namespace):
        rows = read(args.rows)
        self.args, self.document = args, args.document
        sections: dict[str, dict[str, None]] = {}
        for row in rows:
            sections.setdefault(row[self.document], {})[row["Abstract"]] = None
        self.sections = {document: list(passages) for document, passages in sections.items()}
        self.rows = random.Random(0).sample(rows, args.num_rows)

    def corpus(self) -> list[Row]:
        return [{"Abstract": text, self.document: name} for name, of in self.sections.items() for text in of]

    def of(self, line: Line) -> list[dict]:
        """The rows of a line; of those that it changes so many are drawn."""
        change: Callable[[Row], dict] = getattr(self, line.rows)
        changed = set(random.Random(1).sample(range(len(self.rows)), round(line.share * len(self.rows))))
        return [change(row) if i in changed else row for i, row in enumerate(self.rows)]

    def labelled(self, row: Row) -> dict:
        return row

    def document_alone(self, row: Row) -> dict:
        return row | {"Abstract": ""}

    def nothing(self, row: Row) -> dict:
        return row | {"Abstract": "", self.document: ""}

    def question_alone(self, row: Row) -> dict:
        return self.nothing(row) | {"Answer": ""}

    def all_sections(self, row: Row) -> dict:
        return row | {"Abstract": self.sections[row[self.document]]}

    def random_section(self, row: Row) -> dict:
        return row | {"Abstract": random.Random(row["Question"]).choice(self.sections[row[self.document]])}

    def another_section(self, row: Row) -> dict:
        others = [text for text in self.sections[row[self.document]] if text != row["Abstract"]]
        return row | {"Abstract": random.Random(row["Question"]).choice(others or [row["Abstract"]])}

    def nearest_section(self, row: Row) -> dict:
        """What the retriever likes best before it is trained."""
        query, of = self.query_emb[row["Question"]], self.sections[row[self.document]]
        return row | {"Abstract": max(of, key=lambda text: float(query @ self.passage_emb[text]))}

    @functools.cached_property
    def untrained(self) -> Trained:
        values = {"retriever.path": str(self.args.models / "minilm")} | LABELS
        opened = pair.open_pair(config.load(self.args.config, values))
        return Trained(opened, pair.pretrained_params(opened), 0)

    @functools.cached_property
    def query_emb(self) -> dict:
        texts = [row["Question"] for row in self.rows]
        return dict(zip(texts, self.untrained.embed_queries(texts), strict=True))

    @functools.cached_property
    def passage_emb(self) -> dict:
        documents = dict.fromkeys(row[self.document] for row in self.rows)
        texts = [text for document in documents for text in self.sections[document]]
        return dict(zip(texts, self.untrained.embed_passages(texts), strict=True))


def run(args: argparse.Namespace, more: list[str], labels: Labels, name: str, steps: int, seed: int) -> dict:
    """Trains from the rows of a line and measures the retriever; the run's checkpoints are then removed."""
    line, retriever, workdir = LINES[name], args.models / "minilm", args.out / f"{folder_name(name)}_{steps}_{seed}"
    print(workdir.name, file=sys.stderr, flush=True)
    first = workdir.with_name(f"{workdir.name}_first")
    if line.after:
        retriever = train(args, more, line_values(args, labels, line.after, steps, seed), first) / "retriever"
    values = line_values(args, labels, name, steps, seed) | {"retriever.path": retriever}
    measured = train_and_measure(args, more, values, workdir, line.answers)
    shutil.rmtree(first / "exported", ignore_errors=True)
    return measured


def folder_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def line_values(args: argparse.Namespace, labels: Labels, name: str, steps: int, seed: int) -> dict:
    """The config values of a run; the files that they name are written."""
    line, rows, corpus = LINES[name], args.out / f"{folder_name(name)}.jsonl", args.out / "corpus.jsonl"
    for path, content in ((rows, labels.of(line)), (corpus, labels.corpus())):
        files.write_whole(path, "".join(json.dumps(row) + "\n" for row in content))
    values = {
        "data.train": rows,
        "data.passages": corpus,
        "data.columns.document": args.document,
        "retriever.path": args.models / "minilm",
        "generator.path": args.models / "smollm2-135m",
        "total_steps": steps,
        "seed": seed,
        "mining.every_steps": args.mine_every if line.mined else 0,
    }
    return ALL | values | line.values


def train_and_measure(
    args: argparse.Namespace, more: list[str], values: dict, workdir: pathlib.Path, answers: bool = False
) -> dict:
    """Retrieval, and answers if so asked, of what a run of these values has trained, which is then removed."""
    exported = train(args, more, values, workdir)
    measured = measure(args, exported / "retriever")
    if answers:
        answered = measure(args, exported / "retriever", exported / "generator")
        counts = answered["counts"] | {"queries, retrieval": measured["counts"]["queries"]}
        measured = answered | measured | {"counts": counts}
    shutil.rmtree(exported)
    return measured


def train(args: argparse.Namespace, more: list[str], values: dict, workdir: pathlib.Path) -> pathlib.Path:
    """The folder to which a run of these values has exported its models; its checkpoints are removed."""
    exported = workdir / "exported"
    if not (workdir / "checkpoints").exists() and exported.exists():
        return exported  # of a measurement that was stopped
    words = [f"--config.{key}={value}" for key, value in values.items()]
    command = [sys.executable, "-m", "rag_jax.main", f"--config={args.config}", f"--workdir={workdir}", *words, *more]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(exported, ignore_errors=True)  # of an export that was stopped; it overwrites nothing
    command = [sys.executable, "-m", "rag_jax.export", f"--workdir={workdir}", f"--out={exported}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(workdir / "checkpoints")
    return exported


def measure(args: argparse.Namespace, retriever: pathlib.Path, generator: pathlib.Path | None = None) -> dict:
    """Retrieval with all held-out rows; if a generator is given, answers with some of them."""
    values = ALL | {"data.eval": args.held_out, "retriever.path": retriever}
    values |= LABELS | {"eval.rows": 0} if generator is None else ANSWERS | {"generator.path": generator}
    return evaluate([f"--config={args.config}", *(f"--config.{key}={value}" for key, value in values.items())])


def table(args: argparse.Namespace, names: list[str], record: Record) -> str:
    """Means over seeds, and half of their spread; a column for each number of steps and metric."""
    untrained = record.of(name="untrained")
    assert untrained is not None
    heads = [f"{metric}, {steps}" for steps in args.steps for metric in METRICS]
    lines = [
        f"{args.num_rows:,} rows of {args.rows.name}, {len(args.seeds)} seed(s), {args.steps} steps; "
        f"{untrained['counts']['queries']:,} held-out queries, {untrained['counts']['passages']:,} passages",
        f"{'':<52}" + "".join(f"{head:>18}" for head in heads),
        f"{'untrained':<52}"
        + "".join(f"{untrained[metric]:>18.3f}" for _ in args.steps for metric in METRICS.values()),
    ]
    for name in names:
        cells = []
        for steps in args.steps:
            found = [record.of(name=name, steps=steps, seed=seed) for seed in args.seeds]
            for metric in METRICS.values():
                values = [measured[metric] for measured in found if measured is not None]
                spread = f" ±{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "-")
        lines.append(f"{name:<52}" + "".join(f"{cell:>18}" for cell in cells))
    for line in record.lines:
        measured = line["measured"]
        if line["name"] in names and "eval/answer_nll" in measured:
            counts = measured["counts"]
            lines.append(
                f"answers of {line['name']}, {line['steps']} steps, seed {line['seed']}: "
                f"NLL {measured['eval/answer_nll']:.3f} of {counts['queries']:,} queries, "
                f"EM {measured['eval/em']:.3f} and F1 {measured['eval/f1']:.3f} of {counts['answers']:,}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
