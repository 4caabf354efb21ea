"""What the steps read: the rows of each, mined or shuffled, as batches on the mesh, and a program for every shape."""

import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from rag_jax import data, files, pair
from rag_jax.distributed import compile_cache, sharding
from rag_jax.inference import evidence
from rag_jax.planning import fit
from rag_jax.training import announce, mining, optim
from rag_jax.training.record import Facts, Record
from rag_jax.training.setup import Training
from rag_jax.training.step import Step, TrainState, compile_step
from rag_jax.training.writer import Progress

# Steps that are planned at a time: the step they follow, which rows they read, None: those of `data.order`, and what a
# generator is known to say of them.
Span = tuple[int, mining.Plan | None, data.Known | None]


def spans(training: Training, state: Callable[[], TrainState], start_step: int, record: Record) -> Iterator[Span]:
    """A span from each mining to the next; without mining a single one. `state()` is the newest when mining is due."""
    config, every, step = training.config, training.config.mining.every_steps, start_step
    if not every:
        yield start_step, None, evidence_of_all(training, state(), record) if training.keeps_evidence else None
        return
    since, plan, met = step, None, np.zeros(len(training.examples), np.int32)
    if start_step:
        since, plan, met = mining.resume(training.workdir, start_step, every)
    while step < config.total_steps:
        if plan is None:
            assert met is not None
            plan = mine(training, state(), met, step, record)
        yield step, plan.after(step - since), known_of(training, plan)
        step = since = since + every
        plan, met = None, plan.met_after()


def mine(training: Training, state: TrainState, met: np.ndarray, step: int, record: Record) -> mining.Plan:
    """Mine with the parameters of this step; the plan goes to the workdir before any step of it is taken."""
    with record.pausing("mining"):
        params = optim.join(state.params, state.frozen)
        plan, metrics = mining.mine(training.opened.model, params, training.examples, met, training.config, step)
        if training.keeps_evidence:
            plan, computed = with_evidence(training, params, plan)
            metrics |= computed
        if training.is_main:
            mining.save(training.workdir, step, plan)
    record.mining(step, metrics)
    return plan


def with_evidence(training: Training, params: dict, plan: mining.Plan) -> tuple[mining.Plan, dict[str, float]]:
    """The plan with what the generator says of all that its rows may read, and how much of it was not kept."""
    rows = plan.rows.ravel()
    may_read = [training.examples.own_key[rows]]
    if plan.brought is not None:
        may_read.append(plan.brought.reshape(len(rows), -1))
    known, computed = known_evidence(training, params, rows, np.concatenate(may_read, axis=1))
    values = {"mining/evidence_pairs": float(len(known.code)), "mining/evidence_computed": float(computed)}
    return dataclasses.replace(plan, evidence_code=known.code, evidence=known.value), values


def known_of(training: Training, plan: mining.Plan) -> data.Known | None:
    if plan.evidence_code is None or plan.evidence is None:
        return None
    return data.Known(plan.evidence_code, plan.evidence, num_known(training))


def evidence_of_all(training: Training, state: TrainState, record: Record) -> data.Known:
    """What the generator says of every row behind what it names, where nothing is mined; kept in the workdir."""
    examples, path = training.examples, training.workdir / "evidence.npz"
    if path.is_file():
        return data.Known(**files.read(path), num_passages=num_known(training))
    may_read = [keys for keys in (examples.own_key, examples.negative_key) if keys is not None]
    with record.pausing("mining"):
        params, rows = optim.join(state.params, state.frozen), np.arange(len(examples))
        known, _ = known_evidence(training, params, rows, np.concatenate(may_read, axis=1))
        if training.is_main:
            files.write(path, {"code": known.code, "value": known.value})
    return known


def num_known(training: Training) -> int:
    """Passages of which something may be known, none included."""
    return len(training.examples.passages) + training.batching.reads_none


def behind_none(training: Training) -> data.Examples:
    """The examples, with no passage as their last one if the objective asks for that."""
    examples, prompt = training.examples, training.opened.prompt
    if not training.batching.reads_none:
        return examples
    assert prompt is not None and examples.prefixes is not None
    (nothing, _), _ = data.prompt_segments(prompt, [""], [])
    prefixes = data.Ragged.of([*(examples.prefixes[i] for i in range(len(examples.prefixes))), nothing[0]])
    return dataclasses.replace(examples, passages=(*examples.passages, ""), prefixes=prefixes)


def known_evidence(training: Training, params: dict, rows: np.ndarray, passages: np.ndarray) -> tuple[data.Known, int]:
    """What the generator says of rows (n,) behind passages (n, _), -1: none, and of how many pairs it was not kept."""
    examples, opened, config = behind_none(training), training.opened, training.config
    num = len(examples.passages)
    if training.batching.reads_none:
        passages = np.concatenate([passages, np.full((len(passages), 1), num - 1, passages.dtype)], axis=1)
    pair_rows, pair_passages = np.divmod(
        np.unique((rows[:, None].astype(np.int64) * num + passages)[passages >= 0]), num
    )
    at_a_time = config.eval.batch_size * config.objective.candidates
    folder = evidence.folder_of(opened, params)
    sums, computed = evidence.sums(opened.model, params, examples, pair_rows, pair_passages, folder, at_a_time)
    counts, objective = evidence.part_lengths(examples, pair_rows), opened.model.objective
    read = [i for i, part in enumerate(evidence.PARTS) if objective.evidence in (part, "both")]
    values = objective.evidence_of([sums[:, i] for i in read], [counts[:, i] for i in read])
    values = np.where(counts[:, read].any(axis=1), values, np.nan)
    return data.Known.of(pair_rows, pair_passages, values, num), computed


def batches(training: Training, spans: Iterator[Span]) -> Iterator[tuple[data.Batch, Facts]]:
    """Batches on the mesh, span after span. A span is asked for only when the one before it has been read."""
    config = training.config
    for first, plan, known in spans:
        left, batching = config.total_steps - first, with_known(training, known)
        source = data.iterate(
            training.examples,
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


def with_known(training: Training, known: data.Known | None) -> data.Batching:
    """How batches are made in a span of which this evidence is known."""
    return training.batching if known is None else dataclasses.replace(training.batching, evidence=known)


def spans_of_before(training: Training, start_step: int) -> Iterator[Span]:
    """The spans of a run as it left them behind, from `start_step` on."""
    if every := training.config.mining.every_steps:
        for step, plan in mining.kept(training.workdir, start_step, every):
            yield step, plan, known_of(training, plan)
        return
    path = training.workdir / "evidence.npz"
    known = data.Known(**files.read(path), num_passages=num_known(training)) if path.is_file() else None
    yield start_step, None, known


def rows_of(training: Training, step: int) -> np.ndarray:
    """Which rows a step that was begun reads, (batch_size,)."""
    config = training.config
    _, plan, _ = next(spans_of_before(training, step - 1))
    return (
        plan.rows[0]
        if plan
        else np.asarray(data.order(len(training.examples), config.batch_size, config.seed)[step - 1])
    )


def batch_of(training: Training, step: int) -> data.Batch:
    """The batch of a step that was begun, not on the mesh."""
    _, plan, known = next(spans_of_before(training, step - 1))
    batching = with_known(training, known)
    brought = None if plan is None or plan.brought is None else plan.brought[0]
    return data.collate(training.examples, rows_of(training, step), batching, brought=brought)


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
