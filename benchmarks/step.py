"""One training step, ours and a straightforward PyTorch one, on the same models and the same batches.

    python -m benchmarks.step --case=gpt2
    python -m benchmarks.step --case=real --rows=ROWS.csv --models=quickstart/models
    python -m benchmarks.step --case=dalm --rows=ROWS.csv --models=quickstart/models

Each side runs in a process of its own, one after the other, round by round; the table gives medians over all rounds.
"""

import argparse
import dataclasses
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
SEED = 0


@dataclasses.dataclass(frozen=True)
class Case:
    objective: str
    batch_size: int  # B
    candidates: int  # K
    lengths: dict[str, int]  # data.*_len of the config
    synthetic: bool = False  # GPT-2 small's shape and MiniLM's, random weights, texts that fill every length
    dropout: float = 0.0


CASES = {
    "gpt2": Case(
        "token", 8, 8,
        {"query_len": 32, "passage_len": 128, "prompt_passage_len": 128, "prompt_query_len": 24, "answer_len": 16},
        synthetic=True,
    ),
    "real": Case(
        "token", 4, 4,
        {"query_len": 48, "passage_len": 128, "prompt_passage_len": 128, "prompt_query_len": 32, "answer_len": 24},
    ),
    "dalm": Case(
        "dalm", 8, 1,
        {"query_len": 50, "passage_len": 128, "prompt_passage_len": 160, "prompt_query_len": 48, "answer_len": 48},
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--rows", help="a CSV with Question, Abstract, Answer")
    parser.add_argument("--models", type=pathlib.Path, help="a folder with minilm and smollm2-135m")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round, after one that is not")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none", help="ours, both models")
    parser.add_argument("--group-size", type=int, default=0, help="ours: rows, and texts, at a time; 0: the batch")
    parser.add_argument("--only", choices=("ours", "torch"), help="one side alone")
    parser.add_argument("--side", choices=("ours", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if 0 < args.group_size < (K := CASES[args.case].candidates):
        parser.error(
            f"--group-size={args.group_size}: the {args.case} case reads {K} passages of a group; give {K} or more"
        )
    if args.side:
        print(json.dumps(SIDES[args.side](args)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if CASES[args.case].synthetic:
            args.models = pathlib.Path(scratch)
            make_models(args.models)
        results: dict[str, list[dict]] = {side: [] for side in SIDES if args.only in (None, side)}
        for _ in range(args.rounds):
            for side, found in results.items():
                found.append(measured(args, side))
    print(table(args, results))


def measured(args: argparse.Namespace, side: str) -> dict:
    """One side in a fresh process."""
    words = [
        f"--case={args.case}",
        f"--steps={args.steps}",
        f"--side={side}",
        f"--models={args.models}",
        f"--remat={args.remat}",
        f"--group-size={args.group_size}",
    ]
    words += [f"--rows={args.rows}"] if args.rows else []
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.step", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if process.returncode:
        print(f"{side} ended with {process.returncode}", file=sys.stderr)
        return dict.fromkeys(("seconds", "peak", "extra", "beyond_imports", "loss", "mfu"), [float("nan")])
    return json.loads(process.stdout.splitlines()[-1])


def table(args: argparse.Namespace, results: dict[str, list[dict]]) -> str:
    case = CASES[args.case]

    def medians(key: str, scale: float = 1.0) -> list[float]:
        return [statistics.median(value for r in found for value in r[key]) * scale for found in results.values()]

    lines = {
        "seconds a step": medians("seconds"),
        "peak memory of the process, GB": medians("peak", 1e-9),
        "  beyond weights, gradients, moments, GB": medians("extra", 1e-9),
        "  and beyond what importing took, GB": medians("beyond_imports", 1e-9),
        "loss of the first step": medians("loss"),
        "share of the matrix peak (MFU)": medians("mfu"),
    }
    groups = f"; groups of {args.group_size}" if args.group_size else ""
    head = (
        f"{args.case}: objective {case.objective}, B = {case.batch_size}, K = {case.candidates}; remat {args.remat}"
        f"{groups}; medians of {args.rounds} rounds of {args.steps} steps\n{'':<42}"
        + "".join(f"{s:>12}" for s in results)
    )
    both = len(results) == 2
    rows = [
        f"{name:<42}" + "".join(f"{v:>12.3f}" for v in values) + (f"{values[0] / values[1]:>12.3f}" if both else "")
        for name, values in lines.items()
    ]
    return "\n".join([head + ("  ours/torch" if both else ""), *rows])


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(step, steps: int, num_params: int, imports: int, flops: float) -> dict:
    """`step()` returns its loss when it is done."""
    from rag_jax.training import peak as peaks

    loss = step()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    peak = peak_memory()
    extra = peak - 16 * num_params  # weights, gradients and AdamW's two moments, float32
    peak_flops = peaks.measured_flops()
    return {
        "seconds": seconds,
        "peak": [peak],
        "extra": [extra],
        "beyond_imports": [extra - imports],
        "loss": [loss],
        "mfu": [flops / s / peak_flops for s in seconds],
    }


def open_case(args: argparse.Namespace):
    """The run's parts and one batch, the same on both sides."""
    from rag_jax import config, data, pair

    case = CASES[args.case]
    values = config.flat(config.load(ROOT / "configs" / "quickstart.py"))
    values |= {f"data.{name}": length for name, length in case.lengths.items()}
    values |= {
        "retriever.path": str(args.models / "minilm"),
        "generator.path": str(args.models / ("gpt2" if case.synthetic else "smollm2-135m")),
        "batch_size": case.batch_size,
        "group_size": args.group_size or case.batch_size,
        "retriever.chunk_size": args.group_size,
        "objective.name": case.objective,
        "objective.candidates": case.candidates,
        "dropout": case.dropout,
        "retriever.remat": args.remat,
        "generator.remat": args.remat,
        "optimizer.rate_rules": ((".*", 1.0),),
        "optimizer.decay_rules": ((".*", 1.0),),
    }
    opened = pair.open_pair(config.build(values))
    if case.synthetic:
        return opened, full_batch(case)
    examples, _ = data.load_examples(
        args.rows,
        key="--rows",
        columns=opened.config.data.columns.to_dict(),
        bad_rows="drop",
        retriever=opened.retriever_text,
        prompt=opened.prompt if opened.whole_string is None else None,
        whole_string=opened.whole_string,
    )
    rows = data.order(len(examples), case.batch_size, SEED)[0]
    return opened, data.collate(
        examples,
        rows,
        data.Batching(data.buckets(examples, case.batch_size, case.candidates), opened.config.group_size),
    )


def model_flops(opened, batch) -> float:
    """Of one step, as the metrics of a run count them."""
    from rag_jax import data
    from rag_jax.models import flops

    configs = {role: source.model_config for role, source in opened.sources.items()}
    objective = opened.config.objective
    return flops.training_step(configs, opened.config.batch_size, objective.candidates, data.lengths(batch))


def full_batch(case: Case):
    """Random tokens, every length filled; the answer is the suffix's end."""
    from rag_jax import data

    rng, n, B = np.random.default_rng(SEED), case.lengths, case.batch_size

    def tokens(length: int, vocabulary: int):
        return rng.integers(5, vocabulary, (B, length)).astype(np.int32), np.ones((B, length), bool)

    query, passage = tokens(n["query_len"], 30000), tokens(n["passage_len"], 30000)
    prefix = tokens(n["prompt_passage_len"], 50000)
    suffix = tokens(n["prompt_query_len"] + n["answer_len"], 50000)
    start = np.full(B, n["prompt_query_len"], np.int32)
    index = np.arange(B, dtype=np.int32)
    answer_mask = np.ones((B, n["answer_len"]), bool)
    pool = data.Pool(index[:, None], *(array[:, None] for array in (*passage, *prefix)))
    return data.Batch(index, index, index[:, None], *query, *suffix, start, answer_mask, None, None, None, pool)


def ours(args: argparse.Namespace) -> dict:
    import jax

    from rag_jax import pair
    from rag_jax.distributed import sharding
    from rag_jax.training import optim
    from rag_jax.training import step as train_step

    imports = peak_memory()
    opened, batch = open_case(args)
    mesh = sharding.make_mesh(1, -1, 1)
    params = pair.pretrained_params(opened, mesh)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    section = opened.config.optimizer
    trainable, frozen = optim.split_frozen(params, section.rate_rules)
    optimizer = optim.make_optimizer(section, 1000, trainable)
    state = train_step.init_state(trainable, frozen, optimizer, mesh)
    del params, trainable, frozen
    shardings = jax.tree.map(lambda a: a.sharding, state)
    rate = optim.learning_rate(section, 1000)
    placed = sharding.put_batch(mesh, batch, len(batch.row))
    made = train_step.make_train_step(opened.model, optimizer, rate, shardings, dropout_seed=None)
    compiled = train_step.compile_step(made, state, placed, None)

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, placed, None)
        return float(metrics["loss/total"])

    return timed(step, args.steps, num_params, imports, model_flops(opened, batch))


def torch_side(args: argparse.Namespace) -> dict:
    import torch
    import transformers  # noqa: F401 (part of what importing takes)

    from benchmarks import torch_step

    imports = peak_memory()
    opened, batch = open_case(args)
    folders = (str(opened.sources[role].folder) for role in ("retriever", "generator"))
    models, section = torch_step.Models(*folders), opened.config.optimizer
    optimizer = torch.optim.AdamW(models.parameters(), lr=section.learning_rate, weight_decay=section.weight_decay)
    inputs, objective = torch_step.tensors(batch), opened.config.objective.to_dict()
    loss_of = torch_step.LOSSES[objective["name"]]
    models.eval()  # no dropout

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(models, inputs, objective)
        loss.backward()
        for model in (models.retriever, models.generator):
            torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_norm)
        optimizer.step()
        return loss.item()

    return timed(step, args.steps, sum(p.numel() for p in models.parameters()), imports, model_flops(opened, batch))


SIDES = {"ours": ours, "torch": torch_side}


def make_models(folder: pathlib.Path) -> None:
    """GPT-2 small and MiniLM as shapes: random weights, tokenizers of no use."""
    from rag_jax import models
    from rag_jax.hf import tiny

    shapes = {
        "minilm": ("bert", models.BertConfig(30522, 6, 12, 384, 1536, 512, 2, 1e-12, "gelu", 0.1, 0.1)),
        "gpt2": ("gpt2", models.Gpt2Config(50257, 12, 12, 768, 3072, 1024, 1e-5, "gelu_tanh", 0.1, 0.1, 0.1)),
    }
    for name, (kind, config) in shapes.items():
        (folder / name).mkdir()
        tiny.build(kind, folder / name, config)


if __name__ == "__main__":
    main()
