"""How the step grows: time, memory, FLOPs and compile time against one size at a time.

    python -m benchmarks.growth --of=candidates        # K = 1, 2, 4, 8, 16
    python -m benchmarks.growth --of=batch
    python -m benchmarks.growth --of=passage
    python -m benchmarks.growth --of=remat
    python -m benchmarks.growth --of=rank              # of adapters on both models
    python -m benchmarks.growth --of=depth             # compilation only

GPT-2 small's shape with MiniLM's, random weights, every length filled; float32; all points in one process, one after
the other. Memory is what XLA reserves for temporaries; FLOPs are those of the compiled products, loops counted.
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import step as step_benchmark
from rag_jax import data, models, rag
from rag_jax.distributed import sharding
from rag_jax.models import BertConfig, Gpt2Config, flops
from rag_jax.planning import hlo
from rag_jax.training import optim
from rag_jax.training import step as train_step

RETRIEVER = BertConfig(30522, 6, 12, 384, 1536, 512, 2, 1e-12, "gelu", 0.0, 0.0)
GENERATOR = Gpt2Config(50257, 12, 12, 768, 3072, 1024, 1e-5, "gelu_tanh", 0.0, 0.0, 0.0)
OBJECTIVE = rag.Objective("token", 8, 0.05, 0.1, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement; what a sweep does not name keeps these sizes."""

    batch: int = 8
    group: int = 8
    candidates: int = 8
    passage: int = 128
    layers: int = 12
    width: int = 768
    remat: str = "dots"
    chunk: int = 0
    objective: str = "token"
    frozen: bool = False  # the generator
    rank: int = 0  # of adapters on all linear layers of both models, which alone are trained; 0: none


SWEEPS = {
    "candidates": [Point(batch=16, group=16, candidates=k) for k in (1, 2, 4, 8, 16)],
    "batch": [Point(batch=b, candidates=4, chunk=8) for b in (8, 16, 32)],
    "passage": [Point(passage=n, candidates=4) for n in (64, 128, 256, 512)],
    "remat": [Point(remat=policy) for policy in ("none", "dots", "full")],
    "objective": [Point(), Point(objective="pdist"), Point(objective="pdist", frozen=True)],
    "rank": [Point(rank=n) for n in (0, 4, 16, 64)],
    "depth": [Point(layers=n, width=192, candidates=4, passage=32) for n in (12, 24, 48)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", choices=SWEEPS, required=True)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a point, after one that is not")
    args = parser.parse_args()
    shown = {name: name for name in SWEEPS} | {"depth": "layers"}
    print(
        f"{args.of:<12}{'compile s':>10}{'step s':>10}{'to first':>10}{'temp GB':>10}{'to first':>10}{'FLOPs/min':>10}"
        f"{'to first':>10}"
    )
    first: dict[str, Any] = {}
    for point in SWEEPS[args.of]:
        found = measure(point, 0 if args.of == "depth" else args.steps)
        first = first or found
        print(
            f"{getattr(point, shown[args.of])!s:<12}{found['compile']:>10.1f}{found['step']:>10.2f}"
            f"{found['step'] / first['step']:>10.2f}{found['bytes'] / 1e9:>10.2f}"
            f"{found['bytes'] / first['bytes']:>10.2f}{found['flops']:>10.2f}{found['work'] / first['work']:>10.2f}",
            flush=True,
        )


def measure(point: Point, steps: int) -> dict[str, float]:
    lora = models.Lora(point.rank, 2.0 * point.rank, ("attention/", "mlp/")) if point.rank else None
    computing = models.Computing(remat=point.remat, lora=lora)
    retriever = dataclasses.replace(RETRIEVER, computing=computing)
    heads, mlp = point.width // 64, 4 * point.width
    sizes = {"num_layers": point.layers, "num_heads": heads, "width": point.width, "mlp_width": mlp}
    generator = dataclasses.replace(GENERATOR, computing=computing, **sizes)
    objective = dataclasses.replace(OBJECTIVE, candidates=point.candidates, name=point.objective)
    graphs, shapes = zip(*(models.abstract(config) for config in (retriever, generator)), strict=True)
    composite = rag.Rag(objective, *graphs, "mean", point.group, chunk_size=point.chunk)
    case = step_benchmark.CASES["gpt2"]
    lengths = case.lengths | {"passage_len": point.passage, "prompt_passage_len": point.passage}
    batch = step_benchmark.full_batch(dataclasses.replace(case, batch_size=point.batch, lengths=lengths))

    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    optimizer, rate = optax.adamw(1e-4, weight_decay=0.01), optax.constant_schedule(1e-4)
    rules = ((("^generator/", 0.0),) if point.frozen else ()) + ((".*", 1.0),)
    params = dict(zip(("retriever", "generator"), shapes, strict=True))
    abstract, frozen = optim.split_frozen(params, optim.with_adapters(rules, params))
    state = train_step.abstract_state(abstract, frozen, optimizer, mesh)
    places = jax.tree.map(lambda a: a.sharding, state)
    step = train_step.make_train_step(composite, optimizer, rate, places, dropout_seed=None)
    began = time.perf_counter()
    compiled = step.lower(state, batch, None).compile()
    compile_s = time.perf_counter() - began
    configs: dict[str, models.ModelConfig] = {"retriever": retriever, "generator": generator}
    reading = ("answer" if objective.formula.divergence else None, not point.frozen)
    minimum = flops.training_step(configs, point.batch, point.candidates, data.lengths(batch), 0, *reading)
    seconds = [float("nan")]
    if steps:
        rng = np.random.default_rng(0)
        params, frozen = jax.tree.map(lambda a: rng.normal(0, 0.02, a.shape).astype(np.float32), (abstract, frozen))
        state = train_step.init_state(params, frozen, optimizer, mesh)
        placed = sharding.put_batch(mesh, batch, len(batch.row))
        seconds = []
        for _ in range(1 + steps):
            began = time.perf_counter()
            state, metrics = compiled(state, placed, None)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - began)
        seconds = seconds[1:]
    return {
        "compile": compile_s,
        "step": statistics.median(seconds),
        "bytes": compiled.memory_analysis().temp_size_in_bytes,
        "flops": hlo.dot_flops(compiled.as_text()) / minimum,
        "work": hlo.dot_flops(compiled.as_text()),
    }


if __name__ == "__main__":
    main()
