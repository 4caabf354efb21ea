"""The phases of `benchmarks.accelerator`, each run by it in a process of its own; see there."""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.accelerator import RESULT

ROOT = pathlib.Path(__file__).parent.parent
MINILM, SMOLLM = "sentence-transformers/all-MiniLM-L6-v2", "HuggingFaceTB/SmolLM2-135M"


@dataclasses.dataclass(frozen=True)
class Size:
    name: str
    retriever: str  # a name of rag_jax.hf.known, or random:KIND
    generator: str
    batch_size: int  # B
    candidates: int  # K
    lengths: tuple[int, int, int, int, int]  # retriever's query and passage; generator's passage, query and answer
    decoded: tuple[int, int] = (0, 0)  # queries and new tokens; (0, 0): none


TEXTS = (32, 256, 256, 32, 32)
SIZES = (
    Size("bge-small + GPT-2", "BAAI/bge-small-en", "gpt2", 64, 8, TEXTS),
    Size("MiniLM + SmolLM2-135M", MINILM, SMOLLM, 64, 4, TEXTS, (16, 64)),
    Size("bge-base + Qwen2.5-1.5B", "BAAI/bge-base-en", "Qwen/Qwen2.5-1.5B", 16, 4, TEXTS, (16, 64)),
)
SMALL = (Size("tiny BERT + Llama", "random:bert", "random:llama", 2, 2, (8, 16, 16, 8, 8), (2, 4)),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", choices=RUNS)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    RUNS[args.phase](args.small)


def say(**facts: Any) -> None:
    """One line of results, for the parent."""
    print(RESULT + json.dumps(facts), flush=True)


@contextlib.contextmanager
def attempt(*what: str) -> Iterator[None]:
    """What goes wrong inside is a line of the table, not the end of it."""
    try:
        yield
    except Exception as error:
        say(kind="error", what=" ".join(what), error=f"{type(error).__name__}: {str(error)[:400]}")


def timed(fn: Callable[[], Any], budget_s: float, warm: int = 2, most: int = 20) -> float:
    """Median seconds of `fn()`, which returns when its work is done."""
    for _ in range(warm):
        fn()
    seconds, began = [], time.perf_counter()
    while len(seconds) < 3 or (len(seconds) < most and time.perf_counter() - began < budget_s):
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def random_batch(rng: np.random.Generator, B: int, lengths: tuple[int, ...], vocab_size: int, *, filled: bool) -> Any:
    """Random tokens; every length filled, or rows of random lengths, padded on the right."""
    from rag_jax import data

    Lq, Lr, Lp, Ls, T = lengths

    def tokens(length: int) -> tuple[np.ndarray, np.ndarray]:
        real = np.full((B, 1), length) if filled else rng.integers(length // 2, length + 1, (B, 1))
        mask = np.arange(length) < real
        return np.where(mask, rng.integers(5, vocab_size, (B, length)), 0).astype(np.int32), mask

    query, passages = tokens(Lq), [array[:, None] for length in (Lr, Lp) for array in tokens(length)]
    answer = np.full(B, T) if filled else rng.integers(1, T + 1, B)
    start = np.full(B, Ls - T) if filled else rng.integers(1, Ls - T + 1, B)
    suffix_mask = np.arange(Ls) < (start + answer)[:, None]
    suffix = np.where(suffix_mask, rng.integers(5, vocab_size, (B, Ls)), 0).astype(np.int32)
    index, answer_mask = np.arange(B, dtype=np.int32), np.arange(T) < answer[:, None]
    suffix_and_answer = (suffix, suffix_mask, start.astype(np.int32), answer_mask)
    pool = data.Pool(index[:, None], *passages)
    return data.Batch(index, index, index[:, None], *query, *suffix_and_answer, None, None, None, pool)


def relative(tree: Any, reference: Any, least: float = 1e-15) -> float:
    """||tree - reference|| / ||reference||, this at least `least`; NaN never passes."""
    import jax

    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True))
    difference = sum(float(np.sum((np.float64(a) - np.float64(b)) ** 2)) for a, b in pairs)
    size = sum(float(np.sum(np.float64(b) ** 2)) for _, b in pairs)
    return float(np.sqrt(difference) / max(np.sqrt(size), least))


# numbers


def numbers(small: bool) -> None:
    import jax

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    say(
        kind="device", name=device.device_kind, platform=device.platform, jax=jax.__version__,
        python=sys.version.split()[0], memory_gib=round(stats.get("bytes_limit", 0) / 2**30, 1),
    )  # fmt: skip
    for measure in (peaks, correctness, attention, search):
        with attempt(measure.__name__):
            measure(small)


def peaks(small: bool) -> None:
    import jax
    import jax.numpy as jnp

    n, many = (256, 2) if small else (8192, 20)
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in (0, 1))
    product = jax.jit(lambda a, b: a @ b)
    products = lambda: jax.block_until_ready([product(a, b) for _ in range(many)])  # noqa: E731
    x = jnp.ones(2**22 if small else 2**29, jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    copy_s = timed(lambda: jax.block_until_ready(copy(x)), 1.0)
    say(kind="peaks", bf16_tflops=2 * n**3 * many / timed(products, 2.0) / 1e12, copy_tbs=2 * x.nbytes / copy_s / 1e12)


def families() -> list[tuple[str, Any, str, Any]]:
    """(name, retriever's config, pooling, generator's config): small, and every branch of the models is met."""
    from rag_jax import models
    from rag_jax.hf import tiny

    sizes = {"vocab_size": 1000, "width": 256, "mlp_width": 512, "num_heads": 4, "num_layers": 3, "max_positions": 256}
    bert, gpt2 = (dataclasses.replace(tiny.MODELS[name], **sizes) for name in ("bert", "gpt2"))
    llama = dataclasses.replace(tiny.MODELS["llama"], **sizes, head_dim=64, num_kv_heads=2)
    scaling = models.RopeScaling("llama3", 8.0, original_max_positions=64)
    qwen3 = dataclasses.replace(llama, qk_norm=True, tied_head=True)
    return [
        ("bert + gpt2", bert, "cls", gpt2),
        ("bert + llama (GQA)", bert, "mean", dataclasses.replace(llama, rope_scaling=scaling)),
        ("bert + mistral (window)", bert, "mean", dataclasses.replace(llama, sliding_window=24)),
        ("bert + qwen2 (biases)", bert, "mean", dataclasses.replace(llama, qkv_bias=True, tied_head=True)),
        ("qwen3 + qwen3 (q/k norms)", qwen3, "last", qwen3),
    ]


def correctness(small: bool) -> None:
    """Losses and gradients here against float32 on the CPU, with the kernel of attention that a run here would have.

    All K candidates of a group are read, so that a rounding cannot change which.
    """
    import jax

    rng, B = np.random.default_rng(0), 8
    here, cpu = jax.devices()[0], jax.devices("cpu")[0]
    kinds = {  # name -> (device, dtype, precision of products)
        "reference": (cpu, "float32", "highest"),
        "f32 highest": (here, "float32", "highest"),
        "f32 default": (here, "float32", "default"),
        "bf16": (here, "bfloat16", "default"),
        "bf16 CPU": (cpu, "bfloat16", "default"),
    }
    batch = random_batch(rng, B, (16, 48, 48, 40, 16), 1000, filled=False)
    cases = families()[:1] if small else families()
    with concurrent.futures.ThreadPoolExecutor(2 if small else 8) as pool:
        programs = {  # on a CPU some kinds are the same
            (case[0], how): pool.submit(gradients_on, case, batch, *how)
            for case in cases
            for how in set(kinds.values())
        }
        for case in cases:
            with attempt("correctness", case[0]):
                ready = {kind: programs[case[0], how].result() for kind, how in kinds.items()}
                params = random_params(rng, ready["reference"][1])
                found = {kind: jax.device_get(run(params)) for kind, (run, _) in ready.items()}
                say(kind="correctness", name=case[0], **errors_of(found))


def gradients_on(case: Any, batch: Any, device: Any, dtype: str, precision: str) -> tuple[Callable[[Any], Any], Any]:
    """`run(params) -> (gradients, loss)` of a composite on one device, compiled; and the parameters' shapes."""
    import jax
    import jax.numpy as jnp

    from rag_jax import models, rag
    from rag_jax.distributed import sharding
    from rag_jax.planning import fit
    from rag_jax.training import step as train_step

    _, retriever, pooling, generator = case
    mesh, K = sharding.make_mesh(1, 1, 1, devices=[device]), 4
    major, minor = map(int, getattr(device, "compute_capability", "0.0").split("."))
    found = fit.Device(device.platform, 1, (major, minor), kind=device.device_kind)

    def computed(config: Any) -> Any:
        fused = fit.FUSED.get(found.platform)
        kernel = "plain" if fused is None or fit.fused_problem(fused, found, dtype, config.heads, 1, 0.0) else fused
        return dataclasses.replace(config, computing=models.Computing(dtype, "dots", kernel))

    graphs, shapes = zip(*(models.abstract(computed(config)) for config in (retriever, generator)), strict=True)
    shapes = dict(zip(("retriever", "generator"), shapes, strict=True))
    places, nothing = sharding.param_shardings(mesh, shapes), jax.tree.map(lambda _: None, shapes)
    model = rag.Rag(rag.Objective("token", K, 0.2, 0.5, 1.0, 1.0), *graphs, pooling, K, jnp.dtype(dtype))
    gradients = jax.jit(train_step.make_gradients(model, places, nothing, None))
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, jnp.float32, sharding=s), shapes, places)
    rows, step = sharding.put_batch(mesh, batch, len(batch.row)), jnp.zeros((), jnp.int32)
    with jax.default_matmul_precision(precision):
        lowered = gradients.lower(abstract, nothing, rows, step)
    # It runs once: what a CPU saves by compiling little is more than what it loses.
    program = lowered.compile(
        compiler_options={"xla_backend_optimization_level": 0} if device.platform == "cpu" else {}
    )

    def run(params: Any) -> Any:
        grads, metrics = program(jax.tree.map(jax.device_put, params, places), nothing, rows, step)
        return grads, metrics["loss/total"]

    return run, shapes


def random_params(rng: np.random.Generator, shapes: Any) -> Any:
    import jax

    def draw(path: Any, leaf: Any) -> np.ndarray:
        std = 0.02 if leaf.ndim < 2 or path[-1].key == "embedding" else leaf.shape[-2] ** -0.5
        return rng.normal(path[-1].key == "scale", std, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def errors_of(found: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Relative errors of every kind's loss and gradients against the reference's."""
    import jax

    reference, loss = found["reference"][0], float(found["reference"][1])
    # A bias of keys has no gradient at all but rounding: a leaf is held against a thousandth of the whole.
    least = 1e-3 * float(np.sqrt(sum(float(np.sum(np.float64(a) ** 2)) for a in jax.tree.leaves(reference))))
    facts: dict[str, Any] = {"loss": loss}
    for kind, (grads, value) in found.items():
        facts |= {kind: relative(grads, reference), f"{kind} loss": abs(float(value) - loss) / abs(loss)}
        by_leaf = jax.tree.map(functools.partial(relative, least=least), grads, reference)
        path, worst = max(jax.tree_util.tree_leaves_with_path(by_leaf), key=lambda leaf: leaf[1])
        facts[f"{kind} worst"] = f"{jax.tree_util.keystr(path, simple=True, separator='/')} {worst:.1e}"
    ok = facts["f32 highest loss"] < 1e-5 and facts["f32 highest"] < 3e-4
    return facts | {"ok": bool(ok and facts["bf16"] < max(2 * facts["bf16 CPU"], 0.02))}


def attention(small: bool) -> None:
    """One layer's attention of suffixes behind their passages, forward and backward: plain, and by cuDNN."""
    import jax
    import jax.numpy as jnp

    from rag_jax.models import attention as kernels

    shapes = {
        "GPT-2": (512, 64, 256, 12, 12, 64), "SmolLM2": (256, 64, 256, 9, 3, 64),
        "Qwen2.5-1.5B": (64, 64, 256, 12, 2, 128),
    }  # fmt: skip
    fused = "cudnn" if jax.devices()[0].platform == "gpu" else "xla"
    for name, (pairs, Ls, Lp, H, G, C) in ({"tiny": (4, 8, 16, 4, 2, 8)} if small else shapes).items():
        draws = [(Ls, H), (Lp, G), (Lp, G), (Ls, G), (Ls, G), (Ls, H)]
        arrays = [
            jax.random.normal(jax.random.key(n), (pairs, length, heads, C), jnp.bfloat16)
            for n, (length, heads) in enumerate(draws)
        ]
        before = kernels.Seen(jnp.ones((pairs, Lp), bool), offset=jnp.full(pairs, Lp))
        own = kernels.Seen(jnp.ones((pairs, Ls), bool), causal=True)

        def total(query, prefix_key, prefix_value, key, value, probe, kernel="plain", before=before, own=own):  # noqa: ANN001
            parts = [((prefix_key, prefix_value), before), ((key, value), own)]
            if kernel == "plain":
                turned = [
                    ((jnp.transpose(key, (0, 2, 3, 1)), jnp.swapaxes(value, 1, 2)), seen)
                    for (key, value), seen in parts
                ]
                out = jnp.swapaxes(kernels.attend(jnp.swapaxes(query, 1, 2), turned), 1, 2)
            else:
                out = kernels.attend_fused(query, parts, kernel)
            return jnp.sum(out * probe, dtype=jnp.float32)

        grads = {
            kernel: jax.jit(jax.grad(functools.partial(total, kernel=kernel), range(5))) for kernel in ("plain", fused)
        }
        exact = jax.device_get(grads["plain"](*(a.astype(jnp.float32) for a in arrays)))
        for side, grad in grads.items():
            with attempt("attention", name, side):
                error = relative(jax.device_get(grad(*arrays)), exact)
                seconds = timed(lambda grad=grad, arrays=arrays: jax.block_until_ready(grad(*arrays)), 1.0)
                say(kind="attention", name=name, side=side, ms=seconds * 1e3, error=error)


def search(small: bool) -> None:
    from rag_jax.inference import search as searching

    rng, Q, M, E, k = np.random.default_rng(0), *((16, 5000, 32, 10) if small else (1000, 1_000_000, 384, 100))
    corpus, queries = (rng.standard_normal((n, E), np.float32) for n in (M, Q))
    corpus /= np.linalg.norm(corpus, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    seconds, score, lies_there = [], np.zeros(0), searching.placed(corpus)
    for _ in range(3):
        began = time.perf_counter()
        score, _ = searching.top_k(queries, lies_there, k)
        seconds.append(time.perf_counter() - began)
    exact = queries[:8] @ corpus.T
    best = np.sort(np.partition(exact, -k, axis=1)[:, -k:], axis=1)[:, ::-1]
    error = float(np.abs(score[:8] - best).max())
    say(
        kind="search", queries=Q, passages=M, width=E, k=k, first_s=seconds[0], second_s=min(seconds[1:]), error=error,
        ok=error < 1e-5,
    )  # fmt: skip


# steps


def open_size(size: Size) -> Any:
    """The run that a config of this size stands for, without weights and tokenizers."""
    from rag_jax import config, hf, pair

    names = ("query_len", "passage_len", "prompt_passage_len", "prompt_query_len", "answer_len")
    values = {f"data.{name}": length for name, length in zip(names, size.lengths, strict=True)} | {
        "retriever.path": size.retriever, "generator.path": size.generator, "batch_size": size.batch_size,
        "group_size": size.batch_size, "objective.candidates": size.candidates, "objective.temperature": 0.05,
        "objective.marginal_temperature": 0.05, "dtype": "bfloat16", "dropout": 0.0, "retriever.chunk_size": 0,
        "retriever.remat": "dots", "generator.remat": "dots", "total_steps": 1000,
    }  # fmt: skip
    loaded = config.load(ROOT / "configs" / "bge_gpt2.py", values)
    sources = {role: hf.open_config(loaded[role].path, f"{role}.path", role) for role in pair.ROLES}
    return pair.Pair(loaded, sources, pair.composite(loaded, sources), None, None, None)


def full_batch(size: Size, vocab_size: int) -> Any:
    Lq, Lr, Lp, query, T = size.lengths
    rng = np.random.default_rng(0)
    return random_batch(rng, size.batch_size, (Lq, Lr, Lp, query + T, T), vocab_size, filled=True)


def needed_flops(size: Size, sources: Any) -> float:
    from rag_jax.data import Lengths
    from rag_jax.models import flops

    Lq, Lr, Lp, query, T = size.lengths
    configs = {role: source.model_config for role, source in sources.items()}
    return flops.training_step(configs, size.batch_size, size.candidates, Lengths(Lq, Lr, Lp, query + T, T))


def steps(small: bool) -> None:
    from rag_jax import pair
    from rag_jax.distributed import sharding
    from rag_jax.planning import fit
    from rag_jax.training import setup
    from rag_jax.training import step as train_step

    sizes, mesh = SMALL if small else SIZES, sharding.make_mesh(1, -1, 1)

    def prepare(size: Size) -> tuple[Any, ...]:
        opened = open_size(size)
        rules, optimizer, state, step = setup.make_step(opened, mesh)
        batch = full_batch(size, min(source.model_config.vocab_size for source in opened.sources.values()))
        rows, began = sharding.put_batch(mesh, batch, size.batch_size), time.perf_counter()
        options = fit.compiler_options(pair.this_device(), opened.config.kernels)
        program = train_step.compile_step(step, state, rows, None, options)
        return opened, rules, optimizer, rows, program, time.perf_counter() - began

    with concurrent.futures.ThreadPoolExecutor(len(sizes)) as pool:
        prepared = [pool.submit(prepare, size) for size in sizes]
        concurrent.futures.wait(prepared)  # compilers try kernels on the device: nothing is timed beside them
        for n, (size, future) in enumerate(zip(sizes, prepared, strict=True)):
            with attempt("step", size.name):
                one_size(size, mesh, *future.result(), twice=n == 0)


def one_size(
    size: Size,
    mesh: Any,
    opened: Any,
    rules: Any,
    optimizer: Any,
    rows: Any,
    program: Any,
    compile_s: float,
    *,
    twice: bool,
) -> None:
    import jax
    import jax.numpy as jnp

    from rag_jax.planning.chips import peak_flops
    from rag_jax.training import optim
    from rag_jax.training import step as train_step

    params = drawn_on_device(opened, mesh)
    state = train_step.init_state(*optim.split_frozen(params, rules), optimizer, mesh)
    del params
    if twice:
        with attempt("same step twice", size.name):
            copies = [jax.tree.map(jnp.copy, state) for _ in range(2)]
            after = [jax.device_get(program(copy, rows, None)[0].params) for copy in copies]
            del copies
            same = [bool(np.array_equal(a, b)) for a, b in zip(*map(jax.tree.leaves, after), strict=True)]
            say(kind="twice", name=size.name, leaves=len(same), equal=sum(same))
    losses = []

    def step() -> None:
        nonlocal state
        state, values = program(state, rows, None)
        losses.append(float(values["loss/total"]))

    seconds = timed(step, 4.0, warm=2, most=10)
    needed, device = needed_flops(size, opened.sources), jax.devices()[0]
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = peak_flops(device.device_kind)
    say(
        kind="step", side="ours", name=size.name, B=size.batch_size, K=size.candidates, seconds=seconds,
        predicted_s=predicted(program, device, needed), queries_s=size.batch_size / seconds,
        model_tflop=needed / 1e12, mfu=needed / seconds / peak if peak else 0.0, memory_gb=held / 1e9,
        peak_gb=(device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9, compile_s=compile_s,
        loss_first=losses[0], loss_last=losses[-1], ok=bool(np.isfinite(losses).all()),
    )  # fmt: skip
    if size.decoded[0]:
        with attempt("decode", size.name):
            decode(size, opened, state.params)


def drawn_on_device(opened: Any, mesh: Any) -> Any:
    """Random parameters of a run's models, born where they lie."""
    import jax
    import jax.numpy as jnp

    from rag_jax import pair

    abstract = pair.abstract_params(opened, mesh)
    places = jax.tree.map(lambda a: a.sharding, abstract)
    numbers = jax.tree.unflatten(jax.tree.structure(abstract), range(len(jax.tree.leaves(abstract))))

    def one(path: Any, a: Any, n: int) -> jax.Array:
        name, key = path[-1].key, jax.random.fold_in(jax.random.key(0), n)
        if name in ("scale", "bias"):
            return jnp.full(a.shape, float(name == "scale"), jnp.float32)
        return (0.02 if name == "embedding" else a.shape[-2] ** -0.5) * jax.random.normal(key, a.shape, jnp.float32)

    return jax.jit(lambda: jax.tree_util.tree_map_with_path(one, abstract, numbers), out_shardings=places)()


def predicted(program: Any, device: Any, needed: float) -> float:
    """Seconds that `rag_jax.plan` would predict of this very program; 0 for a device that is none of its GPUs."""
    from rag_jax import plan
    from rag_jax.planning import chips, hlo

    known = [name for name, chip in chips.CHIPS.items() if chip.card and chip.kind in device.device_kind]
    if not known:
        return 0.0
    topology = chips.topology(f"{known[0]}:1")
    return plan.timing(hlo.Program(program.as_text()), topology, needed, ("bfloat16", "default"))["predicted_step_s"]


def decode(size: Size, opened: Any, params: Any) -> None:
    import jax

    from rag_jax.inference import decoding

    (B, T), K, rng = size.decoded, size.candidates, np.random.default_rng(0)
    _, _, Lp, Lq, _ = size.lengths
    V = opened.sources["generator"].model_config.vocab_size
    prefix, query = ((rng.integers(5, V, (B, L)).astype(np.int32), np.ones((B, L), bool)) for L in (Lp, Lq))
    candidates = np.stack([rng.permutation(B)[:K] for _ in range(B)]).astype(np.int32)
    prior = np.full((B, K), -np.log(K), np.float32)

    def answers() -> Any:
        ids = decoding.answer_ids(
            opened.model, params, prefix, query, candidates, prior, num_tokens=T, eos_id=-1  # never ends before T
        )  # fmt: skip
        return jax.block_until_ready(ids)

    say_decoded("ours", size, B, timed(answers, 3.0, warm=1, most=5))


def say_decoded(side: str, size: Size, B: int, seconds: float) -> None:
    (_, T), K = size.decoded, size.candidates
    say(
        kind="decode", side=side, name=size.name, B=B, K=K, tokens=T, seconds=seconds, answer_tokens_s=B * T / seconds,
        stream_tokens_s=B * K * T / seconds,
    )  # fmt: skip


# torch


def torch_side(small: bool) -> None:
    from benchmarks import torch_on_device

    for size in SMALL if small else SIZES:
        with attempt("step torch", size.name):
            torch_on_device.measure(size)


# resume


def resume(small: bool) -> None:
    """Two runs of the tiny pair: one goes through, one is killed behind its first checkpoint and goes on."""
    with tempfile.TemporaryDirectory(prefix="resume") as scratch, concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(one_run, pathlib.Path(scratch), kill) for kill in (False, True)]
        digests = [digests_of(future.result()) for future in runs]
    equal = sum(a == b for a, b in zip(*digests, strict=True))
    say(kind="resume", name="the tiny pair, bfloat16", ok=digests[0] == digests[1], equal=equal, leaves=len(digests[0]))


def one_run(scratch: pathlib.Path, kill: bool) -> pathlib.Path:
    workdir = scratch / ("killed" if kill else "through")
    values = {"eval.every_steps": 0, "dtype": "bfloat16", "total_steps": 40, "checkpoint.every_steps": 10}
    words = ["--config=configs/tiny.py", f"--workdir={workdir}"]
    words += [f"--config.{name}={value}" for name, value in values.items()]

    def start() -> subprocess.Popen[str]:
        # Two runs share the card, and each compiles for itself.
        there = os.environ | {
            "RAG_JAX_CACHE": f"{workdir}-cache", "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }  # fmt: skip
        command = [sys.executable, "-m", "rag_jax.main", *words]
        return subprocess.Popen(
            command, cwd=ROOT, env=there, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    process = start()
    if kill:
        while process.poll() is None and not (workdir / "checkpoints" / "10").is_dir():
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = start()
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"ended with {process.returncode}: {said[-300:]}")
    return workdir


def digests_of(workdir: pathlib.Path) -> list[str]:
    """Of every array of the newest checkpoint, read on the CPU."""
    import jax

    from rag_jax import config, pair
    from rag_jax.distributed import sharding
    from rag_jax.training import setup
    from rag_jax.workdir import checkpoint

    opened = pair.open_pair(config.load_workdir(workdir), workdir)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices("cpu")[:1])
    _, _, state, _ = setup.make_step(opened, mesh)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        found = checkpoints.restore({"params": state.params, "opt_state": state.opt_state})
    return [hashlib.blake2b(np.asarray(array).tobytes()).hexdigest() for array in jax.tree.leaves(found)]


RUNS = {"numbers": numbers, "steps": steps, "torch": torch_side, "resume": resume}

if __name__ == "__main__":
    main()
