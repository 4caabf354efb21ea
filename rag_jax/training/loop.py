"""The training loop: open what the config names, restore or start, then step, log, evaluate and save."""

import contextlib
import dataclasses
import pathlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rag_jax import config as configs
from rag_jax import data, files, hf, pair
from rag_jax.distributed import compile_cache, processes, sharding
from rag_jax.errors import UserError
from rag_jax.evaluation import evaluation
from rag_jax.training import announce, mining, optim, watch
from rag_jax.training.record import Facts, Record, due
from rag_jax.training.step import Step, TrainState, abstract_state, compile_step, init_state, make_train_step
from rag_jax.training.writer import Progress, Writer
from rag_jax.workdir import checkpoint, lock, provenance
from rag_jax.workdir.checkpoint import Checkpoints, set_aside

# Keys that may differ between a run and its continuation; all others change what the checkpoint means.
MAY_CHANGE = (
    "total_steps", "mesh", "checkpoint", "guard", "log", "eval", "data.eval", "data.passages", "retriever.remat",
    "retriever.chunk_size", "generator.remat",
)  # fmt: skip
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What a process can ask of all of them, and they do after the same step; the highest holds.
NOTHING, SAVE, STOP = range(3)


@dataclasses.dataclass(frozen=True)
class Training:
    """Everything that stays the same from the first step to the last."""

    config: Any
    workdir: pathlib.Path
    opened: pair.Pair
    mesh: Mesh
    examples: data.Examples
    shapes: tuple[data.Lengths, ...]
    eval_rows: evaluation.EvalRows | None
    rules: optim.Rules  # of rate and freezing
    optimizer: Any
    state: Any  # abstract
    step: Step
    is_main: bool  # the one process that prints and writes the record


def train(config: Any, workdir: pathlib.Path) -> int:
    """Train to `total_steps`, from the newest whole checkpoint; the number of the signal that ended it, or 0.

    UserError for what the config, its files or the machine make impossible, before anything is compiled.
    """
    compile_cache.keep_compiled()
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    sharding.check_batch(mesh, config.batch_size, config.group_size)
    start_step, damaged = newest_checkpoint(config, workdir)
    with processes.all_or_none():
        training = build(config, workdir, mesh, start_step)
        found = provenance.of_run(config, training.examples)
        if start_step:
            provenance.check(workdir, config, found)
        params = None if start_step else pair.pretrained_params(training.opened, mesh)
    processes.check_agreement(shared_facts(training, start_step))
    sharding.connect(mesh)
    with contextlib.ExitStack() as stack:
        with processes.all_or_none():
            if training.is_main:
                stack.enter_context(lock.only_writer(workdir))
                write_workdir(training, start_step, found)
                for line in set_aside(workdir, damaged):
                    say(training, line)
        checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.keep_every))
        if start_step >= config.total_steps:
            say(training, f"{workdir} is trained to step {start_step} already; total_steps={config.total_steps}")
            return 0
        if start_step and checkpoint.exhausted(earlier_scores(training, start_step), config.eval.patience):
            say(training, f"{workdir} has ended early at step {start_step}; raise eval.patience to go on")
            return 0
        state = restore(training, checkpoints, start_step) if start_step else pretrained(training, params)
        with processes.ends_at_once():
            return loop(training, state, checkpoints, start_step)


def newest_checkpoint(config: Any, workdir: pathlib.Path) -> tuple[int, dict[int, str]]:
    """The step to go on from, 0 to begin anew, and what is wrong with newer checkpoints: the same in all processes."""
    with processes.all_or_none():
        goes_on = resumable(config, workdir)
    processes.check_agreement({"--workdir": workdir.absolute(), "a checkpoint in it": goes_on})
    if not goes_on:
        return 0, {}
    with Checkpoints(workdir) as checkpoints:
        step, damaged = checkpoints.newest_good()
    return step or 0, damaged


def resumable(config: Any, workdir: pathlib.Path) -> bool:
    """Whether the workdir holds checkpoints of this very run; UserError with the difference if they are of another."""
    if not (workdir / "config.json").is_file() or not (workdir / "checkpoints").is_dir():
        return False
    with Checkpoints(workdir) as checkpoints:
        if not checkpoints.steps():
            return False
    before, now = configs.flat(configs.load_workdir(workdir)), configs.flat(config)
    changed = [
        f"{name} was {before[name]!r} and is {now[name]!r}"
        for name in now
        if before[name] != now[name] and not any(name == key or name.startswith(f"{key}.") for key in MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"--workdir={workdir} holds a run of another config: {'; '.join(changed)}; "
            f"give the same values to go on, or another --workdir; only {', '.join(MAY_CHANGE)} may change"
        )
    return True


def build(config: Any, workdir: pathlib.Path, mesh: Mesh, start_step: int) -> Training:
    """Open models and rows, say what will be done, and write what a workdir holds from the start."""
    is_main = jax.process_index() == 0
    opened = pair.open_pair(config, workdir if start_step else None)
    used = used_roles(opened)
    prompt = opened.prompt if opened.whole_string is None else None
    examples, report = data.load_examples(
        config.data.train,
        key="data.train",
        columns=config.data.columns.to_dict(),
        bad_rows=config.data.bad_rows,
        retriever=opened.retriever_text if "retriever" in used or config.mining.every_steps else None,
        prompt=prompt if "generator" in used else None,
        whole_string=opened.whole_string if "generator" in used else None,
        min_rows=config.batch_size,
        negatives=config.objective.negatives if config.data.columns.negative else 0,
    )
    eval_rows = eval_report = None
    if config.data.eval is not None and config.eval.every_steps:
        eval_rows, eval_report = evaluation.load_rows(config, opened.retriever_text, opened.prompt)
    rules, optimizer, state, step = make_step(opened, mesh)
    shapes = data.buckets(examples, config.batch_size, config.objective.candidates, config.objective.negatives)
    training = Training(
        config, workdir, opened, mesh, examples, shapes, eval_rows, rules, optimizer, state, step, is_main
    )
    say(training, announce.summary(training, report, eval_report, start_step))
    return training


def make_step(opened: pair.Pair, mesh: Mesh) -> tuple[optim.Rules, Any, Any, Step]:
    """The rules of rate and freezing, the optimizer, the abstract state, and the step; no array is made."""
    config = opened.config
    rules = rate_rules(config, used_roles(opened))
    trainable, frozen = optim.split_frozen(pair.abstract_params(opened, mesh), rules)
    optimizer = optim.make_optimizer(config.optimizer, config.total_steps, trainable)
    state = abstract_state(trainable, frozen, optimizer, mesh)
    step = make_train_step(
        opened.model,
        optimizer,
        optim.learning_rate(config.optimizer, config.total_steps),
        jax.tree.map(lambda a: a.sharding, state),
        dropout_seed=config.seed if has_dropout(opened) else None,
        skips_nonfinite=config.guard.skip_nonfinite > 0,
    )
    return rules, optimizer, state, step


def shared_facts(training: Training, start_step: int) -> dict[str, Any]:
    """What must be the same in all processes of a run."""
    examples = {"rows of data.train": data.fingerprint(training.examples)}
    place = {"--workdir": training.workdir.absolute(), "step to start from": start_step}
    return {f"config.{name}": value for name, value in configs.flat(training.config).items()} | place | examples


def used_roles(opened: pair.Pair) -> set[str]:
    objective = opened.model.objective
    return {role for role in opened.sources if getattr(objective, f"uses_{role}")}


def rate_rules(config: Any, used: set[str]) -> optim.Rules:
    """The config's rules; a model that the objective does not use stays as it is."""
    unused = tuple((f"^{role}/", 0.0) for role in pair.ROLES if role not in used)
    return unused + tuple(config.optimizer.rate_rules)


def has_dropout(opened: pair.Pair) -> bool:
    model_configs = [pair.model_config(opened.config, role, source) for role, source in opened.sources.items()]
    return any(rate > 0 for model_config in model_configs for rate in pair.dropouts(model_config).values())


def write_workdir(training: Training, start_step: int, found: provenance.Inputs) -> None:
    """config.json, what the run reads, and all of the models but their weights: the workdir can be used on its own."""
    files.write_whole(training.workdir / "config.json", configs.to_json(training.config))
    folder = training.workdir / "models"
    if not start_step:
        for old in (folder, training.workdir / "mining"):
            shutil.rmtree(old, ignore_errors=True)
        for role, source in training.opened.sources.items():
            hf.copy_small_files(source, folder / role)
        provenance.write(training.workdir, found)


def pretrained(training: Training, params: Any) -> TrainState:
    return init_state(*optim.split_frozen(params, training.rules), training.optimizer, training.mesh)


def restore(training: Training, checkpoints: Checkpoints, step: int) -> TrainState:
    abstract = training.state
    items = {"params": optim.join(abstract.params, abstract.frozen), "opt_state": abstract.opt_state}
    restored = checkpoints.restore(items, step)
    trainable, frozen = optim.split_frozen(restored["params"], training.rules)
    at = jax.device_put(np.int32(step), abstract.step.sharding)
    return TrainState(at, trainable, frozen, restored["opt_state"])


def loop(training: Training, state: Any, checkpoints: Checkpoints, start_step: int) -> int:
    """All steps; the number of the signal that ended them early, or 0."""
    config, total_steps = training.config, training.config.total_steps
    compiled = Compiled(training)
    pending: tuple[int, Any, Facts] | None = None
    asked = NOTHING  # as all processes know
    scores = earlier_scores(training, start_step)
    ended = ""
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(Writer(training.workdir, start_step, active=training.is_main))
        progress = Progress(total_steps, start_step, active=training.is_main)
        stack.callback(progress.close)
        stopped = stack.enter_context(stop_signals())
        used = {role: training.opened.sources[role].model_config for role in used_roles(training.opened)}
        record = Record(config, used, writer, progress, nonfinite(training, state, start_step))
        wishes = Wishes(stopped, 60 * config.checkpoint.every_minutes if training.is_main else 0)
        if start_step == 0:
            record.pause("eval", evaluated(training, state, 0, record, scores))
        spans = planned(training, lambda: state, start_step, record)
        for step, (batch, facts) in enumerate(batches(training, spans, wishes), start=start_step + 1):
            run_step, compile_s = compiled.of(state, batch, facts.lengths, progress)
            record.pause("compile", compile_s)
            state, values = run_step(state, batch)
            # The step runs; meanwhile the one before it, which must be done by now, is written down.
            if pending:
                asked = max(asked, write(record, *pending))
            checkpoints.check_saving()
            pending = (step, values, facts)
            if jax.process_count() == 1:
                asked = max(asked, wishes.now())
            last = step == total_steps or asked == STOP
            evaluates = due(step, config.eval.every_steps) or (step == total_steps)
            saves = last or asked == SAVE or due(step, config.checkpoint.every_steps)
            if evaluates or saves or due(step, config.mining.every_steps):
                asked = max(asked, write(record, *pending))
                pending = None
                if evaluates:
                    record.pause("eval", evaluated(training, state, step, record, scores))
                    if checkpoint.exhausted(scores, config.eval.patience) and step < total_steps:
                        last, ended = True, f"; ended early: {config.eval.patience} evaluations brought nothing better"
            if saves or last:
                record.pause("checkpoint", save(training, state, checkpoints, step))
                wishes.saved()
                asked = asked if asked == STOP else NOTHING
            if last:
                break
        say(training, record.summary())
        checkpoints.wait()
    if (stopped or asked) and step < total_steps and not ended:
        number = stopped[0] if stopped else signal.SIGTERM
        saved = "saved; the same command goes on from there" if saves_at_all(config) else "not saved"
        say(training, f"stopped by {signal.Signals(number).name} after step {step}: {saved}")
        return number
    say(
        training,
        f"trained to step {step}{ended}; next: python -m rag_jax.export --workdir={training.workdir} --out=DIR",
    )
    return 0


class Wishes:
    """What this process asks of all: to end after a signal, to save when `every_s` seconds have passed (0: never)."""

    def __init__(self, stopped: list[int], every_s: float):
        self.stopped, self.every_s, self.saved_at = stopped, every_s, time.monotonic()

    def saved(self) -> None:
        self.saved_at = time.monotonic()

    def now(self) -> int:
        if self.stopped:
            return STOP
        return SAVE if self.every_s and time.monotonic() - self.saved_at >= self.every_s else NOTHING


def nonfinite(training: Training, state: Any, start_step: int) -> watch.NonFinite:
    """The guard of this run, which knows how many updates were skipped before `start_step`."""
    config = training.config
    skipped = start_step - int(jax.device_get(optim.updates_done(state.opt_state)))
    return watch.NonFinite(
        training.workdir,
        config.guard.skip_nonfinite,
        skipped,
        lambda step: batch_of(training, step)[0],
        training.is_main,
    )


def batch_of(training: Training, step: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Which rows a step that was begun reads, (batch_size,), and the negatives (batch_size, H) that were mined."""
    config = training.config
    if config.mining.every_steps:
        _, plan = next(mining.kept(training.workdir, step - 1, config.mining.every_steps))
        return plan.rows[0], None if plan.negatives is None else plan.negatives[0]
    return np.asarray(data.order(len(training.examples), config.batch_size, config.seed)[step - 1]), None


def write(record: Record, step: int, values: dict[str, Any], facts: Facts) -> int:
    """Record a step that is done; what was asked of all before it."""
    asked = int(values.pop("stop", NOTHING))
    record.train(step, values, facts)
    return asked


def planned(
    training: Training, state: Callable[[], Any], start_step: int, record: Record
) -> Iterator[tuple[int, mining.Plan | None]]:
    """(step, plan of the steps after it) from one mining to the next; without mining (start_step, None)."""
    config, every, step = training.config, training.config.mining.every_steps, start_step
    if not every:
        yield start_step, None
        return
    since, plan, met = step, None, np.zeros(len(training.examples), np.int32)
    if start_step:
        since, plan, met = mining.resume(training.workdir, start_step, every)
    while step < config.total_steps:
        if plan is None:
            plan = mined(training, state(), met, step, record)
        yield step, plan.after(step - since)
        step = since = since + every
        plan, met = None, plan.met_after()


def mined(training: Training, state: Any, met: Any, step: int, record: Record) -> mining.Plan:
    """Mine with the parameters of this step; the plan goes to the workdir before any step of it is taken."""
    began = time.perf_counter()
    params = optim.join(state.params, state.frozen)
    plan, values = mining.mine(training.opened.model, params, training.examples, met, training.config, step)
    if training.is_main:
        mining.save(training.workdir, step, plan)
    record.pause("mining", time.perf_counter() - began)
    record.mining(step, values)
    return plan


def batches(
    training: Training, spans: Iterator[tuple[int, mining.Plan | None]], wishes: Wishes
) -> Iterator[tuple[data.Batch, Facts]]:
    """Batches on the mesh, span after span; the other processes learn of `wishes` with them."""
    config = training.config
    for first, plan in spans:
        left = config.total_steps - first
        source = data.iterate(
            training.examples,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=first,
            total_steps=config.total_steps,
            shapes=training.shapes,
            own=sharding.own_rows(training.mesh, config.batch_size),
            planned=None if plan is None else plan.rows[:left],
            mined=None if plan is None else plan.negatives,
        )
        while True:
            began = time.perf_counter()
            batch = next(source, None)
            if batch is None:
                break
            if jax.process_count() > 1:
                batch = batch._replace(stop=np.full(len(batch.row), wishes.now(), np.int32))
            placed = sharding.put_batch(training.mesh, batch, config.batch_size)
            wait_s = time.perf_counter() - began
            yield placed, Facts(data.lengths(batch), data.padding_share(batch, config.objective.candidates), wait_s)


class Compiled:
    """The step, compiled for each shape of batch when it is first met."""

    def __init__(self, training: Training):
        self.training, self.by_shape = training, {}

    def of(self, state: Any, batch: data.Batch, lengths: data.Lengths, progress: Progress) -> tuple[Any, float]:
        """The compiled step for this batch, and the seconds that compiling took, 0 if it was known."""
        if lengths in self.by_shape:
            return self.by_shape[lengths], 0.0
        began, found = time.perf_counter(), compile_cache.compiled_found()
        self.by_shape[lengths] = compile_step(self.training.step, state, batch)
        seconds = time.perf_counter() - began
        how = "compiled by an earlier run, read" if compile_cache.compiled_found() > found else "compiled"
        progress.print(f"the step for {announce.describe(lengths)}: {how} in {seconds:.0f} s")
        return self.by_shape[lengths], seconds


def evaluated(training: Training, state: Any, step: int, record: Record, scores: dict[int, float]) -> float:
    """Metrics of this step on the held-out rows, to the record and `eval/step_N.json`; the seconds it took."""
    if training.eval_rows is None:
        return 0.0
    began = time.perf_counter()
    params = optim.join(state.params, state.frozen)
    result = evaluation.evaluate(training.opened.model, params, training.eval_rows)
    content = evaluation.record(result, training.eval_rows, training.opened.model, step)
    if training.is_main:
        evaluation.write_record(training.workdir, content, result.by_row)
    score = checkpoint.score(content, content.get("best_by"))
    scores |= {} if score is None else {step: score}
    record.evaluation(step, result.metrics)
    return time.perf_counter() - began


def earlier_scores(training: Training, start_step: int) -> dict[int, float]:
    """What the evaluations of the run up to the step it goes on from say; those of the command do not count."""
    every = training.config.eval.every_steps
    found = checkpoint.scores(training.workdir) if start_step else {}
    return {step: score for step, score in found.items() if step <= start_step and (step == 0 or due(step, every))}


def saves_at_all(config: Any) -> bool:
    return config.checkpoint.every_steps > 0 or config.checkpoint.every_minutes > 0


def save(training: Training, state: Any, checkpoints: Checkpoints, step: int) -> float:
    """Start saving, if the run saves at all; the seconds until training may go on."""
    began = time.perf_counter()
    if saves_at_all(training.config):
        items = {"params": optim.join(state.params, state.frozen), "opt_state": state.opt_state}
        checkpoints.save(step, items)
    return time.perf_counter() - began


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets the number of the first signal to end; a second one, the system's own way, ends the process."""
    received: list[int] = []

    def receive(number: int, _: Any) -> None:
        received.append(number)
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(training: Training, text: str) -> None:
    if training.is_main:
        print(text, flush=True)
