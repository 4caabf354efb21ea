"""What the steps read: the rows of each, mined or shuffled, as batches on the mesh, and a program for every shape."""

import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from rag_jax import data, pair
from rag_jax.distributed import compile_cache, sharding
from rag_jax.planning import fit
from rag_jax.progress import Progress
from rag_jax.training import announce, known, mining, optim
from rag_jax.training.record import Facts, Record
from rag_jax.training.setup import Training
from rag_jax.training.step import Step, TrainState, compile_step

# Steps that are planned at a time: the step they follow, which rows they read, None: those of `data.order`, and what a
# generator is known to say of them.
Span = tuple[int, mining.Plan | None, data.Known | None]


def spans(training: Training, state: Callable[[], TrainState], start_step: int, record: Record) -> Iterator[Span]:
    """A span from each mining to the next; without mining a single one. `state()` is the newest when mining is due."""
    config, every, step = training.config, training.config.mining.every_steps, start_step
    if not every:
        yield start_step, None, named_evidence(training, state, record)
        return
    since, plan, met = step, None, np.zeros(len(training.examples), np.int32)
    if start_step:
        since, plan, met = mining.resume(training.workdir, start_step, every)
    while step < config.total_steps:
        if plan is None:
            assert met is not None
            plan = mine(training, state(), met, step, record)
        yield step, plan.after(step - since), known.of_plan(training, plan)
        step = since = since + every
        plan, met = None, plan.met_after()


def mine(training: Training, state: TrainState, met: np.ndarray, step: int, record: Record) -> mining.Plan:
    """Mine with the parameters of this step; the plan goes to the workdir before any step of it is taken."""
    with record.pausing("mining"):
        params = optim.join(state.params, state.frozen)
        plan, metrics = mining.mine(training.opened.model, params, training.examples, met, training.config, step)
        if training.keeps_evidence:
            plan, computed = known.planned(training, params, plan)
            metrics |= computed
        if training.is_main:
            mining.save(training.workdir, step, plan)
    record.mining(step, metrics)
    return plan


def named_evidence(training: Training, state: Callable[[], TrainState], record: Record) -> data.Known | None:
    """What is known of the rows behind what they name, where nothing is mined."""
    if not training.keeps_evidence:
        return None
    if (found := known.read(training)) is None:
        with record.pausing("mining"):
            found = known.named(training, optim.join(state().params, state().frozen))
            if training.is_main:
                known.write(training, found)
    return found


def batches(training: Training, spans: Iterator[Span]) -> Iterator[tuple[data.Batch, Facts]]:
    """Batches on the mesh, span after span. A span is asked for only when the one before it has been read."""
    config = training.config
    for first, plan, evidence in spans:
        left, batching = config.total_steps - first, known.batching(training, evidence)
        source = data.iterate(
            known.read_by_steps(training, evidence),
            batching,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=first,
            total_steps=config.total_steps,
            own=sharding.own_rows(training.mesh, config.batch_size),
            planned=None if plan is None else plan.rows[:left],
            brought=None if plan is None else plan.brought,
        )
        while True:
            began = time.perf_counter()
            batch = next(source, None)
            if batch is None:
                break
            placed = sharding.put_batch(training.mesh, batch, config.batch_size)
            wait_s = time.perf_counter() - began
            yield placed, Facts(data.lengths(batch), data.padding_share(batch, config.objective.candidates), wait_s)


def spans_of_before(training: Training, start_step: int) -> Iterator[Span]:
    """The spans of a run as it left them behind, from `start_step` on."""
    if every := training.config.mining.every_steps:
        for step, plan in mining.kept(training.workdir, start_step, every):
            yield step, plan, known.of_plan(training, plan)
        return
    yield start_step, None, known.read(training)


def rows_of(training: Training, step: int) -> np.ndarray:
    """Which rows a step that was begun reads, (batch_size,)."""
    config = training.config
    _, plan, _ = next(spans_of_before(training, step - 1))
    if plan is not None:
        return plan.rows[0]
    return np.asarray(data.order(len(training.examples), config.batch_size, config.seed)[step - 1])


def batch_of(training: Training, step: int) -> data.Batch:
    """The batch of a step that was begun, not on the mesh."""
    _, plan, evidence = next(spans_of_before(training, step - 1))
    brought = None if plan is None or plan.brought is None else plan.brought[0]
    batching = known.batching(training, evidence)
    return data.collate(known.read_by_steps(training, evidence), rows_of(training, step), batching, brought=brought)


class Programs:
    """The step, compiled for each shape of batch when it is first met."""

    def __init__(self, training: Training, progress: Progress):
        self.step, self.progress = training.step, progress
        chosen = str(training.workdir.absolute() / "autotuned")
        self.options = fit.compiler_options(pair.this_device(), training.config.kernels, chosen)
        self.by_shape: dict[data.Lengths, Step] = {}

    def for_batch(self, state: TrainState, batch: data.Batch, asked: jax.Array | None, lengths: data.Lengths) -> Step:
        if lengths not in self.by_shape:
            began, found = time.perf_counter(), compile_cache.compiled_found()
            self.by_shape[lengths] = compile_step(self.step, state, batch, asked, self.options)
            how = "compiled by an earlier run, read" if compile_cache.compiled_found() > found else "compiled"
            seconds = time.perf_counter() - began
            self.progress.print(f"the step for {announce.describe(lengths)}: {how} in {seconds:.0f} s")
        return self.by_shape[lengths]
